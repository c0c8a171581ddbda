"""The exported folder: one command from a run to what another team deploys, measured on itself."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import soundfile
from helpers import IN_PLACE, MODEL, ONCE, card_point
from typer.testing import CliRunner

from keras_flexast import ElasticAST, cli
from keras_flexast.evaluation import evaluate_run
from keras_flexast.export import FixedOptions, export_run
from keras_flexast.export import folder as folder_module
from keras_flexast.export.folder import (
    _default_size,
    _Plan,
    _splits,
    _update,
    build_export,
    calibration_waveforms,
)
from keras_flexast.export.model_card import CARD, is_own_card, read_card, write_card
from keras_flexast.export.serving_files import models_config
from keras_flexast.inference.artifacts import file_scores, load_artifact, load_artifacts
from keras_flexast.inference.scoring import fixed_scores
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.audio import read_audio, read_waveforms
from tf_data_pipelines.settings import DataWarning, FbankSettings, PackSettings, PatchSettings
from tf_data_pipelines.sources import read_data

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
    arguments = ["export", folder / "run", "--out", folder / "out"]
    if keras.backend.backend() == "tensorflow":
        arguments += ["--data", folder / "sounds"]
    precisions = "float32,int8" if "--data" in arguments else "float32"  # quicker elsewhere
    arguments += ["--patch-sizes", "16,24x32", "--precisions", precisions]
    result = CliRunner().invoke(cli.app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.exception
    count = 6 if "--data" in arguments else 4
    assert f"{count} artifacts are in" in result.stdout
    return folder


@IN_PLACE
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


@IN_PLACE
def test_the_card_measures_the_artifacts_themselves(folder):
    card = read_card(folder / "out")
    assert is_own_card(folder / "out")
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
    found = evaluate_run(folder / "run", folder / "sounds", patch_sizes=[16, (24, 32)])
    assert [one["patch_size"] for one in card["run"]] == ["16", "24x32"]
    for one, result in zip(card["run"], found, strict=True):
        assert one["value"] == one["backgrounds"]["alone"] == result["value"]
        for point in points.values():
            if point["patch_size"] == one["patch_size"]:
                lost = 100 * (one["value"] - point["value"])
                assert point["loss_points"] == pytest.approx(lost, abs=1e-3)
                assert point["takes_length"] and point["backgrounds"]["clips"] == 8
    text = (folder / "out" / "README.md").read_text()
    assert "| `out_16_int8` | 16 | int8 |" in text and "| the run itself | 24x32 |" in text
    assert "the test split of sounds" in text


@IN_PLACE
def test_the_card_records_the_command_that_was_run(folder):
    words = shlex.split(read_card(folder / "out")["model"]["command"])
    assert words[:3] == ["flexast", "export", str(folder / "run")]
    assert dict(zip(words[3::2], words[4::2], strict=True)) == {
        "--out": str(folder / "out"), "--data": str(folder / "sounds"),
        "--patch-sizes": "16,24x32", "--precisions": "float32,int8",
    }  # fmt: skip


@IN_PLACE
def test_the_default_is_the_most_accurate_patch_size(folder, monkeypatch):
    best = read_card(folder / "out")["model"]["default_patch_size"]
    assert best in ("16", "24x32")
    assert f"**Server**: patch {best}," in (folder / "out" / "README.md").read_text()
    assert load_artifact(folder / "out" / "serving").patch_size == best
    run, sizes = load_run(folder / "run"), {"8": (8, 8), "24": (24, 24), "32": (32, 32)}
    plan = _Plan("x", sizes, formats=[], precisions=[], options=FixedOptions(), max_seconds=1,
                 version=1)  # fmt: skip
    assert _default_size(run, None, plan) == (24, 24)  # nearest to the base patch, 16
    values = {(8, 8): 0.9, (24, 24): 0.8, (32, 32): 0.9}

    def evaluated(run, test, *, patch_sizes, frame_shift_ms, progress):
        return [
            {"patch_size": pair, "value": values[pair], "tokens": 1 / pair[0]}
            for pair in patch_sizes
        ]

    monkeypatch.setattr(folder_module, "evaluate_run", evaluated)
    assert _default_size(run, ["clips"], plan) == (32, 32)


@IN_PLACE
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


READER = """
import pathlib, re, sys, time
import tensorflow as tf
serving, stop = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
lists = loaded = 0
while not stop.exists():
    versions = sorted(int(path.name) for path in serving.iterdir() if path.name.isdecimal())
    assert versions, "no version"
    label = int(re.search("stable.* value: ([0-9]+)", (serving / "models.config").read_text())[1])
    assert label in versions, (label, versions)
    lists += 1
    if versions[-1] != loaded:
        loaded = versions[-1]
        model = tf.saved_model.load(str(serving / str(loaded)))
        assert "serving_default" in model.signatures
        assert (serving / str(loaded) / "assets.extra" / "tf_serving_warmup_requests").exists()
        print("loaded", loaded, flush=True)
    time.sleep(0.001)
