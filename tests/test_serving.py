"""Served models: each clip's own scores, whatever comes with it, from TensorFlow alone."""

import concurrent.futures
import io
import json
import re

import keras
import numpy as np
import pytest
import soundfile
from helpers import IN_PLACE, pack_rows, randomize, run_python

from keras_flexast import ElasticAST, FlexiAST
from keras_flexast.export.serving import _clips_of_rows, _Serving, group_size, write_serving
from keras_flexast.inference.artifacts import file_embeddings, load_artifact, load_artifacts
from keras_flexast.inference.scoring import fixed_scores
from keras_flexast.models import embedding_model
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.settings import (
    MAX_ROW_LENGTH,
    FbankSettings,
    PackSettings,
    patch_name,
    patch_pair,
)

pytestmark = IN_PLACE
CLASSES = ("one", "two", "three", "four", "five", "six", "Sägewerk")
RATE, LENGTHS = 16000, (9001, 16000, 4201)
SIZES = {"elastic": (8, 16, (16, 24)), "flexi": (16,)}  # the second cuts or fills up to 0.8 s
SOUNDS = {"waveform": ([None, None], "float32"), "length": ([None], "int32")}
WAVS = {"wav_bytes": ([None], "string")}
ANSWER = {
    "scores": ([None, 7], "float32"),
    "top_labels": ([None, 5], "string"),
    "top_scores": ([None, 5], "float32"),
    "error": ([None], "string"),
}

# Writing needs Keras on TensorFlow, so it has a process of its own.
WRITE = """
    import dataclasses, json, pathlib, sys
    import tensorflow as tf
    from keras_flexast.runs import load_run
    from keras_flexast.export.serving import _Serving, write_serving
    folder, runs, errors = pathlib.Path(sys.argv[1]), {}, {}
    for name, sizes in json.loads(sys.argv[2]).items():
        runs[name] = load_run(folder / name)
        before = runs[name].model.get_config()
        path = write_serving(
            runs[name], folder / "models" / name, patch_sizes=sizes, max_seconds=3
        )
        assert path == folder / "models" / name / "1"
        assert runs[name].model.get_config() == before

    def listing():
        return sorted(str(path) for path in folder.rglob("*"))

    def refuse(case, run, out, error, **options):
        before = listing()
        try:
            write_serving(runs[run], folder / out, **options)
        except error as caught:
            errors[case] = str(caught)
        assert listing() == before, set(listing()) ^ set(before)

    old = "models/flexi"
    refuse("exists", "flexi", old, FileExistsError, version=1)
    refuse("version", "flexi", old, ValueError, version=0)
    refuse("name", "flexi", "my model", ValueError)
    refuse("no sizes", "flexi", "new", ValueError, patch_sizes=())
    refuse("high patch", "flexi", "new", ValueError, patch_sizes=(129,))
    fbank = dataclasses.replace(runs["flexi"].fbank, clip_ms=2000.0)
    runs["long"] = dataclasses.replace(runs["flexi"], fbank=fbank)
    refuse("tokens", "long", "new", ValueError, patch_sizes=((1, 1),))
    refuse("seconds", "flexi", "new", ValueError, max_seconds=0.02)
    refuse("default", "flexi", "new", ValueError, default=8)
    save = tf.saved_model.save
    def fail(module, path, signatures):
        save(module, path)
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device\\nat x.cc:1")
    tf.saved_model.save = fail
    refuse("failed", "flexi", "deep/new", OSError)
    refuse("failed again", "flexi", old, OSError)
    tf.saved_model.save = save
    (folder / old / "batching.config").write_text("max_batch_size { value: 4 }")
    path = write_serving(runs["flexi"], folder / old, name="other")
    assert path == folder / old / "2"
    (folder / "errors.json").write_text(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    keras.utils.set_random_seed(0)
    small = {"size": None, "dim": 24, "depth": 1, "num_heads": 2}
    elastic = ElasticAST(7, segments=3, **small)
    flexi = FlexiAST(7, grid=(8, 5), segments=2, stride=10, mel_bins=86, **small)
    for name, model, options in (
        ("elastic", elastic, {}),
        ("flexi", flexi, {"clip_ms": 800.0, "mel_bins": 86, "frame_shift_ms": 12.5}),
    ):
        randomize(model)
        run = Run(
            model, FbankSettings(**options), patches=model.patch_settings(),
            packing=PackSettings(segments=model.segments), classes=CLASSES,
            multi_label=name == "flexi",
        )  # fmt: skip
        (folder / name).mkdir()
        save_run(run, folder / name)
    run_python(WRITE, folder, json.dumps(SIZES), backend="tensorflow")
    return folder


@pytest.fixture(scope="module")
def serve(folder):
    """Function that calls a signature: serve(run, signature, **inputs) -> NumPy outputs."""
    import tensorflow as tf

    loaded = {name: tf.saved_model.load(str(folder / "models" / name / "1")) for name in SIZES}

    def call(name, signature, **inputs):
        inputs = {key: tf.constant(value) for key, value in inputs.items()}
        outputs = loaded[name].signatures[signature](**inputs)
        return {key: value.numpy() for key, value in outputs.items()}

    call.loaded = loaded
    return call


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=length) * scale).astype("float32")
        for length, scale in zip(LENGTHS, (0.3, 0.01, 0.1), strict=True)
    ]


def batch(clips, filler=0.0):
    """The signature's inputs, filled up with anything."""
    waveform = np.full((len(clips), max(map(len, clips))), filler, "float32")
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    return {"waveform": waveform, "length": np.array([len(clip) for clip in clips], "int32")}


