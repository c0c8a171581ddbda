"""Exported artifacts as classifiers: any length, labels of their own, the same commands."""

import csv
import dataclasses
import json
import shutil
import sys

import keras
import numpy as np
import pytest
import soundfile
from helpers import (
    CLASSES,
    SAMPLES,
    randomize,
    run_python,
    softmax,
    tiny_saved_model,
    tiny_tflite,
    weights,
)
from typer.testing import CliRunner

from keras_flexast import ElasticAST, cli, evaluate_run
from keras_flexast.inference import load_classifier
from keras_flexast.inference.artifacts import (
    Artifact,
    FileScores,
    artifact_texts,
    file_scores,
    is_artifact,
    load_artifact,
    load_artifacts,
    read_texts,
)
from keras_flexast.inference.classifier import ArtifactClassifier
from keras_flexast.inference.timeline import artifact_timeline, cut_windows, run_timeline
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.audio import AudioError, read_audio
from tf_data_pipelines.clips import Clip
from tf_data_pipelines.settings import DataWarning, FbankSettings, PackSettings

RATE, SECONDS = 16000, 0.5
EXPORT = """
    import sys
    from keras_flexast.export import write_tflite
    from keras_flexast.runs import load_run
    run = load_run(sys.argv[1] + "/run")
    write_tflite(run, sys.argv[1] + "/16.tflite", patch_size=16)
"""