print(lists)
"""


@ONCE
def test_a_reader_never_finds_the_served_folder_empty_or_half_written(
    folder, tmp_path, monkeypatch
):
    def copied(building, arguments):
        """What the real export writes, file by file, slower than the reader looks."""
        version = building / "serving" / str(arguments["version"])
        for path in sorted((folder / "out/serving/1").rglob("*")):
            if path.is_file():
                place = version / path.relative_to(folder / "out/serving/1")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
                threading.Event().wait(0.01)
        config = models_config("out", arguments["version"])
        (building / "serving" / "models.config").write_text(config)
        return [f"serving/{arguments['version']}"]

    monkeypatch.setattr(folder_module, "build_export", copied)
    monkeypatch.setattr(folder_module, "_in_tensorflow_process", copied)
    out = tmp_path / "out"
    export_run("run", out)
    command = [sys.executable, "-c", READER, out / "serving", tmp_path / "stop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        try:
            for version in (2, 3, 4, 5, 6):
                assert reader.stdout.readline() == f"loaded {version - 1}\n"
                export_run("run", out, overwrite=True)
            assert reader.stdout.readline() == "loaded 6\n"
        finally:
            (tmp_path / "stop").touch()
        lists = int(reader.stdout.read())
    assert reader.returncode == 0 and lists > 100
    found = {path.name for path in (out / "serving").iterdir()}
    assert found == {"5", "6", "models.config"}
    assert sorted(os.listdir(tmp_path)) == ["out", "stop"]


@pytest.fixture
def build(monkeypatch):
    """Exports that write these files in place of artifacts: build({path: text}, error=None)."""
    content, errors, meanwhile = {}, [], []

    def fake(folder, arguments):
        for name, text in content.items():
            if name == "CARD":
                write_card(folder, [card_point(text, 0.9, 1.0)], MODEL)
                continue
            path = folder / name.replace("N", str(arguments["version"]))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("N", str(arguments["version"])))
        if errors:
            raise errors.pop()
        if meanwhile:
            meanwhile.pop()()
        names = (name for name in content if name != "CARD")
        return [name.replace("N", str(arguments["version"])) for name in names]

    def set_content(files, error=None, during=None):
        content.clear()
        content.update(files)
        errors.extend([error] if error else [])
        meanwhile.extend([during] if during else [])

    monkeypatch.setattr(folder_module, "build_export", fake)
    monkeypatch.setattr(folder_module, "_in_tensorflow_process", fake)
    return set_content


def files(folder):
    """{path: content} of all files below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes().decode("utf-8", "replace")
        for path in folder.rglob("*")
        if path.is_file()
    }


SERVED = {
    "serving/N/saved_model.pb": "N", "serving/models.config": models_config("out", "N"),
    "serving/batching.config": "default",
}  # fmt: skip