def by_pipeline(run, clips, size, model=None):
    """What the packed model makes of clips that share their rows with others."""
    from tf_data_pipelines.fbank import features
    from tf_data_pipelines.patches import patch_tokens

    rows = []
    for clip in clips:
        log_mel = features(clip, run.fbank)
        tokens, positions = patch_tokens(log_mel, run.patches_at([size]))
        rows.append([(tokens.numpy() + 1, positions), (tokens, positions)])
    # One length for all of them, which JAX compiles once.
    outputs = (model or run.model)(pack_rows(rows, 420))
    return keras.ops.convert_to_numpy(outputs)[:, 1]


def wav_bytes(samples, rate, **options):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="WAV", **{"subtype": "PCM_16", **options})
    return stream.getvalue()


@pytest.mark.parametrize("name", SIZES)
def test_signatures(serve, name):
    sizes = ["", *(f"_{patch_name(patch_pair(size))}" for size in SIZES[name])]
    error = {"error": ([None], "string")}
    mel_bins = 128 if name == "elastic" else 86
    log_mel = {"log_mel": ([None, None, mel_bins], "float32"), "frames": ([None], "int32")}
    log_mel, vector = {**log_mel, **error}, {"embedding": ([None, 24], "float32"), **error}
    expected = {"features": (SOUNDS, log_mel), "features_wav": (WAVS, log_mel)}
    for size in sizes:
        expected[f"patch{size}" if size else "serving_default"] = SOUNDS, ANSWER
        expected[f"classify_wav{size}"] = WAVS, ANSWER
        expected[f"embed{size}"] = SOUNDS, vector
        expected[f"embed_wav{size}"] = WAVS, vector
    found = {}
    for key, function in serve.loaded[name].signatures.items():
        both = function.structured_input_signature[1], function.structured_outputs
        found[key] = tuple(
            {one: (spec.shape.as_list(), spec.dtype.name) for one, spec in specs.items()}
            for specs in both
        )
    assert found == expected


@pytest.mark.parametrize("name, size", [(name, size) for name in SIZES for size in SIZES[name]])
def test_scores_are_those_in_memory(folder, serve, clips, name, size):
    run = load_run(folder / name)
    signature = f"patch_{size}" if isinstance(size, int) else "patch_16x24"
    answer = serve(name, signature, **batch(clips, np.nan))
    assert answer["error"].tolist() == [b""] * 3
    packed = run.scores(by_pipeline(run, clips, size))
    np.testing.assert_allclose(answer["scores"], packed, rtol=0, atol=1e-5)
    fixed = fixed_scores(run, size, clips[0][None])
    np.testing.assert_allclose(answer["scores"][:1], fixed, rtol=0, atol=1e-5)
    assert np.ptp(answer["scores"], axis=0).max() > 1e-2  # the clips do differ
    order = np.argsort(-answer["scores"], 1)[:, :5]
    np.testing.assert_array_equal(
        answer["top_scores"], np.take_along_axis(answer["scores"], order, 1)
    )
    labels = [[CLASSES[place] for place in row] for row in order]
    assert [[label.decode() for label in row] for row in answer["top_labels"]] == labels


