"""Mobile files: the scores in memory, within what each precision may lose; LiteRT runs them."""

import json
import pathlib

import keras
import numpy as np
import pytest
from helpers import IN_PLACE, run_python

from keras_flexast import ElasticAST, FlexiAST
from keras_flexast.conversion.convert import convert_run
from keras_flexast.export import write_multi_tflite, write_tflite
from keras_flexast.export.tflite_metadata import read_metadata
from keras_flexast.inference import load_classifier
from keras_flexast.inference.artifacts import load_artifact
from keras_flexast.inference.runtimes import length_signature
from keras_flexast.inference.scoring import fixed_scores
from keras_flexast.models import PackedAST
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.fbank import features
from tf_data_pipelines.settings import FbankSettings, PackSettings

SECONDS, SAMPLES = 0.5, 8000
AST, AST_SAMPLES = pathlib.Path(__file__).parent / "data" / "hf_ast_overlap", 40960  # 2.56 s
CLASSES = ("one", "two", "three", "four", "five")
OUTPUTS = {  # run, patch size, frame shift in ms, options
    "float32": ("run", 16, None, {}),
    "features": ("run", (16, 24), 20.0, {"input": "features"}),
    "ast": ("ast", 16, None, {}),  # converted: stride 10, clips filled up
    "cls": ("cls", (24, 12), 20.0, {}),  # the papers' policies
    "mean": ("mean", 24, None, {}),
    "single": ("run", 16, None, {"with_length": False}),
    "float16": ("run", 16, None, {"precision": "float16"}),
    "dynamic": ("run", 16, None, {"precision": "dynamic"}),
    "int8": ("run", 16, None, {"precision": "int8"}),
}
MULTI = {"patch_8": 8, "patch_16x24": (16, 24)}
pytestmark = IN_PLACE
TOLERANCES = {
    "float32": 1e-4, "cls": 1e-4, "mean": 1e-4, "ast": 1e-4,
    "float16": 2e-3, "dynamic": 3e-2, "int8": 0.1,
}  # fmt: skip

WRITE = """
    import json, os, pathlib, sys
    import numpy as np
    import keras_flexast.export.tflite as mobile
    from keras_flexast.export import FixedOptions, write_multi_tflite, write_tflite
    from keras_flexast.runs import load_run
    folder = pathlib.Path(sys.argv[1])
    runs = {name: load_run(folder / name) for name in ("run", "ast", "cls", "mean")}
    sound = np.load(folder / "sound.npy")
    for name, (run, patch_size, shift, options) in json.loads(sys.argv[2]).items():
        options["calibration"] = iter(sound) if name == "int8" else None
        path = folder / f"{name}.tflite"
        options = FixedOptions(frame_shift_ms=shift, **options)
        assert write_tflite(runs[run], path, patch_size=patch_size, options=options) == path
    run = runs["run"]
    write_multi_tflite(run, folder / "multi.tflite", patch_sizes=json.loads(sys.argv[3]))

    def refuse(patch_size, file="new.tflite", overwrite=False, **options):
        try:
            options = FixedOptions(**options)
            write_tflite(
                run, folder / file, patch_size=patch_size, options=options, overwrite=overwrite
            )
        except Exception as error:
            return [type(error).__name__, str(error)]

    before = sorted(os.listdir(folder))
    broken = sound.copy()
    broken[1, 7] = np.nan
    errors = {
        "precision": refuse(16, precision="int4"),
        "input": refuse(16, input="mp3"),
        "existing": refuse(16, "float32.tflite"),
        "large patch": refuse((16, 49)),
        "no seconds": refuse(16, seconds=-1),
        "no calibration": refuse(16, precision="int8"),
        "empty calibration": refuse(16, precision="int8", calibration=[]),
        "short calibration": refuse(16, precision="int8", calibration=sound[:, :-1]),
        "one waveform": refuse(16, precision="int8", calibration=sound[0]),
        "nan": refuse(16, precision="int8", calibration=broken),
    }
    def fail(*_, **__):
        raise RuntimeError("halfway")
    mobile.attach_metadata = fail
    errors["overwriting"] = refuse(16, "float32.tflite", input="features", overwrite=True)
    assert sorted(os.listdir(folder)) == before, os.listdir(folder)
    (folder / "errors.json").write_text(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def sound():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(3, SAMPLES)) * [[0.3], [0.01], [0]]).astype("float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sound):
    folder = tmp_path_factory.mktemp("mobile")
    keras.utils.set_random_seed(0)
    small = {"size": "nano", "depth": 1, "grid": (8, 64)}
    models = {
        "run": ElasticAST(len(CLASSES), "nano", depth=2),
        "cls": FlexiAST(
            len(CLASSES), **small, pooling="cls_distillation", remainder="crop", position="grid"
        ),
        "mean": PackedAST(
            len(CLASSES), **small, pooling="mean", prefix_tokens=1, remainder="pad", position="grid"
        ),
    }
    runs = {"ast": convert_run(AST).run}
    for name, model in models.items():
        kernel = model.get_layer("head").kernel
        kernel.assign(4 * kernel)  # scores far apart, as of a trained model
        runs[name] = Run(
            model,
            FbankSettings(noise_floor_dbfs=-60.0 if name == "mean" else None),
            patches=model.patch_settings(),
            packing=PackSettings(),
            classes=CLASSES,
            clip_seconds=SECONDS,
        )
    for name, run in runs.items():
        (folder / name).mkdir()
        save_run(run, folder / name)
    np.save(folder / "sound.npy", sound)
    sizes = list(MULTI.values())
    run_python(WRITE, folder, json.dumps(OUTPUTS), json.dumps(sizes), backend="tensorflow")
    return folder


def interpret(path):
    """LiteRT's interpreter of a file."""
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(model_path=str(path))
    interpreter.allocate_tensors()
    return interpreter


