"""The exported folder: one command from a run to what another team deploys, measured on itself."""

import dataclasses
import json
import os

import keras
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from keras_flexast import ElasticAST, cli
from keras_flexast.export import export_run
from keras_flexast.export.folder import calibration_waveforms
from keras_flexast.export.model_card import read_card
from keras_flexast.inference.artifacts import file_scores, load_artifact, load_artifacts
from keras_flexast.inference.scoring import fixed_scores
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.audio import read_audio, read_waveforms
from tf_data_pipelines.settings import FbankSettings, PackSettings, PatchSettings
from tf_data_pipelines.sources import read_data

# What another backend only learns from the process that it starts, one of them is enough for.
IN_PLACE = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="in a process")
RATE, SECONDS, SAMPLES = 16000, 0.4, 6400
CLASSES = ("high", "low")
FILES = {  # of the folder, beside the SavedModel's own
    "README.md", "card.json", "points.png", "serving/models.config", "serving/batching.config",
    "serving/1/saved_model.pb", "serving/1/assets/labels.txt", "serving/1/assets/artifact.json",
    "serving/1/assets.extra/tf_serving_warmup_requests",
    "mobile/out_16_float32.tflite", "mobile/out_16_int8.tflite", "mobile/out_24x32_float32.tflite",
    "mobile/out_24x32_int8.tflite", "mobile/out_multi_float32.tflite",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, its data, and what `flexast export` makes of them, on either backend."""
    folder = tmp_path_factory.mktemp("export")
    rng = np.random.default_rng(0)
    for split, clips in (("train", 6), ("test", 4)):
        for name, hertz in (("high", 3000), ("low", 300)):
            (folder / "sounds" / split / name).mkdir(parents=True)
            for clip in range(clips):
                time = np.arange(SAMPLES - 400 * clip) / RATE
                tone = 0.3 * np.sin(2 * np.pi * hertz * time) + rng.normal(0, 0.01, len(time))
                soundfile.write(folder / "sounds" / split / name / f"{clip}.wav", tone, RATE)
    keras.utils.set_random_seed(0)
    run = Run(
        ElasticAST(2, "nano", depth=1, grid=(8, 64)), FbankSettings(), patches=PatchSettings(),
        packing=PackSettings(), classes=CLASSES, clip_seconds=SECONDS,
    )  # fmt: skip
    (folder / "run").mkdir()
    save_run(run, folder / "run")
    arguments = [
        "export", folder / "run", "--out", folder / "out", "--data", folder / "sounds",
        "--patch-sizes", "16,24x32", "--precisions", "float32,int8",
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.exception
    assert "6 artifacts are in" in result.stdout
    return folder


def test_one_command_makes_the_whole_folder(folder):
    names = {
        str(path.relative_to(folder / "out"))
        for path in (folder / "out").rglob("*")
        if path.is_file() and "variables" not in path.parts and path.name != "fingerprint.pb"
    }
    assert names == FILES
    assert 'name: "out"' in (folder / "out/serving/models.config").read_text()


@pytest.mark.parametrize("patch_size", [16, (24, 32)])
def test_every_artifact_has_the_scores_in_memory(folder, patch_size):
    waveforms = np.random.default_rng(1).normal(0, 0.1, (3, SAMPLES)).astype("float32")
    expected = fixed_scores(load_run(folder / "run"), patch_size, waveforms)
    name = "16" if patch_size == 16 else "24x32"
    for path, signature, tolerance in (
        ("serving", f"patch_{name}", 1e-5),
        (f"mobile/out_{name}_float32.tflite", None, 1e-4),
        ("mobile/out_multi_float32.tflite", f"patch_{name}", 1e-4),
    ):
        artifact = load_artifact(folder / "out" / path, signature)
        assert (artifact.classes, artifact.patch_size) == (CLASSES, name)
        scores = artifact.scores(list(waveforms))
        np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the clips do differ


def test_the_card_measures_the_artifacts_themselves(folder):
    card = read_card(folder / "out")
    points = {point["name"]: point for point in card["points"]}
    assert set(points) == {
        "serving patch_16", "serving patch_24x32", "out_multi_float32 patch_16",
        "out_multi_float32 patch_24x32", "out_16_float32", "out_16_int8", "out_24x32_float32",
        "out_24x32_int8",
    }  # fmt: skip
    for name, point in points.items():
        assert point["clips"] == 8
        assert not os.path.isabs(point["path"]) and (folder / "out" / point["path"]).exists()
        assert point["latency_ms"] and point["megabytes"] > 0
        path = folder / "out" / point["path"]
        result = CliRunner().invoke(
            cli.app,
            ["evaluate", str(path), str(folder / "sounds"), "--json"]
            + ["--patch-sizes", point["patch_size"]] * ("patch_" in name),
        )
        (measured,) = json.loads(result.stdout)
        assert measured["value"] == pytest.approx(point["value"])
    text = (folder / "out" / "README.md").read_text()
    assert "| `out_16_int8` | 16 | int8 |" in text
    assert "the test split of sounds" in text


def test_overwriting_keeps_the_servers_versions(folder, monkeypatch):
    monkeypatch.chdir(folder)
    options = {"patch_sizes": [16], "formats": ["serving"]}
    (written,) = export_run("run", "out2", max_seconds=1.0, **options)
    assert str(written) == "out2/serving/1"
    before = (folder / "out2/serving/1/saved_model.pb").read_bytes()
    written = export_run(
        folder / "run", folder / "out2", frame_shift_ms=20.0, overwrite=True, **options
    )
    assert written == [folder / "out2/serving/2"]
    assert (folder / "out2/serving/1/saved_model.pb").read_bytes() == before
    waveforms = np.random.default_rng(1).normal(0, 0.1, (2, SAMPLES)).astype("float32")
    expected = fixed_scores(load_run(folder / "run"), 16, waveforms, frame_shift_ms=20.0)
    scores = load_artifacts(folder / "out2/serving")["patch_16"].scores(list(waveforms))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"out": "out"}, FileExistsError, "out exists already"),
        ({"formats": ["apk"]}, ValueError, "formats='apk' is unknown"),
        ({"precisions": ["int4"]}, ValueError, "precisions='int4' is unknown"),
        ({"input": "mp3"}, ValueError, "input='mp3' is unknown"),
        ({"precisions": ["int8"]}, ValueError, "Give data"),
        ({"data": "sounds", "input": "features"}, ValueError, "cannot be measured"),
        ({"patch_sizes": []}, ValueError, "patch_sizes is empty"),
        ({"formats": ()}, ValueError, "formats is empty"),
        pytest.param(*({"run": "no"}, FileNotFoundError, "no does not exist"), marks=IN_PLACE),
        ({"run": PackSettings()}, ValueError, "run is a PackSettings; expected the folder"),
        pytest.param(
            *({"patch_sizes": [129], "formats": ["serving"]}, ValueError, "129"), marks=IN_PLACE
        ),
        pytest.param(
            *({"patch_sizes": [48], "formats": ["mobile"]}, ValueError, "larger than"),
            marks=IN_PLACE,
        ),
        ({"data": "nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_errors_leave_nothing_behind(folder, monkeypatch, options, kind, message):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    with pytest.raises(kind, match=message):
        export_run(**{"run": "run", "out": "new", **options})
    assert sorted(os.listdir(folder)) == before


def test_features_in_and_onnx(folder):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    written = export_run(
        folder / "run", folder / "features", patch_sizes=[16], formats=["mobile", "onnx"],
        precisions=["float32"], input="features",
    )  # fmt: skip
    assert [path.name for path in written] == ["features_16_float32.tflite", "features_16.onnx"]
    session = runtime.InferenceSession(written[1], providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [38, 128]
    assert (folder / "features/onnx/features_16.labels.txt").read_text() == "high\nlow\n"


def test_a_run_at_8_khz_is_heard_at_8_khz_everywhere(folder, monkeypatch):
    pytest.importorskip("tf2onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(folder)
    run = load_run("run")
    run = dataclasses.replace(run, fbank=dataclasses.replace(run.fbank, sample_rate=8000))
    os.makedirs("run8", exist_ok=True)
    save_run(run, "run8")
    (written,) = export_run("run8", patch_sizes=[16, (16, 16)], formats=["onnx"], data="sounds")
    assert str(written) == "saved_models/run8/onnx/run8_16.onnx"
    artifact = load_artifact(written)
    assert (artifact.sample_rate, artifact.samples) == (8000, round(SECONDS * 8000))
    paths = sorted((folder / "sounds/test").rglob("*.wav"))
    waveforms = read_waveforms(paths, artifact.samples, 8000)
    expected = fixed_scores(run, 16, waveforms)
    found = file_scores(artifact, paths)
    assert found.paths == list(map(str, paths)) and not found.rejected
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=1e-4)
    card = read_card("saved_models/run8")
    command = "export_run('run8', patch_sizes=[16, (16, 16)], formats=['onnx'], data='sounds')"
    assert card["model"]["command"] == command
    assert card["points"][0]["precision"] == "float32"


def test_calibration_is_read_at_the_sample_rate_of_the_run(folder):
    run = load_run(folder / "run")
    run = dataclasses.replace(run, fbank=dataclasses.replace(run.fbank, sample_rate=8000))
    data = read_data(folder / "sounds", run.fbank, classes=CLASSES, split="train")
    waveforms = calibration_waveforms(run, data)
    assert waveforms.shape == (12, round(SECONDS * 8000))
    for waveform, clip in zip(waveforms, data.source.clips, strict=True):
        sound = read_audio(clip.path, 8000)
        np.testing.assert_array_equal(waveform[: len(sound)], sound)
        assert not waveform[len(sound) :].any()
    assert calibration_waveforms(run, data, 0.1).shape == (12, 800)