def test_the_default_is_the_base_patch(serve, clips):
    inputs = batch(clips)
    for name, output in (("serving_default", "scores"), ("embed", "embedding")):
        sized = name if name == "embed" else "patch"
        answer, base, other = (
            serve("elastic", one, **inputs)[output] for one in (name, f"{sized}_16", f"{sized}_8")
        )
        np.testing.assert_allclose(answer, base, atol=1e-6)
        assert np.abs(answer - other).max() > 1e-3
        wavs = [wav_bytes(clip, RATE) for clip in clips]  # loud samples are clipped
        wav = "embed_wav_8" if name == "embed" else "classify_wav_8"
        quiet = serve("elastic", wav, wav_bytes=wavs)[output][1]
        np.testing.assert_allclose(quiet, other[1], rtol=0, atol=1e-3)


def test_the_default_is_named_and_may_be_chosen(folder):
    text = (folder / "models" / "elastic" / "1" / "assets" / "artifact.json").read_text()
    sizes = json.loads(text)["patch_sizes"]
    assert sizes["serving_default"] == sizes["embed_wav"] == sizes["classify_wav_16"] == [16, 16]
    assert sizes["embed_16x24"] == [16, 24] and len(sizes) == 4 + 3 * 4
    run = load_run(folder / "elastic")
    assert _Serving(run, [8, 32], 3.0, default=8).default == "8"
    assert _Serving(run, [8, (16, 24), 48], 3.0).default == "16x24"
    assert _Serving(run, [8, 32], 3.0).default == "32"  # as near as 8, and faster


@pytest.mark.parametrize("name", SIZES)
def test_features_and_embeddings_are_those_in_memory(folder, serve, clips, name):
    from tf_data_pipelines.fbank import features as log_mel_of

    run = load_run(folder / name)
    silent = np.zeros(5000, "float32")
    features = serve(name, "features", **batch([*clips, silent], np.nan))
    vectors = serve(name, "embed", **batch([*clips, silent], np.nan))
    expected = by_pipeline(run, clips, 16, embedding_model(run.model))
    np.testing.assert_allclose(vectors["embedding"][:3], expected, rtol=0, atol=1e-5)
    for index, clip in enumerate(clips):
        frames = features["frames"][index]
        expected = log_mel_of(clip, run.fbank).numpy()
        assert frames == len(expected)
        np.testing.assert_allclose(features["log_mel"][index, :frames], expected, atol=1e-4)
        assert not features["log_mel"][index, frames:].any()
    assert features["frames"][3] == 0
    for key, outputs in (("log_mel", features), ("embedding", vectors)):
        assert not outputs[key][3].any() and b"silent" in outputs["error"][3]
    wavs = [wav_bytes(clip, RATE) for clip in clips]
    rounded = [soundfile.read(io.BytesIO(wav), dtype="float32")[0] for wav in wavs]
    for signature, key in (("features", "log_mel"), ("embed", "embedding")):
        expected = serve(name, signature, **batch(rounded))
        answer = serve(name, f"{signature}_wav", wav_bytes=[*wavs, b"hello"])
        np.testing.assert_allclose(answer[key][:3], expected[key], rtol=0, atol=1e-4)
        assert b"not a WAV" in answer["error"][3] and not answer[key][3].any()