def test_an_export_into_an_older_one_replaces_file_by_file(build, tmp_path):
    out, names = tmp_path / "out", ("mobile/out_16_int8.tflite", "mobile/out_8_int8.tflite")
    build({**SERVED, **dict.fromkeys(names, "N"), "CARD": "old"})
    export_run("run", out, data="sounds")
    (out / "serving" / "batching.config").write_text("mine")
    mine = ("notes.txt", "other.tflite", "customer_16_int8.tflite", "out_may_16.tflite")
    for name in mine:
        (out / "mobile" / name).write_text("mine")
    served = (out / "serving").stat().st_ino
    build({**SERVED, names[0]: "N", "onnx/out_16.onnx": "N", "CARD": "new"})
    formats = "serving", "mobile", "onnx"
    paths = export_run("run", out, formats=formats, data="sounds", overwrite=True)
    assert out / "serving/2/saved_model.pb" in paths
    found = {name: text for name, text in files(out).items() if name not in CARD}
    assert found == {
        "serving/1/saved_model.pb": "1", "serving/2/saved_model.pb": "2",
        "serving/models.config": models_config("out", 2), "serving/batching.config": "mine",
        "mobile/out_16_int8.tflite": "2", "onnx/out_16.onnx": "2",
        **{f"mobile/{name}": "mine" for name in mine},
    }  # fmt: skip
    assert (out / "serving").stat().st_ino == served  # what a server has mounted
    assert read_card(out)["points"][0]["name"] == "new" and is_own_card(out)
    build({**SERVED, names[0]: "N", "onnx/out_16.onnx": "N"})  # the data has no test clips
    export_run("run", out, formats=formats, data="sounds", overwrite=True)
    assert not any((out / name).exists() for name in CARD)
    assert os.listdir(tmp_path) == ["out"]


def test_an_update_leaves_no_older_part_and_replaces_no_text_of_the_user(build, tmp_path):
    out = tmp_path / "out"
    build({**SERVED, "mobile/out_16_int8.tflite": "N", "CARD": "old"})
    export_run("run", out, data="sounds")

    def refused(match, **options):
        before = files(tmp_path)
        with pytest.raises(FileExistsError, match=match):
            export_run("run", out, overwrite=True, **options)
        assert files(tmp_path) == before

    refused(r"holds mobile, .*--formats serving,mobile\)", formats=["serving"], data="sounds")
    refused(
        r"holds serving and mobile, .*--formats serving,mobile,mediapipe\)",
        formats=["mediapipe"], data="sounds",
    )  # fmt: skip
    refused("has a model card, .*--data.* README.md, card.json, points.png")
    (out / "mobile/out_32_int8.tflite").mkdir()  # a folder is no artifact
    mine = out / "README.md"
    own = mine.read_bytes()
    build({**SERVED, "mobile/out_16_int8.tflite": "N", "CARD": "new"},
          during=lambda: mine.write_text("meanwhile"))  # fmt: skip
    with pytest.raises(FileExistsError, match=r"README\.md, card\.json, points\.png, not as"):
        export_run("run", out, overwrite=True, data="sounds")
    assert mine.read_text() == "meanwhile" and not (out / "serving/2").exists()
    mine.write_bytes(own)
    export_run("run", out, overwrite=True, data="sounds")
    assert is_own_card(out) and (out / "serving/2").exists()
    mine.write_text("my notes")
    refused("README.md, card.json, points.png, not as this program writes", data="sounds")
    refused("README.md, card.json, points.png, not as this program writes")
    (out / "card.json").unlink()
    refused("README.md, points.png, not as this program writes", data="sounds")
    build({**SERVED, "mobile/out_16_int8.tflite": "N"})
    export_run("run", out, overwrite=True)
    assert (out / "README.md").read_text() == "my notes" and (out / "serving/3").exists()


@pytest.mark.parametrize("keep, last", [(1, "56"), (2, "56"), (3, "456")])
def test_versions_go_when_newer_ones_are_there(build, tmp_path, keep, last):
    build(SERVED)
    for version in range(1, 7):
        export_run("run", tmp_path / "out", overwrite=True, keep=keep)
        assert (tmp_path / "out" / "serving" / str(version)).exists()
    found = sorted(path.name for path in (tmp_path / "out/serving").iterdir() if path.is_dir())
    assert "".join(found) == last


def test_what_the_configuration_names_is_not_removed(build, tmp_path):
    build(SERVED)
    for _ in range(3):
        export_run("run", tmp_path / "out", overwrite=True)
    config = tmp_path / "out" / "serving" / "models.config"
    config.write_text(models_config("out", 2))  # turned back
    export_run("run", tmp_path / "out", overwrite=True)
    assert config.read_text() == models_config("out", 4)
    found = {path.name for path in (tmp_path / "out/serving").iterdir() if path.is_dir()}
    assert found == {"2", "3", "4"}


