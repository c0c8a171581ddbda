"""ONNX files: the scores in memory, and a description of themselves inside."""

import sys

import keras
import numpy as np
import pytest
from helpers import IN_PLACE, randomize, run_python

from keras_flexast import ElasticAST
from keras_flexast.export import FixedOptions, write_onnx
from keras_flexast.inference.artifacts import load_artifact
from keras_flexast.inference.scoring import fixed_scores
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.fbank import features
from tf_data_pipelines.settings import FbankSettings, PackSettings

pytestmark = IN_PLACE
RATE, SECONDS, SAMPLES = 8000, 0.5, 4000
CLASSES = ("one", "Büro", "three", "four", "five")
WRITE = """
    import pathlib, sys
    from keras_flexast.export import FixedOptions, write_onnx
    from keras_flexast.runs import load_run
    folder = pathlib.Path(sys.argv[1])
    run = load_run(folder / "run")
    write_onnx(run, folder / "waveform.onnx", patch_size=(16, 24))
    options = FixedOptions(input="features")
    write_onnx(run, folder / "features.onnx", patch_size=(16, 24), options=options)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run at 8 kHz, and its exports."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    folder = tmp_path_factory.mktemp("onnx")
    keras.utils.set_random_seed(0)
    model = randomize(ElasticAST(len(CLASSES), "nano", depth=1), scale=0.2)
    run = Run(
        model,
        FbankSettings(sample_rate=RATE),
        patches=model.patch_settings(),
        packing=PackSettings(),
        classes=CLASSES,
        multi_label=True,
        clip_seconds=SECONDS,
    )
    (folder / "run").mkdir()
    save_run(run, folder / "run")
    run_python(WRITE, folder, backend="tensorflow")
    return folder


@pytest.fixture(scope="module")
def sound():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(3, SAMPLES)) * [[0.3], [0.01], [0]]).astype("float32")


def test_scores_equal_those_in_memory(folder, sound):
    import onnxruntime

    run = load_run(folder / "run")
    expected = fixed_scores(run, (16, 24), sound)
    assert np.ptp(expected, axis=0).max() > 1e-2  # the clips do differ
    given = {"waveform": sound, "features": features(sound, run.fbank).numpy()}
    for name, inputs in given.items():
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"))
        for clips in (3, 1):
            (scores,) = session.run(["scores"], {name: inputs[:clips]})
            np.testing.assert_allclose(scores, expected[:clips], rtol=0, atol=1e-4)


def test_the_front_end_is_plain(folder):
    """Static shapes but for the batch, and one after DFT, whose rank readers do not agree on."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(folder / "waveform.onnx").graph
    kinds = [node.op_type for node in graph.node]
    front = graph.node[: kinds.index("Log")]
    assert "Shape" not in [node.op_type for node in front]
    (dft,) = [node for node in front if node.op_type == "DFT"]
    (after,) = [node for node in front if dft.output[0] in node.input]
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    frames = int(FbankSettings(sample_rate=RATE).frames(SAMPLES))
    assert after.op_type == "Reshape"
    assert constants[after.input[1]].tolist() == [-1, frames, 129, 2]


def test_openvino_reads_and_runs_it(folder, sound):
    openvino = pytest.importorskip("openvino")
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # some CPUs compute in bfloat16 otherwise
    model = openvino.Core().compile_model(str(folder / "waveform.onnx"), "CPU", options)
    expected = fixed_scores(load_run(folder / "run"), (16, 24), sound)
    np.testing.assert_allclose(model(sound)[0], expected, rtol=0, atol=1e-4)


def test_a_file_describes_itself(folder, sound):
    artifact = load_artifact(folder / "waveform.onnx")
    assert (artifact.classes, artifact.samples, artifact.sample_rate) == (CLASSES, SAMPLES, RATE)
    assert (artifact.patch_size, artifact.precision, artifact.multi_label) == (
        "16x24", "float32", True
    )  # fmt: skip
    expected = fixed_scores(load_run(folder / "run"), (16, 24), sound)
    np.testing.assert_allclose(artifact.scores(list(sound)), expected, rtol=0, atol=1e-4)
    beside = folder / "waveform.labels.txt"
    assert beside.read_text() == "".join(f"{name}\n" for name in CLASSES)
    beside.unlink()
    assert load_artifact(folder / "waveform.onnx").classes == CLASSES
    with pytest.raises(ValueError, match="no signature from `waveform`"):
        load_artifact(folder / "features.onnx")


def test_errors(folder, monkeypatch):
    run, path = load_run(folder / "run"), folder / "new.onnx"
    with pytest.raises(ValueError, match=r"precision='int8': an \.onnx is float32"):
        write_onnx(run, path, patch_size=16, options=FixedOptions(precision="int8"))
    with monkeypatch.context() as patch:
        patch.setattr(keras.backend, "backend", lambda: "jax")
        with pytest.raises(RuntimeError, match="needs the TensorFlow backend"):
            write_onnx(run, path, patch_size=16)
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(ImportError, match=r'pip install "keras-flexast\[onnx\]"'):
        write_onnx(run, path, patch_size=16)
    assert not list(folder.glob("new*"))