def test_an_artifact_gives_embeddings(folder, clips, tmp_path):
    run = load_run(folder / "elastic")
    expected = by_pipeline(run, clips, 16, embedding_model(run.model))
    path = folder / "models" / "elastic"
    artifact = load_artifact(path)
    assert (artifact.patch_size, artifact.dim, artifact.multi_label) == ("16", 24, False)
    np.testing.assert_allclose(artifact.embeddings(clips), expected, rtol=0, atol=1e-5)
    assert artifact.embeddings([]).shape == (0, 24)
    with pytest.raises(ValueError, match=r"refused clip 1: .* silent"):
        artifact.embeddings([clips[0], np.zeros(5000, "float32")])
    found = load_artifacts(path)
    assert set(found) == {"serving_default", "patch_8", "patch_16", "patch_16x24"}
    expected_8 = by_pipeline(run, clips, 8, embedding_model(run.model))
    np.testing.assert_allclose(found["patch_8"].embeddings(clips), expected_8, rtol=0, atol=1e-5)
    for number, clip in enumerate(clips):
        soundfile.write(tmp_path / f"{number}.wav", clip, RATE, subtype="FLOAT")
    paths = [tmp_path / f"{number}.wav" for number in range(4)]
    found = file_embeddings(artifact, paths)
    np.testing.assert_allclose(found.embeddings, expected, rtol=0, atol=1e-5)
    assert found.paths == list(map(str, paths[:3]))
    ((path, reason),) = found.rejected
    assert path == str(paths[3]) and "does not exist" in reason


@pytest.mark.parametrize("signature", ["patch_16", "patch_8", "embed"])
def test_neither_neighbors_nor_padding_move_a_clip(serve, clips, signature):
    output = "embedding" if signature == "embed" else "scores"
    alone = [serve("elastic", signature, **batch([clip]))[output][0] for clip in clips]
    loud = np.full(2 * RATE, 1.0, "float32") * np.sign(np.sin(np.arange(2 * RATE)))
    bad = np.array([np.inf] * 20000, "float32")
    for filler in (0.0, 1e30, np.nan, -np.inf, float(clips[0][0])):
        for others in ([], [loud, bad], [clips[2]] * 5):
            answer = serve("elastic", signature, **batch([*clips, *others], filler))[output]
            np.testing.assert_allclose(answer[:3], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case, message",
    [
        ("nan", "NaN or infinite samples"),
        ("inf", "NaN or infinite samples"),
        ("nothing", "has 0 samples at 16000 Hz; expected at least 400"),
        ("short", "has 399 samples at 16000 Hz; expected at least 400"),
        ("negative", "length is -5; expected 0 to 48001"),
        ("beyond", "length is 48002; expected 0 to 48001"),
        ("long", "has 48001 samples at 16000 Hz; at most 48000 (3.00 s) are accepted"),
        ("integers", "samples beyond 16; expected numbers in [-1, 1]"),
        ("silent", "silent"),
    ],
)
@pytest.mark.parametrize("name", SIZES)
def test_a_bad_clip_is_explained_and_spares_the_others(serve, clips, name, case, message):
    samples, length = np.sin(np.arange(48001)).astype("float32"), 20000
    if case in ("nan", "inf"):
        samples[19999] = float(case)
    elif case in ("silent", "integers"):
        samples *= {"silent": 0, "integers": -32768}[case]
    else:
        cases = {"nothing": 0, "short": 399, "negative": -5, "beyond": 48002, "long": 48001}
        length = cases[case]
    inputs = batch([clips[0], samples, clips[1]])
    inputs["length"][1] = length
    answer = serve(name, "serving_default", **inputs)
    assert message in answer["error"][1].decode() and not answer["scores"][1].any()
    assert answer["top_labels"][1].tolist() == [b""] * 5 and not answer["top_scores"][1].any()
    expected = serve(name, "serving_default", **batch(clips[:2]))
    assert answer["error"][::2].tolist() == [b"", b""]
    np.testing.assert_allclose(answer["scores"][::2], expected["scores"], rtol=0, atol=1e-5)


def test_the_shortest_and_the_longest_clip_are_scored(serve):
    for samples in (400, 48000):
        clip = np.sin(np.arange(samples)).astype("float32")
        answer = serve("elastic", "serving_default", **batch([clip], 1.0))
        assert answer["error"][0] == b""
        np.testing.assert_allclose(answer["scores"].sum(), 1, atol=1e-6)