def test_a_configuration_that_was_edited_stays(build, tmp_path):
    build(SERVED)
    export_run("run", tmp_path / "out")
    config = tmp_path / "out" / "serving" / "models.config"
    mine = models_config("out", "N").replace(
        "  }\n}", '    version_labels { key: "b" value: 1 }\n}}'
    )
    config.write_text(mine.replace("N", "1"))
    export_run("run", tmp_path / "out", overwrite=True)
    assert config.read_text() == mine.replace("N", "2")
    for edited, what in (("stable", "steady"), ('"out"', '"other"'), ("name:", "name")):
        config.write_text(text := mine.replace(edited, what).replace("N", "1"))
        with pytest.raises(ValueError, match=r"models\.config .* (Add them, or m|M)"):
            export_run("run", tmp_path / "out", overwrite=True)
        assert config.read_text() == text
        assert not (tmp_path / "out/serving/3").exists()


def test_the_label_of_another_model_stays(build, tmp_path):
    build(SERVED)
    export_run("run", tmp_path / "out")
    config = tmp_path / "out" / "serving" / "models.config"
    mine = """model_config_list {
      config { name: "other" version_labels { key: "stable" value: 12 } }
      # version_labels { key: "stable" value: 7 }
      config { name: 'out' version_labels { value: 5 key: "b" }
        version_labels { key: "stable" , value: N } } }"""
    config.write_text(mine.replace("N", "1"))
    export_run("run", tmp_path / "out", overwrite=True)
    assert config.read_text() == mine.replace("N", "2")
    config.write_text(text := mine.replace("N", "0x2"))
    with pytest.raises(ValueError, match="must configure 'out' with the label"):
        export_run("run", tmp_path / "out", overwrite=True)
    assert config.read_text() == text


def test_versions_that_are_pinned_stay(build, tmp_path):
    build(SERVED)
    for _ in range(3):
        export_run("run", tmp_path / "out", overwrite=True, keep=3)
    config = tmp_path / "out" / "serving" / "models.config"
    policy = "model_version_policy { specific { versions: [1, 3] } }"
    text = re.sub("model_version_policy .*", policy, config.read_text())
    config.write_text(text)
    for version in (4, 5, 6):
        with pytest.warns(DataWarning, match=f"pins 'out' to .* 1, 3 .* version {version} is not"):
            export_run("run", tmp_path / "out", overwrite=True, keep=1)
        assert config.read_text() == text
    found = {path.name for path in (tmp_path / "out/serving").iterdir() if path.is_dir()}
    assert found == {"1", "3", "6"}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_the_older_one_whole(build, tmp_path, error):
    out = tmp_path / "deep" / "out"
    build({**SERVED, "CARD": "old"}, error)
    with pytest.raises(type(error)):
        export_run("run", out, data="sounds")
    assert os.listdir(tmp_path) == []
    build({**SERVED, "CARD": "old"})
    export_run("run", out, data="sounds")
    before = files(tmp_path)
    build({**SERVED, "mobile/out_16_int8.tflite": "N"}, error)
    with pytest.raises(type(error)):
        export_run("run", out, data="sounds", overwrite=True)
    assert files(tmp_path) == before


