"""Exported artefacts: the scores in memory, on runtimes that know nothing of this package."""

import json
import pathlib

import keras
import numpy as np
import pytest

from keras_flexast import ElasticAST
from keras_flexast.artefacts import load_artefact
from keras_flexast.convert import convert_run
from keras_flexast.export import export_run, fixed_scores
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.settings import FbankSettings, PackSettings, PatchSettings

SECONDS, SAMPLES = 0.5, 8000
AST, AST_SAMPLES = pathlib.Path(__file__).parent / "data" / "hf_ast_overlap", 40960  # 2.56 s
OUTPUTS = {  # run, patch size, frame shift in ms, resize
    "saved": ("run", 8, None, "pi"),
    "8.tflite": ("run", 8, None, "pi"),
    "16x24.tflite": ("run", (16, 24), 20.0, "pi"),
    "ast_saved": ("ast", 16, None, "pi"),  # converted, stride 10
    "ast_16x24.tflite": ("ast", (16, 24), None, "bilinear"),
}

# Export needs TensorFlow, so it has a process of its own: the tests run on every backend.
EXPORT = """
    import json, os, pathlib, sys
    from keras_flexast.export import export_run
    from keras_flexast.runs import load_run
    folder = pathlib.Path(sys.argv[1])
    runs = {name: load_run(folder / name) for name in ("run", "ast")}
    for name, (run, patch_size, shift, resize) in json.loads(sys.argv[2]).items():
        format = "tflite" if name.endswith(".tflite") else "saved_model"
        resized = runs[run].resized(resize)
        export_run(resized, patch_size, format, folder / name, frame_shift_ms=shift)
    run = runs["run"]

    def refuse(patch_size, format, out, **options):
        try:
            export_run(run, patch_size, format, folder / out, **options)
        except Exception as error:
            return [type(error).__name__, str(error)]

    before = sorted(os.listdir(folder))
    errors = {
        "existing folder": refuse(8, "saved_model", "saved"),
        "existing file": refuse(8, "tflite", "8.tflite"),
        "long patch": refuse((16, 49), "tflite", "new.tflite"),
        "high patch": refuse((129, 8), "saved_model", "new"),
        "short clip": refuse(8, "saved_model", "new", seconds=0.02),
        "no seconds": refuse(8, "saved_model", "new", seconds=0),
    }
    import keras_flexast.export
    def fail(*_, **__):
        raise RuntimeError("converter")
    keras_flexast.export.write_whole = fail
    errors["labels"] = refuse(8, "saved_model", "new")
    keras_flexast.export._write_saved_model = fail
    errors["writer"] = refuse(8, "tflite", "new.tflite")
    errors["overwriting"] = refuse(8, "saved_model", "saved", overwrite=True)
    assert sorted(os.listdir(folder)) == before, os.listdir(folder)
    (folder / "errors.json").write_text(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, python):
    folder = tmp_path_factory.mktemp("export")
    keras.utils.set_random_seed(0)
    run = Run(
        ElasticAST(5, "nano"),
        FbankSettings(),
        PatchSettings((8, 16)),
        PackSettings(),
        ("one", "two", "three", "four", "five"),
        clip_seconds=SECONDS,
    )
    for name, one in (("run", run), ("ast", convert_run(AST).run)):
        (folder / name).mkdir()
        save_run(one, folder / name)
    python(EXPORT, folder, json.dumps(OUTPUTS), backend="tensorflow")
    return folder


@pytest.fixture(scope="module")
def waveforms():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(3, SAMPLES)) * [[0.3], [0.01], [0]]).astype("float32")


def in_memory(folder, name, waveforms):
    run, patch_size, shift, resize = OUTPUTS[name]
    return fixed_scores(load_run(folder / run).resized(resize), patch_size, waveforms, shift)


@pytest.mark.parametrize("name", OUTPUTS)
def test_exported_scores_equal_those_in_memory(folder, waveforms, name):
    artefact = load_artefact(folder / name)
    samples = artefact.samples
    assert samples == (SAMPLES if OUTPUTS[name][0] == "run" else AST_SAMPLES)
    waveforms = np.pad(waveforms, [[0, 0], [0, samples - SAMPLES]])
    expected = in_memory(folder, name, waveforms)
    scores = artefact.scores(waveforms)
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
    tolerance = 1e-4 if name.endswith(".tflite") else 1e-5
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)
    assert np.ptp(scores, axis=0).max() > 10 * tolerance  # the clips do differ


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name.endswith(".tflite")])
def test_tflite_uses_builtin_operations_only(folder, name):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter
    names = {op["op_name"] for op in interpreter(str(folder / name))._get_ops_details()}
    assert "RFFT2D" in names  # the front end is inside
    assert all(name.isupper() for name in names - {"DELEGATE"}), names
    assert "CUSTOM" not in names


def test_labels_lie_beside(folder):
    for path in ("saved/assets/labels.txt", "8.labels.txt", "16x24.labels.txt"):
        assert (folder / path).read_text().split() == ["one", "two", "three", "four", "five"]


def test_a_saved_model_needs_tensorflow_only(folder, waveforms, python):
    np.save(folder / "waveforms.npy", waveforms)
    code = """
        import sys
        import numpy as np, tensorflow as tf
        serve = tf.saved_model.load(sys.argv[1] + "/saved")
        serve = serve.signatures["serving_default"]
        waveforms = np.load(sys.argv[1] + "/waveforms.npy")
        for batch in (waveforms, waveforms[:1]):
            scores = serve(waveform=tf.constant(batch))["scores"].numpy()
            np.save(f"{sys.argv[1]}/scores_{len(batch)}.npy", scores)
    """
    blocked = ("keras_flexast", "tf_data_pipelines", "keras", "jax")
    python(code, folder, backend="tensorflow", blocked=blocked)
    expected = in_memory(folder, "saved", waveforms)
    for clips in (3, 1):
        scores = np.load(folder / f"scores_{clips}.npy")
        np.testing.assert_allclose(scores, expected[:clips], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case, kind, message",
    [
        ("existing folder", "FileExistsError", "saved exists already"),
        ("existing file", "FileExistsError", "8.tflite exists already"),
        ("long patch", "ValueError", "patch_size=16x49 is larger than the spectrogram of 0.5 s"),
        ("high patch", "ValueError", "patch_size=129x8 is larger"),
        ("short clip", "ValueError", "0.02 s: 128 mel bins, 0 frames"),
        ("no seconds", "ValueError", "seconds=0 must be a positive number"),
        ("labels", "RuntimeError", "converter"),
        ("writer", "RuntimeError", "converter"),
        ("overwriting", "RuntimeError", "converter"),
    ],
)
def test_errors_leave_nothing_behind(folder, case, kind, message):
    name, text = json.loads((folder / "errors.json").read_text())[case]
    assert name == kind
    assert message in text


def test_export_refuses_other_backends_and_formats(folder, monkeypatch):
    run = load_run(folder / "run")
    with pytest.raises(ValueError, match=r"format='onnx' is unknown.*'saved_model', 'tflite'"):
        export_run(run, 8, "onnx", folder / "new")
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match="needs the TensorFlow backend, and Keras runs on jax"):
        export_run(run, 8, "tflite", folder / "new.tflite")
    assert not list(folder.glob("new*"))