def test_clips_are_no_longer_than_their_tokens_allow(folder):
    run = load_run(folder / "elastic")
    (limit,) = _Serving(run, [1], 60.0).limits.values()  # 128 tokens a frame
    assert run.fbank.frames(limit) == MAX_ROW_LENGTH // 128 == run.fbank.frames(limit + 1) - 1
    assert _Serving(run, [1], 0.5).limits == {"1": 8000}


def test_groups_are_of_similar_length_and_bounded():
    import tensorflow as tf

    rng = np.random.default_rng(0)
    for longest in (1, 40, 3000, MAX_ROW_LENGTH):
        tokens = np.sort(rng.integers(1, longest + 1, 200)).astype("int32")
        while len(tokens):
            size = int(group_size(tf.constant(tokens)))
            assert size * tokens[size - 1] <= MAX_ROW_LENGTH
            assert tokens[size - 1] <= 1.25 * tokens[0]
            if size < len(tokens):  # it is as large as it can be
                following = tokens[size]
                assert (size + 1) * following > MAX_ROW_LENGTH or following > 1.25 * tokens[0]
            tokens = tokens[size:]


def test_a_long_clip_lengthens_no_other_and_memory_is_bounded(folder):
    import tensorflow as tf

    def tensors(inputs):
        return tf.constant(inputs["waveform"]), tf.constant(inputs["length"])

    run = load_run(folder / "elastic")
    serving, met = _Serving(run, [8], 60.0), []

    def outputs(rows):
        met.append(rows["segment_ids"].numpy())
        return tf.reduce_sum(rows["positions"], (1, 2))[:, None]  # of padding they are 0

    seconds = [40.9] + [0.5 + 0.02 * number for number in range(31)]
    clips = [np.ones(round(RATE * one), "float32") for one in seconds]
    inputs = _clips_of_rows(*tensors(batch(clips)))[0]
    usable = tf.constant([number != 3 for number in range(32)])
    together = serving._outputs(inputs, usable, "8", function=outputs, width=1).numpy()
    tokens = serving._tokens(inputs.length, "8").numpy()
    assert max(tokens) > 8000 and sum(ids.sum() for ids in met) == sum(tokens) - tokens[3]
    assert max(ids.size for ids in met) <= MAX_ROW_LENGTH and len(met) <= 6
    assert sum(ids.size for ids in met) < 1.2 * sum(tokens)
    assert not together[3].any()
    for number in (0, 1, 20):
        alone = _clips_of_rows(*tensors(batch([clips[number]])))[0]
        one = serving._outputs(alone, usable[:1], "8", function=outputs, width=1).numpy()
        np.testing.assert_allclose(together[number], one[0], rtol=1e-5)


def test_an_empty_batch_is_an_empty_answer(serve):
    inputs = {"waveform": np.zeros((0, 500), "float32"), "length": np.zeros(0, "int32")}
    for signature in ("serving_default", "features", "embed"):
        answer = serve("elastic", signature, **inputs)
        assert {len(value) for value in answer.values()} == {0}
    answer = serve("elastic", "classify_wav", wav_bytes=np.zeros(0, "S"))
    assert {len(value) for value in answer.values()} == {0}


@pytest.mark.parametrize("signature", ["serving_default", "features", "embed"])
@pytest.mark.parametrize(("clips", "lengths"), [(2, 1), (1, 2)])
def test_waveforms_and_lengths_of_different_batches_fail(serve, signature, clips, lengths):
    waveform = np.random.default_rng(0).normal(size=(clips, 5000)).astype("float32")
    with pytest.raises(Exception, match="differ in their number of clips"):
        serve("elastic", signature, waveform=waveform, length=np.full(lengths, 5000, "int32"))


