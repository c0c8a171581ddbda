"""The exported folder: one command from a run to what another team deploys, measured on itself."""

import json
import os

import keras
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from keras_flexast import ElasticAST, cli
from keras_flexast.export.folder import export_folder
from keras_flexast.export.model_card import read_card
from keras_flexast.inference.artifacts import load_artifact, load_artifacts
from keras_flexast.inference.scoring import fixed_scores
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.settings import FbankSettings, PackSettings, PatchSettings

RATE, SECONDS, SAMPLES = 16000, 0.4, 6400
CLASSES = ("high", "low")
FILES = {  # of the folder, beside the SavedModel's own
    "README.md", "card.json", "points.png", "serving/models.config", "serving/batching.config",
    "serving/1/saved_model.pb", "serving/1/assets/labels.txt", "serving/1/assets/card.json",
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
        ElasticAST(2, "nano", depth=1, grid=(8, 64)), FbankSettings(), PatchSettings(),
        PackSettings(), CLASSES, clip_seconds=SECONDS,
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
    (written,) = export_folder("run", "out2", [16], ["serving"], max_seconds=1.0)
    assert str(written) == "out2/serving/1"
    before = (folder / "out2/serving/1/saved_model.pb").read_bytes()
    written = export_folder(
        folder / "run", folder / "out2", [16], ["serving"], frame_shift_ms=20.0, overwrite=True
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
        ({"precisions": ["int8"]}, ValueError, "Give them with --data"),
        ({"data": "sounds", "input": "features"}, ValueError, "cannot be measured"),
        ({"patch_sizes": []}, ValueError, "patch_sizes is empty"),
        ({"patch_sizes": [129], "formats": ["serving"]}, ValueError, "129"),
        ({"patch_sizes": [48], "formats": ["mobile"]}, ValueError, "larger than"),
        ({"data": "nowhere"}, (OSError, ValueError), "nowhere"),
    ],
)
def test_errors_leave_nothing_behind(folder, monkeypatch, options, kind, message):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    with pytest.raises(kind, match=message):
        export_folder("run", **{"out": "new", **options})
    assert sorted(os.listdir(folder)) == before


def test_features_in_and_onnx(folder):
    pytest.importorskip("tf2onnx")
    runtime = pytest.importorskip("onnxruntime")
    written = export_folder(
        folder / "run", folder / "features", [16], ["mobile", "onnx"], ["float32"],
        input="features",
    )  # fmt: skip
    assert [path.name for path in written] == ["features_16_float32.tflite", "features_16.onnx"]
    session = runtime.InferenceSession(written[1], providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [38, 128]
    assert (folder / "features/onnx/features_16.labels.txt").read_text() == "high\nlow\n"