@pytest.fixture
def answers_ctrl_c():
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background."""
    assert signal.set_wakeup_fd(-1) == -1, "end_on_interrupt() ran in the process of the tests"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("answers_ctrl_c")
def test_an_interruption_ends_the_other_process_and_leaves_nothing(tmp_path, monkeypatch):
    script, pid = tmp_path / "python", tmp_path / "pid"
    script.write_text(f'#!/bin/sh\necho half > "$3/half"; echo $$ > {pid}; exec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    monkeypatch.setattr(sys, "executable", str(script))

    def interrupt():
        while not pid.exists() or not pid.read_text():  # and then until it is waited for
            threading.Event().wait(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        export_run("run", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["pid", "python"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_patch_that_is_too_large_is_noticed_first(folder, tmp_path):
    arguments = {
        "run": str(folder / "run"), "data": str(folder / "sounds"), "command": "",
        "patch_sizes": [[16, 16], [48, 48]], "formats": ["serving", "mobile"],
        "precisions": ["float32"], "seconds": None, "frame_shift_ms": None, "input": "waveform",
        "max_seconds": 1.0, "resize": None, "name": "x", "version": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"patch_size=48 is larger than the spectrogram of 0\.4 s"):
        build_export(tmp_path, arguments)
    arguments |= {"patch_sizes": [[16, 16]], "seconds": 50000.0}
    with pytest.raises(ValueError, match=r"seconds=50000 makes 2,.* at patch 16, more than"):
        build_export(tmp_path, arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"out": "out"}, FileExistsError, "out exists already"),
        ({"formats": ["apk"]}, ValueError, "formats='apk' is unknown"),
        ({"precisions": ["int4"]}, ValueError, "precisions='int4' is unknown"),
        ({"seconds": 1e20}, ValueError, r"seconds=1e\+20 must be .* up to 86,400"),
        ({"input": "mp3"}, ValueError, "input='mp3' is unknown"),
        ({"precisions": ["int8"]}, ValueError, "Give data"),
        ({"data": "sounds", "input": "features"}, ValueError, "cannot be measured"),
        ({"patch_sizes": []}, ValueError, "patch_sizes is empty"),
        ({"keep": 0}, ValueError, "keep=0 must be a positive number"),
        ({"out": "my model"}, ValueError, "name='my model' cannot be part of a URL"),
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
        ({"data": "nowhere", "patch_sizes": [16]}, FileNotFoundError, "nowhere"),
    ],
)
def test_errors_leave_nothing_behind(folder, monkeypatch, options, kind, message):
    monkeypatch.chdir(folder)
    before = sorted(os.listdir(folder))
    with pytest.raises(kind, match=message):
        export_run(**{"run": "run", "out": "new", **options})
    assert sorted(os.listdir(folder)) == before


@IN_PLACE
def test_files_for_media_pipe_take_no_length(folder):
    written = export_run(
        folder / "run", folder / "phones", patch_sizes=[16], formats=["mediapipe", "mobile"],
        precisions=["float32"],
    )  # fmt: skip
    assert [str(path.relative_to(folder / "phones")) for path in written] == [
        "mobile/phones_16_float32.tflite", "mediapipe/phones_mediapipe_16_float32.tflite",
    ]  # fmt: skip
    assert [load_artifact(path).takes_length for path in written] == [True, False]


@IN_PLACE
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


@IN_PLACE
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


def test_clips_that_a_server_refuses_are_left_out_first(folder, tmp_path):
    run, (split, name) = load_run(folder / "run"), ("test", "high")
    shutil.copytree(folder / "sounds", tmp_path / "sounds")
    long = tmp_path / "sounds" / split / name / "long.wav"
    soundfile.write(long, np.random.default_rng(0).normal(0, 0.1, 2 * RATE), RATE)
    plan = _Plan("x", {"16": (16, 16)}, formats=["serving"], precisions=["float32"],
                 options=FixedOptions(), max_seconds=1, version=1)  # fmt: skip
    with pytest.warns(DataWarning, match=r"long\.wav \(2\.0 s\) is longer than max_seconds=1"):
        train, _, test = _splits(tmp_path / "sounds", run, plan)
    assert (len(train.source), len(test.source)) == (12, 8)
    shutil.rmtree(tmp_path / "sounds" / "test")
    with pytest.warns(DataWarning, match="has no test clips, so nothing is measured"):
        train, _, test = _splits(tmp_path / "sounds", run, plan)
    assert len(train.source) == 12 and test is None


def test_a_version_that_came_meanwhile_is_not_mixed_with(tmp_path):
    new, out = tmp_path / "new", tmp_path / "out"
    for one in (new, out):
        (one / "serving" / "2").mkdir(parents=True)
    (out / "serving" / "2" / "saved_model.pb").write_bytes(b"theirs")
    (new / "serving" / "2" / "saved_model.pb").write_bytes(b"ours")
    with pytest.raises(FileExistsError, match="2 came while this export ran"):
        _update(new, out, keep=2)
    assert (out / "serving" / "2" / "saved_model.pb").read_bytes() == b"theirs"