def test_wav_bytes_score_like_files(folder, serve, tmp_path):
    from tf_data_pipelines.decode import decode_audio

    times = {rate: np.arange(rate) / rate for rate in (8000, 16000, 22050, 44100, 48000)}
    contents, waves = [], []
    for number, (rate, time) in enumerate(times.items()):
        sweep = 0.4 * np.sin(2 * np.pi * (300 + 900 * time) * time)
        samples = np.stack([sweep, 0.3 * sweep], 1)[:, : 1 + number % 2]
        path = tmp_path / f"{rate}.wav"
        path.write_bytes(wav_bytes(samples, rate))
        contents.append(path.read_bytes())
        waves.append(decode_audio(str(path)).numpy())
    bad = {
        b"": b"empty",
        b"hello": b"not a WAV",
        contents[3][:-1]: b"truncated",
        wav_bytes(samples, 16000, subtype="FLOAT"): b"32 bits",
        wav_bytes(samples, 1000): b"1000 Hz",
        wav_bytes(np.zeros(9000), 44100): b"silent",
        wav_bytes(np.full(9000, 0.25), 22050): b"silent",
        wav_bytes(samples[:300], 16000): b"has 300 samples",
        wav_bytes(np.tile(samples, [4, 1]), 48000): b"lasts 4.00 s; at most 3 s",
    }
    answer = serve("elastic", "classify_wav", wav_bytes=[*bad, *contents])
    for error, message in zip(answer["error"], [*bad.values()] + 5 * [None], strict=True):
        assert error == b"" if message is None else message in error
    assert not answer["scores"][: len(bad)].any()
    for scores, wave, rate in zip(answer["scores"][len(bad) :], waves, times, strict=True):
        expected = serve("elastic", "serving_default", **batch([wave]))["scores"][0]
        # At the edge of the band the resampler is not soxr; 1e-3 was measured at most.
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 if rate == RATE else 2e-3)


def test_threads_get_their_own_answers(serve, clips):
    calls = [
        (signature, clip) for clip in clips for signature in ("patch_16", "patch_8", "patch_16x24")
    ] * 4

    def score(call):
        return serve("elastic", call[0], **batch([call[1]]))["scores"]

    expected = [score(call) for call in calls[:9]] * 4
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for scores, wanted in zip(pool.map(score, calls), expected, strict=True):
            np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-6)


def test_tensorflow_alone_serves(folder, serve, clips):
    inputs = batch(clips, np.nan)
    np.savez(folder / "inputs.npz", **inputs)
    code = """
        import sys
        import numpy as np, tensorflow as tf
        loaded = tf.saved_model.load(sys.argv[1] + "/models/elastic/1")
        inputs = {key: tf.constant(value) for key, value in np.load(sys.argv[2]).items()}
        np.save(sys.argv[3], loaded.signatures["serving_default"](**inputs)["scores"])
    """
    blocked = ("keras_flexast", "tf_data_pipelines", "keras", "jax", "soundfile", "soxr")
    arguments = folder, folder / "inputs.npz", folder / "scores.npy"
    run_python(code, *arguments, backend="tensorflow", blocked=blocked)
    expected = serve("elastic", "serving_default", **inputs)["scores"]
    np.testing.assert_allclose(np.load(folder / "scores.npy"), expected, atol=1e-6)


def test_the_graph_holds_one_set_of_weights_and_no_python(folder):
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    path = folder / "models" / "elastic" / "1"
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    (graph,) = (meta.graph_def for meta in saved.meta_graphs)
    ops = {node.op for one in graph.library.function for node in one.node_def}
    assert "RFFT" in ops and not [op for op in ops if "PyFunc" in op]
    shapes = tf.train.list_variables(str(path / "variables" / "variables"))
    weights = sum(int(np.prod(shape)) for name, shape in shapes if "VARIABLE_VALUE" in name)
    assert weights == load_run(folder / "elastic").model.count_params()


def test_folder_of_a_model(folder):
    elastic, flexi = folder / "models" / "elastic", folder / "models" / "flexi"
    files = {str(path.relative_to(elastic)) for path in elastic.rglob("*") if path.is_file()}
    assert files >= {
        *("1/saved_model.pb", "1/variables/variables.index", "1/assets/labels.txt"),
        "1/assets/artifact.json",
        *("1/assets.extra/tf_serving_warmup_requests", "models.config", "batching.config"),
    }
    assert sorted(path.name for path in flexi.iterdir()) == [
        *("1", "2", "batching.config", "models.config"),
    ]
    labels = (elastic / "1" / "assets" / "labels.txt").read_text()
    assert tuple(labels.splitlines()) == CLASSES
    config = (flexi / "models.config").read_text()
    assert 'name: "other"' in config and 'base_path: "/models/other"' in config
    assert 'key: "stable" value: 2' in config
    assert 'key: "stable" value: 1' in (elastic / "models.config").read_text()
    assert (flexi / "batching.config").read_text() == "max_batch_size { value: 4 }"
    batching = (elastic / "batching.config").read_text()
    sizes = [int(size) for size in re.findall(r"allowed_batch_sizes: (\d+)", batching)]
    (most,) = re.findall(r"max_batch_size \{ value: (\d+) \}", batching)
    assert sizes == sorted(sizes) and sizes[-1] == int(most)
    assert "pad_variable_length_inputs: true" in batching
    assert "max_enqueued_batches { value: 8 }" in batching