def flexast(*arguments):
    """(exit code, stdout, message) of `flexast ARGUMENTS`, as `main` would end it."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    expected = (ValueError, OSError, ImportError, RuntimeError, SystemExit, type(None))
    assert isinstance(result.exception, expected), result.exception
    return result.exit_code, result.stdout, f"{result.exception} {result.stderr}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of tiny artifacts."""
    folder = tmp_path_factory.mktemp("tiny")
    card = {
        "precision": "int8", "multi_label": False, "fbank": {"sample_rate": 8000},
        "patch_sizes": {"serving_default": [16, 24]},
    }  # fmt: skip
    tiny_tflite(folder / "one.tflite", {"serving_default": 0}, card=card)
    tiny_tflite(folder / "two.tflite", {"patch_8": 8, "patch_16x24": 16})
    for version, seed in ((9, 9), (10, 10)):
        tiny_saved_model(folder / "serving" / str(version), seed)
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run of one block, its exports, and sounds: a tone each, ogg at 44.1 kHz."""
    folder = tmp_path_factory.mktemp("real")
    keras.utils.set_random_seed(1)
    model = randomize(ElasticAST(3, "nano", depth=1), scale=0.2)
    (folder / "run").mkdir()
    patches, fbank = model.patch_settings((8, 16)), FbankSettings(mean=-8.0, std=4.0)
    packing = PackSettings(rows=2, row_length=256)
    run = Run(model, fbank, patches=patches, packing=packing, classes=CLASSES, clip_seconds=SECONDS)
    save_run(run, folder / "run")
    run_python(EXPORT, folder, backend="tensorflow")
    rng = np.random.default_rng(4)
    (folder / "sounds").mkdir()
    for number, seconds in enumerate((0.3, 0.5, 0.9, 1.7, 0.4, 0.5, 0.2, 0.5, 0.7)):
        time = np.arange(round(44100 * seconds)) / 44100
        sound = 0.3 * np.sin(2 * np.pi * 150 * 1.6**number * time) + rng.normal(0, 0.01, len(time))
        soundfile.write(folder / "sounds" / f"{number}.ogg", np.stack([sound, sound], 1), 44100)
    return folder


def noise(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 0.1, length).astype("float32") for length in lengths]


def test_a_short_clip_is_filled_up_and_a_long_one_is_the_mean_of_windows(tiny):
    artifact = load_artifact(tiny / "one.tflite")
    short, whole, long = noise(400, SAMPLES, 2 * SAMPLES + 300)
    matrix = weights(0)
    starts = (0, 500, 1000, 1300)  # half a window apart, the last up to the end
    expected = [
        softmax(short @ matrix[:400]),
        softmax(whole @ matrix),
        np.mean([softmax(long[start : start + SAMPLES] @ matrix) for start in starts], 0),
    ]
    np.testing.assert_allclose(artifact.scores([short, whole, long]), expected, atol=1e-5)
    assert artifact.scores([]).shape == (0, 3)


@pytest.mark.parametrize("name", ["one.tflite", "serving"])
def test_a_clips_scores_do_not_depend_on_its_company(tiny, name, monkeypatch):
    monkeypatch.setattr("keras_flexast.inference.windows.BATCH_SAMPLES", 3 * SAMPLES)
    artifact = load_artifact(tiny / name)
    clips = noise(700, 300, SAMPLES, 20, 999, 300, 500)
    alone = [artifact.scores([clip])[0] for clip in clips]
    np.testing.assert_allclose(artifact.scores(clips), alone, atol=1e-6)
    assert np.ptp(alone, axis=0).min() > 0.1


def test_a_real_artifact_hears_a_long_clip_in_windows(real):
    artifact, samples = load_artifact(real / "16.tflite"), round(SECONDS * RATE)
    assert artifact.samples == samples and artifact.classes == CLASSES
    (clip,) = noise(2 * samples)
    windows = [clip[start : start + samples] for start in (0, samples // 2, samples)]
    expected = artifact.scores(windows).mean(0)
    np.testing.assert_allclose(artifact.scores([clip])[0], expected, atol=1e-6)


def test_an_artifact_hears_a_short_clip_alone_as_its_run_does(real, tmp_path):
    files = sorted((real / "sounds").iterdir())
    short = [file for file in files if len(read_audio(file)) <= SECONDS * RATE]
    assert len(short) == 6
    found = {}
    for path in ("run", "16.tflite"):
        code, out, message = flexast("predict", real / path, *short, "--top", 3, "--json")
        assert code == 0, message
        found[path] = [
            {one["label"]: one["score"] for one in answer["top"]} for answer in json.loads(out)
        ]
    for alone, exported in zip(found["run"], found["16.tflite"], strict=True):
        assert exported == pytest.approx(alone, abs=1e-4)
    labels = [max(scores, key=scores.get) for scores in found["run"]]
    for file, label in zip(short, labels, strict=True):
        (tmp_path / label).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / label)
    code, out, message = flexast(
        "evaluate", real / "16.tflite", tmp_path, "--split", "all", "--json"
    )
    assert code != 0 or json.loads(out)[0]["value"] == 1.0, message
    artifact, (clip,) = load_artifact(real / "16.tflite"), noise(3000)
    filled = np.pad(clip, [0, 5000])
    assert artifact.takes_length
    assert np.abs(artifact.scores([clip]) - artifact.scores([filled])).max() > 1e-3


def test_an_artifact_says_what_it_is(tiny):
    one = load_artifact(tiny / "one.tflite")
    assert (one.classes, one.samples, one.sample_rate) == (CLASSES, SAMPLES, 8000)
    assert (one.patch_size, one.precision, one.multi_label) == ("16x24", "int8", False)
    served = load_artifact(tiny / "serving")
    assert served.path.name == "10" and served.samples is None and served.patch_size is None
    (clip,) = noise(SAMPLES)
    np.testing.assert_allclose(served.scores([clip])[0], softmax(clip @ weights(10)), atol=1e-5)
    for name, known in {"one.tflite": True, "serving": True, "no.onnx": True, ".": False}.items():
        assert is_artifact(tiny / name) == known
    assert not is_artifact(tiny / "no") and not is_artifact(tiny / "x.wav")


def test_texts_are_read_as_they_were_written():
    classes, description = ("a b", "Büro", "ç,d"), {"multi_label": None, "patch_sizes": {}}
    texts = artifact_texts(classes, description)
    assert list(texts) == ["labels.txt", "artifact.json"]
    assert read_texts({**texts, "other.txt": "x"}) == (classes, description)
    assert read_texts({}) == ((), {})
    for damaged in ("{", "[]"):
        with pytest.raises(ValueError, match=r"artifact\.json in the artifact is damaged"):
            read_texts({**texts, "artifact.json": damaged})


def test_files_that_have_no_scores_are_named(tiny, tmp_path):
    artifact = load_artifact(tiny / "serving")
    (tmp_path / "bad.wav").write_bytes(b"loud")
    for name, length in (("fine", SAMPLES), ("long", SAMPLES + 1)):
        soundfile.write(tmp_path / f"{name}.wav", noise(length)[0], RATE, subtype="FLOAT")
    paths = [tmp_path / f"{name}.wav" for name in ("long", "bad", "fine")]
    found = file_scores(artifact, paths)
    assert found.paths == [str(paths[2])]
    assert [path for path, _ in found.rejected] == [str(path) for path in paths[:2]]
    assert "more than 1000 samples." in found.rejected[0][1]
    np.testing.assert_allclose(found.scores, artifact.scores(noise(SAMPLES)), atol=1e-6)
    part = Clip(str(tmp_path / "long.wav"), (0,), "test", stop=SAMPLES / RATE)
    one = file_scores(artifact, [part])
    assert one.paths == [part.name]
    np.testing.assert_allclose(one.scores, artifact.scores([read_audio(paths[0])[:SAMPLES]]))
    assert file_scores(artifact, paths[:2]).scores.shape == (0, 3)
    with pytest.raises(ValueError, match=r"serving_default\) has no embeddings"):
        artifact.embeddings(noise(SAMPLES))


def test_signatures_are_chosen_by_name(tiny):
    (clip,) = noise(SAMPLES)
    found = load_artifacts(tiny / "two.tflite")
    assert {name: one.patch_size for name, one in found.items()} == {
        "patch_8": "8", "patch_16x24": "16x24"
    }  # fmt: skip
    for name, seed in {"patch_8": 8, "patch_16x24": 16}.items():
        expected = softmax(clip @ weights(seed))
        artifact = load_artifact(tiny / "two.tflite", name, threads=1)
        np.testing.assert_allclose(artifact.scores([clip])[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="several signatures, patch_16x24, patch_8"):
        load_artifact(tiny / "two.tflite")
    with pytest.raises(ValueError, match="no signature 'patch_32'; it has patch_16x24, patch_8"):
        load_artifact(tiny / "two.tflite", "patch_32")


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_tensorflows_own_interpreter_does_as_well(tiny, monkeypatch):
    expected = load_artifact(tiny / "one.tflite").scores(noise(SAMPLES, 70))
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    scores = load_artifact(tiny / "one.tflite").scores(noise(SAMPLES, 70))
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_onnx_is_run_by_onnxruntime(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    helper, numbers = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("MatMul", ["waveform", "matrix"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("waveform", numbers, [1, SAMPLES])],
        [helper.make_tensor_value_info("scores", numbers, [1, 3])],
        [onnx.numpy_helper.from_array(weights(0), "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "a.onnx")
    (tmp_path / "a.labels.txt").write_text("\n".join(CLASSES))
    clips = noise(SAMPLES, SAMPLES, seed=2)
    scores = load_artifact(tmp_path / "a.onnx").scores(clips)
    np.testing.assert_allclose(scores, softmax(np.stack(clips) @ weights(0)), atol=1e-5)
    (tmp_path / "a.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"a\.onnx cannot be loaded"):
        load_artifact(tmp_path / "a.onnx")


def test_what_cannot_be_loaded_is_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.tflite does not exist"):
        load_artifact(tmp_path / "no.tflite")
    (tmp_path / "x.txt").touch()
    for path in (tmp_path / "x.txt", tmp_path):
        with pytest.raises(ValueError, match=r"neither a SavedModel folder nor a \.tflite"):
            load_artifact(path)
    (tmp_path / "bad.tflite").write_bytes(b"not a model")
    (tmp_path / "bad.labels.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"bad.tflite cannot be loaded"):
        load_artifact(tmp_path / "bad.tflite")
    bare = tiny_tflite(tmp_path / "bare.tflite", {"serving_default": 0}, labels=())
    with pytest.raises(ValueError, match=r"no labels. Write one class a line into .*bare.labels"):
        load_artifact(bare)
    (tmp_path / "bare.labels.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="has 3 scores and 2 labels"):
        load_artifact(bare)
    (tmp_path / "bare.labels.txt").write_text("a\nb\nc d\n")
    assert load_artifact(bare).classes == ("a", "b", "c d")
    unlabeled = shutil.copytree(tiny / "serving" / "9", tmp_path / "unlabeled")
    (unlabeled / "assets" / "labels.txt").unlink()
    with pytest.raises(ValueError, match=r"no labels. .*assets/labels.txt"):
        load_artifact(unlabeled)
    (unlabeled / "fingerprint.pb").write_bytes(b"\x09")  # TensorFlow logs a traceback, no more
    with pytest.raises(ValueError, match=r"unlabeled cannot be loaded: .* export it again"):
        load_artifact(unlabeled)


def test_what_fails_while_it_runs_is_named(tmp_path):
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([None, None], name="waveform")])
    def serve(waveform):
        tf.debugging.Assert(tf.shape(waveform)[0] > 9, ["too few"])
        return {"scores": tf.ensure_shape(waveform[:, :3], [None, 3])}

    tf.saved_model.save(tf.Module(), str(tmp_path), {"serving_default": serve})
    (tmp_path / "assets" / "labels.txt").write_text("a\nb\nc\n")
    artifact = load_artifact(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be run: .*$"):
        artifact.scores([np.ones(400, "float32")])


def test_a_refused_clip_is_reported_and_its_neighbors_are_scored(tiny, tmp_path):
    artifact = load_artifact(tiny / "serving")
    fine, long = noise(SAMPLES, SAMPLES + 1)
    scores, refused = artifact.answer([long, fine])
    assert refused == ("more than 1000 samples.", "")
    np.testing.assert_allclose(scores[1], artifact.scores([fine])[0], atol=1e-6)
    with pytest.raises(ValueError, match="refused clip 0: more than 1000 samples"):
        artifact.scores([long, fine])
    heard, short = ArtifactClassifier(artifact).predict_fitting([long, fine])
    assert ArtifactClassifier(artifact).predict_fitting([])[0].shape == (0,)
    assert heard.tolist() == [False, True]
    np.testing.assert_array_equal(short, scores[1:])
    for name, clip in (("fine", fine), ("long", long)):
        soundfile.write(tmp_path / f"{name}.wav", clip, RATE)
    code, out, message = flexast(
        "predict", tiny / "serving", tmp_path / "long.wav", tmp_path / "fine.wav",
        tmp_path / "no.wav", "--json",
    )  # fmt: skip
    assert code == 1 and "long.wav: more than 1000 samples." in message
    answer, *failed = json.loads(out)
    assert answer["file"].endswith("fine.wav")
    assert [one["file"].rsplit("/")[-1] for one in failed] == ["long.wav", "no.wav"]


def test_what_an_artifact_does_not_hear_is_said(tiny, tmp_path):
    """A SavedModel leaves out the rest of a clip; a file for phones goes on in windows."""
    fbank = FbankSettings(clip_ms=20.0)
    served = dataclasses.replace(load_artifact(tiny / "serving"), fbank=fbank)
    heard, cut = noise(700, 800)  # it hears 560 samples and may round to one more frame
    ArtifactClassifier(served).predict([heard, heard])
    message = r"1 of 2 clips are longer than the 0\.04 s that .*serving.* hears; the rest"
    with pytest.warns(DataWarning, match=message):
        ArtifactClassifier(served).predict([heard, cut])
    soundfile.write(tmp_path / "heard.wav", heard, RATE)
    soundfile.write(tmp_path / "cut.wav", cut, RATE)
    with pytest.warns(DataWarning, match=message):
        assert ArtifactClassifier(served).predict_files(tmp_path).scores.shape == (2, 3)
    phone = dataclasses.replace(load_artifact(tiny / "one.tflite"), fbank=fbank)
    assert load_artifact(tiny / "one.tflite").fbank.sample_rate == 8000
    ArtifactClassifier(phone).predict(noise(4000))


def test_scores_that_are_no_numbers_raise(tiny):
    artifact = load_artifact(tiny / "one.tflite")
    with pytest.raises(ValueError, match=r"serving_default\) gave NaN"):
        artifact.scores([np.full(SAMPLES, np.nan, "float32")])


def test_predict_prints_an_artifacts_own_scores(real, tiny):
    files = sorted((real / "sounds").iterdir())
    for path, size, signature, more in (
        (real / "16.tflite", "16", None, ()),
        (tiny / "two.tflite", "16x24", "patch_16x24", ("--patch-size", "16x24")),
    ):
        code, out, message = flexast("predict", path, *files, "--top", 3, "--json", *more)
        assert code == 0, message
        artifact = load_artifact(path, signature)
        expected = artifact.scores([read_audio(file) for file in files])
        answers = json.loads(out)
        assert [answer["file"] for answer in answers] == list(map(str, files))
        assert {answer["patch_size"] for answer in answers} == {size}
        for answer, scores in zip(answers, expected, strict=True):
            given = {one["label"]: one["score"] for one in answer["top"]}
            np.testing.assert_allclose([given[name] for name in CLASSES], scores, atol=2e-6)


def test_evaluate_measures_the_artifact_itself(real, tiny, tmp_path):
    files = sorted((real / "sounds").iterdir())
    artifact = load_artifact(tiny / "two.tflite", "patch_8")
    best = file_scores(artifact, files).scores.argmax(1)
    best[[2, 5]] = (best[[2, 5]] + 1) % 3  # two that it gets wrong
    for file, label in zip(files, best, strict=True):
        (tmp_path / "data" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "data" / CLASSES[label])
    figure = tmp_path / "accuracy.png"
    code, out, message = flexast(
        "evaluate", tiny / "two.tflite", tmp_path / "data", "--split", "all", "--json",
        "--figure", figure,
    )  # fmt: skip
    assert code == 0, message
    results = {result["name"]: result for result in json.loads(out)}
    assert set(results) == {"8", "16x24"} and figure.read_bytes()[:4] == b"\x89PNG"
    assert results["8"]["value"] == pytest.approx(7 / 9) and results["8"]["clips"] == 9
    code, out, _ = flexast(
        "evaluate", tiny / "two.tflite", tmp_path / "data", "--split", "all", "--patch-sizes", "8"
    )
    assert code == 0 and "77.8 ± 12.8" in out and "16x24" not in out
    (tmp_path / "data" / "whistle").mkdir()
    shutil.copy(files[0], tmp_path / "data" / "whistle")
    code, _, message = flexast("evaluate", tiny / "one.tflite", tmp_path / "data")
    assert code != 0 and "the class(es) 'whistle'" in message and "low, middle, high" in message


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["predict", "{tiny}/one.tflite", "{wav}", "--resize", "pi"], "cannot be changed in"),
        (["predict", "{tiny}/one.tflite", "{wav}", "--full-length"], "cannot be changed in"),
        (
            ["evaluate", "{tiny}/one.tflite", "{real}", "--frame-shift-ms", "20"],
            "cannot be changed in",
        ),
        (["predict", "{tiny}/two.tflite", "{wav}"], "several signatures"),
        (["predict", "{tiny}/two.tflite", "{wav}", "--patch-size", "9"], "no patch size 9; it has"),
        (["evaluate", "{tiny}/two.tflite", "{real}", "--patch-sizes", "8,9"], "no patch size 9"),
        (
            ["predict", "{real}/16.tflite", "{wav}", "--patch-size", "8"],
            "no patch size 8; it has 16",
        ),
        (["predict", "{real}/run", "{wav}", "--window", "1"], "belong to --timeline"),
        (["predict", "{real}/run", "{wav}", "{wav}", "--timeline"], "one recording, not 2"),
        (["predict", "{real}/16.tflite", "{wav}", "--timeline", "--window", "2"], "takes 0.5 s"),
        (["predict", "{real}/run", "{wav}", "--timeline", "--window", "0.1"], "larger than"),
        (["predict", "{real}/run", "{wav}", "--timeline", "--hop", "1.1"], "window of 1 s, or so"),
        (["predict", "{real}/run", "{wav}", "--timeline", "--hop", "1e-6"], "must be from 0.01"),
        (["predict", "{real}/run", "{tiny}/no.wav", "--timeline"], "no.wav does not exist"),
    ],
)
def test_wrong_uses_are_explained(tiny, real, arguments, text):
    values = {"tiny": tiny, "real": real, "wav": real / "sounds" / "1.ogg"}
    code, _, message = flexast(*(argument.format(**values) for argument in arguments))
    assert code != 0 and text in " ".join(message.replace("│", " ").split()), message


@pytest.mark.parametrize(("total", "hop"), [(17, 4), (23, 4), (40, 3), (7, 4), (3, 4), (31, 9)])
def test_windows_are_a_hop_apart_and_reach_the_end(total, hop):
    window, sound = 7, np.arange(total, dtype="float32")
    starts = list(range(0, max(1, total - window + 1), hop))
    if starts[-1] + window < total:
        starts.append(total - window)
    for block in (1, 5, 100):
        blocks = [sound[at : at + block] for at in range(0, total, block)]
        found = list(cut_windows(blocks, window, hop))
        assert [start for start, _ in found] == starts
        for start, waveform in found:
            np.testing.assert_array_equal(waveform, sound[start : start + window])


def test_a_runs_timeline_is_its_predictions_on_the_cut_files(real, tmp_path, monkeypatch):
    monkeypatch.setattr("tf_data_pipelines.audio.BLOCK_FRAMES", 9973)
    monkeypatch.setattr("keras_flexast.inference.timeline.BATCH_TOKENS", 3 * 9 * 4)  # three windows
    tones = [read_audio(file) for file in sorted((real / "sounds").iterdir())]
    recording = np.concatenate(tones)[: round(3.9 * RATE)]
    soundfile.write(tmp_path / "long.wav", recording, RATE, subtype="FLOAT")
    code, out, message = flexast(
        "predict", real / "run", tmp_path / "long.wav", "--timeline", "--window", 0.8,
        "--hop", 0.5, "--timeline-out", tmp_path / "line", "--patch-size", "16x24", "--json",
    )  # fmt: skip
    assert code == 0, message
    with open(tmp_path / "line.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["start", "end", *CLASSES]
    rows = np.array(rows, "float64")
    np.testing.assert_allclose(rows[:, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.1], atol=1e-3)
    np.testing.assert_allclose(rows[:, 1] - rows[:, 0], 0.8, atol=1e-3)
    assert (tmp_path / "line.png").read_bytes()[:4] == b"\x89PNG"
    cuts = []
    for start, end in rows[:, :2]:
        cuts.append(tmp_path / f"{start}.wav")
        piece = recording[round(start * RATE) : round(end * RATE)]
        soundfile.write(cuts[-1], piece, RATE, subtype="FLOAT")
    code, answers, message = flexast(
        "predict", real / "run", *cuts, "--patch-size", "16x24", "--top", 3, "--json"
    )
    assert code == 0, message
    for row, answer in zip(rows, json.loads(answers), strict=True):
        scores = {one["label"]: one["score"] for one in answer["top"]}
        np.testing.assert_allclose(row[2:], [scores[name] for name in CLASSES], atol=1e-5)
    assert np.ptp(rows[:, 2:], axis=0).max() > 1e-3  # the windows do differ
    (answer,) = json.loads(out)
    assert answer["windows"] == 8 and answer["csv"] == str(tmp_path / "line.csv")
    means = dict(zip(CLASSES, rows[:, 2:].mean(0), strict=True))
    for one in answer["top"]:
        assert one["score"] == pytest.approx(means[one["label"]], abs=1e-5)


def test_an_artifacts_timeline_has_its_own_windows(real, tmp_path):
    recording = np.concatenate([read_audio(real / "sounds" / f"{n}.ogg") for n in (2, 3)])
    soundfile.write(tmp_path / "long.wav", recording, RATE, subtype="FLOAT")
    artifact = load_artifact(real / "16.tflite")
    line = artifact_timeline(artifact, tmp_path / "long.wav")
    np.testing.assert_allclose(np.diff(line.starts)[:-1], SECONDS / 2)
    assert line.ends[-1] == pytest.approx(len(recording) / RATE) and not line.multi_label
    np.testing.assert_allclose(line.overall(), line.scores.mean(0))
    for start, scores in zip(line.starts, line.scores, strict=True):
        piece = recording[round(start * RATE) :][: artifact.samples]
        np.testing.assert_allclose(scores, artifact.scores([piece])[0], atol=1e-6)


def test_several_labels_are_heard_anywhere_and_a_short_recording_is_one_window(real):
    run = dataclasses.replace(load_run(real / "run"), multi_label=True)
    line = run_timeline(run, real / "sounds" / "3.ogg", patch_size=16, window=0.5, hop=0.25)
    np.testing.assert_array_equal(line.overall(), line.scores.max(0))
    assert len(line.starts) == 6
    short = run_timeline(run, real / "sounds" / "3.ogg", patch_size=16, window=5.0)
    assert short.starts.tolist() == [0] and short.ends[0] == pytest.approx(1.7, abs=1e-3)


def test_a_recording_shorter_than_a_patch_is_scored_as_a_file(real, tmp_path):
    path = tmp_path / "short.wav"
    soundfile.write(path, read_audio(real / "sounds" / "3.ogg")[:2000], RATE, subtype="FLOAT")
    classifier = load_classifier(real / "run", 16)
    line = classifier.timeline(path)
    np.testing.assert_allclose(line.scores, classifier.predict_files(path).scores, atol=1e-5)
    soundfile.write(path, read_audio(real / "sounds" / "3.ogg")[:300], RATE, subtype="FLOAT")
    for one in (classifier, load_classifier(real / "16.tflite")):
        with pytest.raises(AudioError, match=r"short\.wav lasts 0\.0187 s; at least 25 ms"):
            one.timeline(path)


def test_the_shortest_clip_is_one_window(real, tiny, tmp_path):
    """In files and in memory, of runs and of artifacts, at each sample rate."""
    run = load_run(real / "run")
    longer = dataclasses.replace(run, fbank=dataclasses.replace(run.fbank, window_ms=50.0))
    for classifier, rate, least in (
        (ArtifactClassifier(load_artifact(tiny / "one.tflite")), 8000, 200),
        (load_classifier(longer), RATE, 800),
    ):
        assert classifier.min_samples == least
        clip, path = noise(least)[0], tmp_path / "clip.wav"
        soundfile.write(path, clip, rate, subtype="FLOAT")
        expected = classifier.predict([clip])
        np.testing.assert_allclose(classifier.predict_files(path).scores, expected, atol=1e-5)
        soundfile.write(path, clip[1:], rate, subtype="FLOAT")
        ((_, reason),) = classifier.predict_files(path).rejected
        assert "at least" in reason
        with pytest.raises(ValueError, match=f"{least - 1} samples; at least {least} are needed"):
            classifier.predict([clip[1:]])


def test_a_clip_under_the_window_of_an_artifact_is_left_out_of_its_evaluation(tmp_path):
    card = {"fbank": {"window_ms": 50.0}}
    path = tiny_tflite(tmp_path / "one.tflite", {"serving_default": 0}, card=card)
    for number, clip in enumerate(noise(*[2000] * 6, 640)):
        split = "train" if number < 3 else "test"
        file = tmp_path / "data" / split / CLASSES[number % 3] / f"{number}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, clip, RATE)
    with pytest.warns(DataWarning, match="at least 50 ms"):
        (found,) = evaluate_run(path, tmp_path / "data")
    assert found["clips"] == 3


def test_counts_are_positive(tiny):
    with pytest.raises(ValueError, match="threads=0 must be a positive number"):
        load_artifact(tiny / "one.tflite", threads=0)
    with pytest.raises(ValueError, match="k=0 must be a positive number"):
        FileScores(np.zeros((1, 2)), ["a.wav"]).top(("x", "y"), 0)


def test_a_long_silence_does_not_end_a_timeline(tmp_path):
    """Though an artifact refuses silence, and a whole batch of windows has nothing else."""

    def refuse_silence(batch, lengths):
        silent = np.ptp(batch, axis=1) == 0
        scores = np.where(silent[:, None], 0, np.float32([[0.75, 0.25]]))
        return scores, ["silent" if one else "" for one in silent]

    artifact = Artifact(
        tmp_path / "some", "serving_default", classes=("a", "b"), samples=None, sample_rate=1000,
        multi_label=None, patch_size=None, precision=None, run=refuse_silence,
    )  # fmt: skip
    sound = np.random.default_rng(0).normal(0, 0.1, 60000)
    sound[5000:50000] = 0
    soundfile.write(tmp_path / "a.wav", sound, 1000)
    line = artifact_timeline(artifact, tmp_path / "a.wav", window=1.0)
    assert not line.multi_label and line.scores[0].sum() == 1 and line.scores[50].sum() == 0
    soundfile.write(tmp_path / "a.wav", np.r_[0.1, np.zeros(60000)], 1000)
    quiet = dataclasses.replace(
        artifact, run=lambda batch, _: (0 * batch[:, :2], ["no"] * len(batch))
    )
    with pytest.raises(ValueError, match=r"refused .*a\.wav: no"):
        artifact_timeline(quiet, tmp_path / "a.wav", window=1.0)