def scores_of(path, inputs):
    runner = interpret(path).get_signature_runner("serving_default")
    (name,) = runner.get_input_details()
    return np.concatenate([runner(**{name: one[None]})["scores"] for one in inputs])


def in_memory(folder, name, waveforms):
    run, patch_size, shift, _ = OUTPUTS[name]
    return fixed_scores(load_run(folder / run), patch_size, waveforms, frame_shift_ms=shift)


@pytest.mark.parametrize("name, most", TOLERANCES.items())
def test_scores_equal_those_in_memory(folder, sound, name, most):
    if name == "ast":
        sound = np.pad(sound, [[0, 0], [0, AST_SAMPLES - SAMPLES]])
    expected = in_memory(folder, name, sound)
    assert np.ptp(expected, axis=0).max() > 4 * most  # the clips do differ
    scores = scores_of(folder / f"{name}.tflite", sound)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=most)


@pytest.mark.parametrize("name, most", TOLERANCES.items())
def test_told_its_length_a_file_scores_the_clip_alone(folder, name, most):
    run, patch_size, shift, _ = OUTPUTS[name]
    classifier = load_classifier(folder / run, patch_size, frame_shift_ms=shift)
    runner = interpret(folder / f"{name}.tflite").get_signature_runner("with_length")
    samples = AST_SAMPLES if name == "ast" else SAMPLES
    rng = np.random.default_rng(1)
    clips = rng.normal(size=(5, samples)) * [[0.3], [0.01], [0.1], [0.03], [0.3]]
    clips = (clips + 0.02).astype("float32")
    lengths = [samples, samples // 2, 4001, 2500, 410]  # down to one frame
    alone = [clip[:length] for clip, length in zip(clips, lengths, strict=True)]
    expected = classifier.predict(alone)
    assert np.ptp(expected, axis=0).max() > 4 * most
    clips[3, 2500:] = np.nan
    for clip, length, scores in zip(clips, lengths, expected, strict=True):
        found = runner(waveform=clip[None], length=np.array([length], "int32"))["scores"]
        np.testing.assert_allclose(found[0], scores, rtol=0, atol=most)
    artifact = load_artifact(folder / f"{name}.tflite")  # is told it by itself
    np.testing.assert_allclose(artifact.scores(alone), expected, rtol=0, atol=most)


def test_a_file_without_lengths_hears_the_silence(folder):
    interpreter = interpret(folder / "single.tflite")
    assert list(interpreter.get_signature_list()) == ["serving_default"]
    assert list(interpret(folder / "features.tflite").get_signature_list()) == ["serving_default"]
    clip = np.random.default_rng(1).normal(0, 0.1, 4001).astype("float32")
    filled = np.pad(clip, [0, SAMPLES - len(clip)])[None]
    scores = load_artifact(folder / "single.tflite").scores([clip])
    np.testing.assert_allclose(scores, in_memory(folder, "single", filled), rtol=0, atol=1e-4)
    alone = load_classifier(folder / "run", 16).predict([clip])
    assert np.abs(scores - alone).max() > 1e-2


def test_media_pipe_takes_the_file_without_lengths_alone(folder):
    pytest.importorskip("mediapipe")
    from mediapipe.tasks.python import audio
    from mediapipe.tasks.python.components.containers.audio_data import AudioData

    with pytest.raises((ValueError, RuntimeError), match="a single subgraph"):
        audio.AudioClassifier.create_from_model_path(str(folder / "float32.tflite"))
    clip = np.random.default_rng(1).normal(0, 0.1, SAMPLES).astype("float32")
    with audio.AudioClassifier.create_from_model_path(str(folder / "single.tflite")) as classifier:
        (result,) = classifier.classify(AudioData.create_from_array(clip, 16000))
    found = {one.category_name: one.score for one in result.classifications[0].categories}
    (expected,) = scores_of(folder / "single.tflite", clip[None])
    assert found == pytest.approx(dict(zip(CLASSES, expected, strict=True)), abs=1e-6)


def test_features_in(folder, sound):
    fbank = FbankSettings(frame_shift_ms=20.0)
    scores = scores_of(folder / "features.tflite", features(sound, fbank).numpy())
    np.testing.assert_allclose(scores, in_memory(folder, "features", sound), rtol=0, atol=1e-4)


def test_lower_precision_makes_smaller_files(folder):
    sizes = {name: (folder / f"{name}.tflite").stat().st_size for name in OUTPUTS}
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["dynamic"] < 0.43 * sizes["float32"]  # the position table stays float
    assert sizes["int8"] < 0.43 * sizes["float32"]


def test_both_signatures_share_the_weights(folder):
    sizes = [(folder / f"{name}.tflite").stat().st_size for name in ("float32", "single")]
    assert sizes[0] < 1.15 * sizes[1]


@pytest.mark.parametrize("name", ["dynamic", "int8"])
def test_the_front_end_stays_float(folder, name):
    interpreter = interpret(folder / f"{name}.tflite")
    small = {one["index"] for one in interpreter.get_tensor_details() if one["dtype"] == np.int8}
    operations = [op for op in interpreter._get_ops_details() if op["op_name"] != "DELEGATE"]
    names = [op["op_name"] for op in operations]
    uses_int8 = [bool(small & set(op["inputs"])) for op in operations]
    end = names.index("LOG")
    assert "RFFT2D" in names[:end]
    assert not any(uses_int8[:end])
    dense = [use for op, use in zip(names, uses_int8, strict=True) if op == "FULLY_CONNECTED"]
    assert sum(dense) > 12  # two blocks of six, and the embedding


@pytest.mark.parametrize("name", [*OUTPUTS, "multi"])
def test_built_in_operations_only_and_aligned_constants(folder, name):
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs((folder / f"{name}.tflite").read_bytes(), 0)
    codes = [model.OperatorCodes(index) for index in range(model.OperatorCodesLength())]
    assert codes
    assert not [code.CustomCode() for code in codes if code.CustomCode()]
    assert schema.BuiltinOperator.CUSTOM not in {code.BuiltinCode() for code in codes}
    tables = [model.Buffers(index)._tab for index in range(model.BuffersLength())]
    starts = [table.Vector(table.Offset(4)) for table in tables if table.Offset(4)]
    assert not np.any(np.array(starts) % 16)


def test_one_file_of_several_patch_sizes_shares_weights(folder, sound):
    path = folder / "multi.tflite"
    interpreter = interpret(path)
    assert set(interpreter.get_signature_list()) == {*MULTI, *map(length_signature, MULTI)}
    run, length = load_run(folder / "run"), np.array([SAMPLES], "int32")
    for name, patch_size in MULTI.items():
        expected = fixed_scores(run, patch_size, sound)
        for signature, more in ((name, {}), (length_signature(name), {"length": length})):
            runner = interpreter.get_signature_runner(signature)
            scores = np.concatenate([runner(waveform=one[None], **more)["scores"] for one in sound])
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    assert path.stat().st_size < 1.4 * (folder / "float32.tflite").stat().st_size


def test_metadata(folder):
    found = read_metadata((folder / "float32.tflite").read_bytes())
    assert tuple(found["labels"]) == CLASSES
    assert found["artifact"]["precision"] == "float32"
    assert found["artifact"]["samples"] == SAMPLES
    assert FbankSettings.from_dict(found["artifact"]["fbank"]) == FbankSettings()
    assert found["subgraphs"][0]["input"]["sample_rate"] == 16000
    assert [graph["inputs"] for graph in found["subgraphs"]] == [
        ["waveform"],
        ["waveform", "length"],
    ]
    found = read_metadata((folder / "multi.tflite").read_bytes())
    names = [graph["name"] for graph in found["subgraphs"]]
    assert names == [*MULTI, *map(length_signature, MULTI)]
    assert found["artifact"]["patch_sizes"]["patch_16x24"] == [16, 24]


@pytest.mark.parametrize(
    "case, kind, message",
    [
        ("precision", "ValueError", "precision='int4' is unknown. Choose one of 'float32', 'flo"),
        ("input", "ValueError", "input='mp3' is unknown. Choose one of 'waveform', 'features'."),
        ("existing", "FileExistsError", "float32.tflite exists already"),
        ("large patch", "ValueError", "patch_size=16x49 is larger than the spectrogram of 0.5 s"),
        ("no seconds", "ValueError", "seconds=-1 must be a positive number"),
        ("no calibration", "ValueError", "calibration=None: precision='int8' measures its scales"),
        ("empty calibration", "ValueError", "calibration=[]: precision='int8' measures"),
        ("short calibration", "ValueError", "calibration[0] has the shape (7999,); expected (8000"),
        ("one waveform", "ValueError", "calibration[0] has the shape (); expected (8000,)"),
        ("nan", "ValueError", "calibration[1] holds nan; expected finite samples"),
        ("overwriting", "RuntimeError", "halfway"),
    ],
)
def test_errors_leave_nothing_behind(folder, case, kind, message):
    name, text = json.loads((folder / "errors.json").read_text())[case]
    assert name == kind
    assert message in text


@pytest.mark.parametrize(
    "write, size", [(write_tflite, "patch_size"), (write_multi_tflite, "patch_sizes")]
)
def test_other_backends_are_refused(folder, monkeypatch, write, size):
    run = load_run(folder / "run")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="needs the TensorFlow backend, and Keras runs on jax"):
        write(run, folder / "new.tflite", **{size: [16]})
    assert not list(folder.glob("new*"))