def prediction_log():
    """The message tensorflow.serving.PredictionLog, as far as it is used, from its numbers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from tensorflow.core.framework import tensor_pb2

    tensor = tensor_pb2.DESCRIPTOR.name
    file = descriptor_pb2.FileDescriptorProto(name="w.proto", package="w", dependency=[tensor])
    for message, fields in {
        "ModelSpec": [("name", 1, None), ("signature_name", 3, None)],
        "Input": [("key", 1, None), ("value", 2, ".tensorflow.TensorProto")],
        "PredictRequest": [("model_spec", 1, ".w.ModelSpec"), ("inputs", 2, ".w.Input")],
        "PredictLog": [("request", 1, ".w.PredictRequest")],
        "PredictionLog": [("predict_log", 6, ".w.PredictLog")],
    }.items():
        one = file.message_type.add(name=message)
        for name, number, kind in fields:
            label = 3 if name == "inputs" else 1  # repeated, optional
            field = {"type": 9} if kind is None else {"type": 11, "type_name": kind}
            one.field.add(name=name, number=number, label=label, **field)
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("w.PredictionLog"))


def test_warm_up_requests_are_answered(folder, serve):
    import tensorflow as tf

    message, answered = prediction_log(), set()
    path = folder / "models" / "elastic" / "1" / "assets.extra" / "tf_serving_warmup_requests"
    for record in tf.data.TFRecordDataset(str(path)):
        request = message.FromString(record.numpy()).predict_log.request
        assert request.model_spec.name == "elastic"
        inputs = {one.key: tf.make_ndarray(one.value) for one in request.inputs}
        answer = serve("elastic", request.model_spec.signature_name, **inputs)
        assert answer["error"].tolist() == [b""]
        answered.add(request.model_spec.signature_name)
    assert answered == set(serve.loaded["elastic"].signatures)


def test_tensorflow_serving_reads_the_files(folder):
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    text = (folder / "models" / "flexi" / "models.config").read_text()
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert model.name == "other" and dict(model.version_labels) == {"stable": 2}
    import tensorflow as tf

    path = folder / "models" / "flexi" / "1" / "assets.extra" / "tf_serving_warmup_requests"
    for record in tf.data.TFRecordDataset(str(path)):
        request = logs.PredictionLog.FromString(record.numpy()).predict_log.request
        wav = "wav" in request.model_spec.signature_name
        assert set(request.inputs) == ({"wav_bytes"} if wav else {"waveform", "length"})


@pytest.mark.parametrize(
    "case, message",
    [
        ("exists", "1 exists already"),
        ("version", "version=0 must be a positive number"),
        ("name", "name='my model' cannot be part of a URL"),
        ("no sizes", "patch_sizes is empty"),
        ("high patch", "patch_size is 129 along frequency, larger than the spectrogram's 86"),
        ("tokens", "patch_size=1 makes more than 8,192 tokens"),
        ("seconds", "max_seconds=0.02 is under one window of 25.0 ms"),
        ("default", "default=8 is none of the patch sizes 16."),
        ("failed", "deep/new/1 cannot be written: No space left on device. Make room"),
        ("failed again", "flexi/2 cannot be written: No space left"),
    ],
)
def test_errors_leave_nothing_behind(folder, case, message):
    assert message in json.loads((folder / "errors.json").read_text())[case]


def test_other_backends_are_refused(folder, monkeypatch):
    run = load_run(folder / "elastic")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="needs the TensorFlow backend, and Keras runs on jax"):
        write_serving(run, folder / "new")
    assert not (folder / "new").exists()
