"""The command line on real files: train, evaluate, predict, embed, export, and wrong uses."""

import dataclasses
import json
import os
import pathlib
import re
import struct
import subprocess
import sys

import keras
import numpy as np
import pytest
import soundfile
from helpers import ONCE, run_python
from typer.testing import CliRunner

from keras_flexast import cli
from keras_flexast.evaluation import evaluate_run
from keras_flexast.runs import load_run
from keras_flexast.settings import SIZES, DistillSettings
from tf_data_pipelines import audio

DATA = pathlib.Path(__file__).parent / "data"
RATE = 44100
CLIPS = 20  # of each class
PITCHES = {"low": 220, "middle": 660, "high": 1980}
FAST = ("--size", "nano", "--batch-tokens", "256", "--epochs", "12", "--learning-rate", "0.002")


def run(*arguments):
    """(exit code, stdout, message) of `flexast ARGUMENTS`, as `main` would end it."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    expected = (*cli.FAILURES, SystemExit, type(None))
    assert isinstance(result.exception, expected), result.exception
    return result.exit_code, result.stdout, f"{result.exception} {result.stderr}"


def write_tone(path, hertz, seconds, rng):
    """A stereo file at 44.1 kHz: a tone of one class in faint noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    tone = 0.4 * np.sin(2 * np.pi * hertz * time + rng.uniform(0, 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = np.stack([tone, 0.5 * tone], 1)
    soundfile.write(path, channels + rng.normal(0, 0.01, channels.shape), RATE)


@pytest.fixture(scope="module", autouse=True)
def small_nano():
    """A nano with one narrow block: most of the time would go into compiling four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "nano", (48, 1, 4))
        yield


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder of ogg and mp3 files at 44.1 kHz stereo, one folder per class."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "sounds"
    for name, hertz in PITCHES.items():
        for number in range(CLIPS):
            suffix = "ogg" if number % 2 else "mp3"
            write_tone(root / name / f"{number}.{suffix}", hertz, rng.uniform(0.3, 0.6), rng)
    return root


@pytest.fixture(scope="module")
def trained(sounds, tmp_path_factory):
    """A run trained on `sounds`, by the command line, with a recipe and options before it."""
    out = tmp_path_factory.mktemp("runs") / "run"
    (sounds / "low" / "broken.wav").write_bytes(b"not audio")
    (out.parent / "mine.py").write_text(
        "from keras_flexast.settings import TrainSettings\n"
        "train = TrainSettings(epochs=99, weight_decay=0.0, clip_norm=5.0)\n"
        "model = {'dropout': 0.01}\n"
    )
    code, _, message = run(
        "train", sounds, "--out", out, *FAST, "--patch-sizes", "8,16,24,48", "--recipe",
        out.parent / "mine.py", "--optimizer", "adamw", "--label-smoothing", 0.05,
    )  # fmt: skip
    (sounds / "low" / "broken.wav").unlink()
    assert code == 0, message
    assert "1 of 61 clips are left out" in message and "broken.wav" in message
    return out


def test_a_run_has_model_settings_labels_and_logs(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {"model.keras", "settings.json", "labels.txt", "history.json", "logs"}
    history = json.loads((trained / "history.json").read_text())
    assert len(history["loss"]) == len(history["val_accuracy"]) == 12
    assert not trained.with_name("run.partial").exists()
    assert (trained / "labels.txt").read_text().split() == ["high", "low", "middle"]
    made_by = json.loads((trained / "settings.json").read_text())["made_by"]
    assert (made_by["command"], made_by["data"]) == ("train", "sounds")
    assert made_by["command_line"].startswith("flexast train ")
    settings = made_by["settings"]
    assert settings["epochs"] == 12 and settings["clip_norm"] == 5 and settings["weight_decay"] == 0
    assert (settings["optimizer"], settings["label_smoothing"]) == ("adamw", 0.05)
    assert made_by["model_options"] == {"size": "nano", "dropout": 0.01}
    assert made_by["versions"][made_by["versions"]["backend"]]  # "jax": "0.10.2"
    assert any(path.is_file() for path in (trained / "logs").rglob("*"))


def test_it_learns_and_works_at_every_patch_size(trained, sounds, tmp_path):
    figure = tmp_path / "accuracy.png"
    code, out, message = run(
        "evaluate", trained, sounds, "--split", "all", "--patch-sizes", "8,16,16x24,48",
        "--figure", figure, "--json",
    )  # fmt: skip
    assert code == 0, message
    results = json.loads(out)
    assert [tuple(r["patch_size"]) for r in results] == [(8, 8), (16, 16), (16, 24), (48, 48)]
    assert all(r["clips"] == 3 * CLIPS and r["metric"] == "accuracy" for r in results)
    values = [r["value"] for r in results]
    assert min(values) > 0.5 and np.mean(values) > 0.7, values  # chance is 0.33
    assert figure.read_bytes()[:4] == b"\x89PNG"
    for r in results:
        assert np.sum(r["confusion"]) == r["clips"] and r["top1"] == r["value"]
        assert np.trace(r["confusion"]) == round(r["clips"] * r["value"])
        assert [one["class"] for one in r["per_class"]] == ["high", "low", "middle"]
        assert 0.5 < r["auc"] <= 1 and 0 < r["mAP"] <= 1 and r["top5"] is None


def test_evaluate_shows_the_confusion_and_each_class(trained, sounds, tmp_path):
    picture = tmp_path / "confusion.png"
    how = ("--split", "all", "--patch-sizes", "32,16", "--confusion", picture, "--per-class")
    code, out, message = run("evaluate", trained, sounds, *how)
    assert code == 0, message
    assert "patch 32" in out and "middle" in out and "AUC" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_shards_are_data_for_every_command(trained, sounds, tmp_path):
    code, out, message = run("prepare", sounds, tmp_path / "shards")
    assert code == 0 and "3 shards are in" in out, message
    shards, answers = tmp_path / "shards", []
    for data in (sounds, shards):
        found = [
            run("evaluate", trained, data, "--split", "all", "--patch-sizes", "16", "--json"),
            run("stats", data, "--json"),
        ]
        assert [code for code, _, _ in found] == [0, 0], found
        answers.append([json.loads(out) for _, out, _ in found])
    (evaluated, stats), (of_shards, of_shard_stats) = answers
    assert of_shards[0]["value"] == evaluated[0]["value"]
    assert of_shard_stats["classes"] == stats["classes"]
    assert of_shard_stats["mean"] == pytest.approx(stats["mean"], abs=0.02)  # of 16 bits
    code, _, message = run("prepare", sounds, shards)
    assert code == 1 and "holds a prepared data set already" in message


@ONCE
def test_a_run_is_trained_on_shards(sounds, tmp_path):
    assert run("prepare", sounds, tmp_path / "shards")[0] == 0
    code, _, message = run(
        "train", tmp_path / "shards", "--out", tmp_path / "run", *FAST, "--patch-sizes", "16"
    )
    assert code == 0, message
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["classes"] == sorted(PITCHES)


def test_predict_names_the_class_and_the_bad_file(trained, sounds, tmp_path):
    empty = tmp_path / "empty.wav"
    empty.touch()
    files = [sounds / "high" / "0.mp3", empty, sounds / "low" / "1.ogg"]
    code, out, message = run("predict", trained, *files, "--patch-size", 24, "--top", 2, "--json")
    assert code == 1 and "empty.wav is empty" in message
    first, second, failed = json.loads(out)
    assert (first["top"][0]["label"], second["top"][0]["label"]) == ("high", "low")
    assert len(first["top"]) == 2 and failed["file"] == str(empty)


def test_predict_with_json_always_prints_json(trained, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("a.wav", "b.wav"):
        (bad / name).touch()
    with open(tmp_path / "hour.wav", "wb") as file:  # sparse
        soundfile.write(file, np.zeros(RATE), RATE, format="WAV", subtype="PCM_16")
        content, size = (tmp_path / "hour.wav").read_bytes(), 3600 * RATE * 2
        file.seek(0)
        file.write(content[:4] + struct.pack("<I", size + 36) + content[8:40])
        file.write(struct.pack("<I", size))
        file.truncate(size + 44)
    for arguments, reasons in (
        ([trained, bad], {str(bad / name): "is empty" for name in ("a.wav", "b.wav")}),
        ([trained, tmp_path / "hour.wav"], {str(tmp_path / "hour.wav"): "a timeline (--timeline)"}),
        ([tmp_path / "no", bad / "a.wav"], {str(bad / "a.wav"): "is not a run"}),
        ([trained, bad / "a.wav", "--timeline"], {str(bad / "a.wav"): "is empty"}),
    ):
        code, out, message = run("predict", *arguments, "--json")
        answers = json.loads(out)
        assert code == 1 and {answer["file"] for answer in answers} == set(reasons), message
        assert all(reasons[answer["file"]] in answer["error"] for answer in answers)


def test_an_hour_is_refused_undecoded(trained, sounds, tmp_path, monkeypatch):
    long = tmp_path / "data" / "low" / "long.wav"
    for name in ("low", "high"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for path in sorted((sounds / name).iterdir())[:4]:
            (tmp_path / "data" / name / path.name).write_bytes(path.read_bytes())
    soundfile.write(long, np.random.default_rng(0).normal(0, 0.1, 60 * 16000), 16000)
    sizes = ("--patch-sizes", "8", "--split", "all", "--json")
    code, out, message = run("evaluate", trained, tmp_path / "data", *sizes)
    assert code == 0 and json.loads(out)[0]["clips"] == 9, message
    assert "1 of 9 clips have more than 8,192 tokens and lose their end" in message
    mended = audio._mend_wav

    def not_decoded(path, contents):  # what opens a file as a whole holds bytes
        assert path != str(long) or not isinstance(contents, bytes)
        return mended(path, contents)

    monkeypatch.setattr(audio, "_mend_wav", not_decoded)
    low = tmp_path / "data" / "low"
    code, out, message = run("predict", trained, low, "--patch-size", 8, "--json")
    *heard, refused = json.loads(out)
    assert code == 1 and len(heard) == 4 and str(low / "0.mp3") in {one["file"] for one in heard}
    assert refused["file"] == str(long)
    assert "long.wav (60.0 s) has 12,000 tokens" in message


def test_evaluation_draws_the_splits_of_the_training(trained, sounds):
    run = dataclasses.replace(load_run(trained), shares=(0.3, 0.2))
    (result,) = evaluate_run(run, sounds, patch_sizes=[16])
    assert result["clips"] == 3 * round(0.2 * CLIPS)


def test_predict_takes_another_frame_shift_and_a_long_file(trained, tmp_path):
    write_tone(tmp_path / "long.ogg", PITCHES["middle"], 6.0, np.random.default_rng(1))
    for shift in ((), ("--frame-shift-ms", 20)):
        code, out, message = run("predict", trained, tmp_path / "long.ogg", *shift, "--json")
        assert code == 0, message
        assert json.loads(out)[0]["top"][0]["label"] == "middle"


def test_embed_writes_one_vector_per_file(trained, sounds, tmp_path):
    files = sorted((sounds / "low").iterdir())
    code, _, message = run("embed", trained, *files, "--out", tmp_path / "vectors.npz")
    assert code == 0, message
    content = np.load(tmp_path / "vectors.npz")
    assert content["embeddings"].shape == (CLIPS, load_run(trained).model.backbone.dim)
    assert content["files"].tolist() == [str(path) for path in files]


def test_explain_draws_where_a_run_looks(trained, sounds, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = sounds / "low" / "0.mp3"
    code, out, message = run("explain", trained, file, "--patch-size", 24)
    assert code == 0, message
    assert "low" in out and (tmp_path / "0_attention.png").stat().st_size > 10_000
    (tmp_path / "mine.png").write_bytes(b"not ours")
    code, _, message = run("explain", trained, file, "--out", tmp_path / "mine.png")
    assert code == 1 and "mine.png" in message
    assert (tmp_path / "mine.png").read_bytes() == b"not ours"


def test_a_cascade_is_evaluated_and_predicts(trained, sounds):
    code, out, message = run("evaluate", trained, sounds, "--cascade", "48,16", "--json")
    assert code == 0, message
    *stages, cascade, mean = json.loads(out)
    assert [one["name"] for one in stages] == ["48", "16"] and mean["name"] == "mean"
    code, out, message = run("evaluate", trained, sounds, "--cascade", "48,16")
    assert code == 0 and f"--threshold {cascade['threshold']:g}" in " ".join(out.split()), out
    code, out, message = run("evaluate", trained, sounds, "--cascade", "auto")
    assert code == 0 and re.search(r"--cascade \d+,\d+", " ".join(out.split())), message
    file = sounds / "low" / "0.mp3"
    for more in (["--threshold", cascade["threshold"]], ["--mean"], []):
        code, out, message = run("predict", trained, file, "--cascade", "48,16", *more, "--json")
        assert code == 0, message
        (answer,) = json.loads(out)
        assert answer["patch_size"] == "48,16" and len(answer["top"]) == 3
    for wrong in (
        ["--cascade", "16,48"],
        ["--cascade", "auto"],
        ["--threshold", 0.5],
        ["--cascade", "48,16", "--timeline"],
    ):
        code, _, message = run("predict", trained, file, *wrong)
        assert code != 0 and "cascade" in message


def test_stats_measures_the_data(sounds):
    code, out, message = run("stats", sounds, "--json")
    assert code == 0, message
    summary = json.loads(out)
    assert summary["clips"] == 3 * CLIPS and 0.3 <= summary["seconds"]["shortest"] < 0.35
    assert sum(summary["classes"]["low"].values()) == CLIPS


def test_a_published_checkpoint_gives_its_own_scores(tmp_path):
    with np.load(DATA / "hf_ast_overlap" / "expected.npz") as archive:
        waveform, logits = archive["waveform"], archive["waveform_logits"][0]
    soundfile.write(tmp_path / "some.wav", waveform, 16000, subtype="FLOAT")
    out = tmp_path / "run"
    code, stdout, message = run("convert", DATA / "hf_ast_overlap", out)
    assert code == 0, message
    assert "16x16, one every 10x10" in stdout
    account = json.loads((out / "conversion.json").read_text())
    assert account["family"] == "ast" and len(account["used"]) == 43 and not account["new"]

    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    code, stdout, message = run("predict", out, tmp_path / "some.wav", "--top", 7, "--json")
    assert code == 0, message
    (answer,) = json.loads(stdout)
    scores = {one["label"]: one["score"] for one in answer["top"]}
    ours = [scores[f"label {k}"] for k in range(7)]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert answer["patch_size"] == "16" and "longer" not in message

    soundfile.write(tmp_path / "long.wav", np.tile(waveform, 2), 16000, subtype="FLOAT")
    for more, warned in (((), True), (("--full-length", "--resize", "bilinear"), False)):
        code, stdout, message = run(
            "predict", out, tmp_path / "long.wav", "--patch-size", "16x24", "--json", *more
        )
        assert code == 0 and ("1 of 1 clips are longer than the 2.58 s" in message) == warned
        assert json.loads(stdout)[0]["patch_size"] == "16x24"


def test_training_starts_from_a_converted_checkpoint(sounds, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("low\nmiddle\n")
    start = tmp_path / "start"
    code, stdout, message = run(
        "convert", DATA / "hf_ast_overlap", start, "--to", "elasticast", "--classes", names
    )
    assert code == 0 and "2 classes instead of the checkpoint's 7" in stdout, message
    out = tmp_path / "run"
    code, _, message = run(
        "train", sounds, "--init", start, "--out", out, "--epochs", 1, "--batch-tokens", 256,
        "--learning-rate", "1e-9", "--patch-sizes", "16,32",
        "--validation", "0.15", "--test", "0.25",
    )  # fmt: skip
    assert code == 0, message
    assert load_run(out).shares == (0.15, 0.25)
    before, after = load_run(start), load_run(out)
    assert after.classes == ("high", "low", "middle") and after.model.position == "physical"
    assert not after.fbank.remove_clip_mean and after.fbank.mean != before.fbank.mean
    for part in ("backbone", "pooling", "head_norm"):  # the head has three classes instead of two
        old = getattr(before.model, part).get_weights()
        for ours, theirs in zip(getattr(after.model, part).get_weights(), old, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_multi_label_manifests_train_and_score_by_map(sounds, tmp_path):
    lines = ["path,labels,split"]
    for name in PITCHES:
        for number, path in enumerate(sorted((sounds / name).iterdir())):
            split = ("train", "validation", "test")[max(0, number - CLIPS + 3)]
            lines.append(f"{path},{name};{'ogg' if path.suffix == '.ogg' else 'mp3'},{split}")
    manifest = tmp_path / "clips.csv"
    manifest.write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    code, stdout, message = run(
        "train", manifest, "--out", out, *FAST, "--epochs", 2, "--patch-sizes", "16,32",
        "--pooling", "cls", "--frame-shifts-ms", "10,20",
    )  # fmt: skip
    assert code == 0, message
    assert "val_mAP" in stdout
    assert load_run(out).multi_label and load_run(out).model.backbone.prefix_tokens == 1
    code, stdout, message = run("evaluate", out, manifest, "--patch-sizes", "16", "--json")
    assert code == 0, message
    (result,) = json.loads(stdout)
    assert result["metric"] == "mAP" and 0 < result["value"] <= 1 and result["clips"] == 3
    assert result["mAP"] == result["value"] and result["confusion"] is None
    code, stdout, message = run("evaluate", out, manifest, "--confusion", tmp_path / "c.png")
    assert code == 1 and "fill" in stdout and "needs clips of one label each" in message


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["train", "{tmp}/absent", "--out", "{tmp}/o"], "does not exist"),
        (["train", "{tmp}", "--out", "{tmp}/o"], "is empty"),
        (["train", "{sounds}", "--out", "{tmp}/o", "--patch-sizes", "200"], "patch_size is 200"),
        (["evaluate", "{run}", "{sounds}", "--patch-sizes", "200"], "patch_size is 200"),
        (["predict", "{run}", "{sounds}", "--patch-size", "200"], "patch_size is 200"),
        (["predict", "{run}", "{sounds}", "--patch-size", "8x100000000"], "from 1 to 4096"),
        (["train", "{sounds}", "--out", "."], "names no new file or folder"),
        (["train", "{sounds}", "--out", "{tmp}/o", "--validation", "0.9"], "must be 0 or more"),
        (["evaluate", "{run}", "{sounds}", "--figure", "{sounds}"], "must end in .png"),
        (["evaluate", "{run}", "{tmp}", "--figure", "{picture}"], "is not replaced"),
        (["choose", "{tmp}", "--figure", "{picture}"], "is not replaced"),
        (["embed", "{run}", "{tmp}/x.wav", "--out", "{picture}/x.npz"], "mine.png is a file"),
        (["predict", "{run}", "{tmp}/x.wav", "--timeline", "--timeline-out", "{tmp}"], "a folder"),
        (
            ["train", "{sounds}", "--out", "{tmp}/o", "--row-length", "64", "--patch-sizes", "8"],
            "--overlong crop",
        ),
        (["train", "{sounds}", "--out", "{run}"], "exists already"),
        (["train", "{sounds}", "--out", "{run}", "--resume"], "run is whole already"),
        (["train", "{sounds}", "--out", "{tmp}/o", "--resume"], "finds nothing to go on with"),
        (["train", "{sounds}", "--out", "{tmp}/o", "--recipe", "ast"], "'ast' is unknown"),
        (["train", ".", "--out", "o", "--batch-tokens", "9", "--batch-clips", "9"], "not both"),
        (["predict", "{run}", "{tmp}/absent.wav"], "does not exist"),
        (["predict", "{tmp}", "{tmp}/absent.wav"], "is not a run"),
        (["evaluate", "{run}", "{sounds}", "--split", "dev"], "'dev'"),
        (
            ["export", "{run}", "--out", "{tmp}/o", "--patch-sizes", "99x500"],
            "larger than the spec",
        ),
        (["embed", "{run}", "{tmp}/x.wav", "--out", "{tmp}/x.txt"], "must end in .npz"),
        (["train", "{sounds}", "--out", "{tmp}/o", "--init", "{run}", "--size", "tiny"], "--init"),
        (["convert", "{tmp}/absent.pth", "{tmp}/o"], "absent.pth does not exist"),
        (["convert", "{data}/metrics.npz", "{tmp}/o"], "of no known family"),
        (["convert", "{data}/hf_ast_plain", "{run}"], "exists already"),
        (["convert", "{data}/hf_ast_plain", "{tmp}/o", "--family", "vit"], "of family 'ast'"),
        (["convert", "{data}/hf_ast_plain", "{tmp}/o", "--classes", "x"], "nor a file"),
        (["convert", "{data}/hf_ast_plain", "{tmp}/o", "--stride", "8,9"], "must be one size"),
    ],
)
def test_wrong_uses_end_in_one_error_and_write_nothing(trained, sounds, tmp_path, arguments, text):
    picture = tmp_path / "mine.png"
    picture.write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    values = {"tmp": tmp_path, "sounds": sounds, "run": trained, "data": DATA, "picture": picture}
    code, _, message = run(*(argument.format(**values) for argument in arguments))
    assert code != 0 and text in message and "in user code" not in message, message
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_of_the_users_is_replaced(trained, sounds, tmp_path):
    thesis, interrupted = tmp_path / "docs" / "thesis.tex", tmp_path / "new.partial" / "mine"
    for file in (thesis, interrupted):
        file.parent.mkdir()
        file.write_text("mine")
    count = len(list(sounds.rglob("*.*")))
    for arguments, text in (
        (["train", sounds, "--out", sounds, "--overwrite"], "is not replaced"),
        (["train", sounds, "--out", thesis.parent, "--overwrite"], "is not replaced"),
        (["convert", DATA / "hf_ast_plain", thesis.parent, "--overwrite"], "is not replaced"),
        (["export", trained, "--out", thesis.parent, "--overwrite"], "is not replaced"),
        (["export", trained, "--out", trained, "--overwrite"], "is not replaced"),
        (["demo", "--out", thesis.parent, "--overwrite"], "is not replaced"),
        (["train", sounds, "--out", tmp_path / "new"], "new.partial exists already"),
    ):
        code, _, message = run(*arguments)
        assert code != 0 and text in message, message
    assert thesis.read_text() == interrupted.read_text() == "mine"
    assert len(list(sounds.rglob("*.*"))) == count and (trained / "model.keras").exists()


@pytest.mark.parametrize(
    "arguments",
    [["train", "x"], ["predict"], ["demo", "--epochs", "3"], ["export", "x", "--input", "mp3"]],
)
def test_unknown_options_end_in_usage(arguments):
    code, _, message = run(*arguments)
    assert code == 2 and "Usage" in message


@ONCE
def test_train_hands_a_teacher_on(sounds, tmp_path, monkeypatch):
    given = {}

    def train_run(*_, **how):
        given.update(how)
        raise ValueError("enough")

    monkeypatch.setattr("keras_flexast.training.train_run", train_run)
    run(
        "train", sounds, "--out", tmp_path / "run", "--teacher", tmp_path, "--teacher-patch-size",
        "16x8", "--distill-weight", 0.75, "--temperature", 3,
    )  # fmt: skip
    assert given["teacher"] == str(tmp_path)
    assert given["distill"] == DistillSettings(0.75, 3.0, patch_size=(16, 8))
    code, _, message = run("train", sounds, "--out", tmp_path / "run", "--temperature", 3)
    assert code == 2 and "belong to --teacher" in message


def test_names_in_brackets_are_text(trained, sounds, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")  # the name in one line
    path = tmp_path / "[red]a[b].ogg"
    path.write_bytes((sounds / "low" / "1.ogg").read_bytes())
    code, out, message = run("predict", trained, path)
    assert code == 0, message
    assert str(path) in out


def test_help_is_there_within_a_second_and_shows_the_defaults():
    program = pathlib.Path(sys.executable).with_name("flexast")
    code = """
        import os, subprocess, sys
        wide = {**os.environ, "COLUMNS": "200"}
        command = [sys.argv[1], "train", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=wide)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        sys.argv = ["flexast", "--help"]
        import keras_flexast, keras_flexast.cli
        heavy = {"keras", "tensorflow", "jax", "matplotlib"} & set(sys.modules)
        assert not heavy, heavy
    """
    out = run_python(code, program, backend=keras.backend.backend())
    for text in ("8,10,12,16,20,24,30,32,40,48", "cover", "0.004", "mixed_bfloat16"):
        assert text in out


def test_no_command_shows_tensorflows_own_lines(sounds):
    program = pathlib.Path(sys.executable).with_name("flexast")
    done = subprocess.run([program, "stats", sounds, "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["clips"] == 3 * CLIPS
    assert done.stderr == ""


def test_an_absent_backend_is_one_sentence(sounds):
    program = pathlib.Path(sys.executable).with_name("flexast")
    for backend in ("torch", "abacus"):
        done = subprocess.run(
            [program, "predict", "run", "a.wav"], capture_output=True, text=True,
            env={**os.environ, "KERAS_BACKEND": backend},
        )  # fmt: skip
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"Error: Keras cannot compute with {backend}: ")


def test_errors_name_what_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["flexast", "evaluate"])
    for text, shown in (
        ("frame_shift_ms=0.01 is under", "--frame-shift-ms 0.01 is under"),
        ("data='x' does not exist", "DATA 'x' does not exist"),
        ("full_length=True cannot be changed", "--full-length cannot be changed"),
        *((same, same) for same in ("a=b.wav is silent", "no sign", "run/data=3.wav is")),
    ):
        assert cli._sentence(ValueError(text)) == shown
    error = FileNotFoundError(2, "No such file or directory", "a.csv")
    assert cli._sentence(error) == "a.csv cannot be used: No such file or directory."


def test_main_prints_one_line_without_a_traceback(monkeypatch, capsys, tmp_path):
    # It would end this process when a later test interrupts it.
    monkeypatch.setattr(cli, "end_on_interrupt", lambda message: None)
    monkeypatch.setattr("sys.argv", ["flexast", "predict", str(tmp_path / "no"), "a.wav"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("Error: ") and "Traceback" not in message


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX has all of its parts")
def test_the_demo_end_to_end_in_small(monkeypatch, tmp_path):
    pytest.importorskip("espeakng_loader")
    from keras_flexast import demo

    for name, value in {
        "TRAIN_CLIPS": 60, "TEST_CLIPS": 30, "FIXED_STEPS": 2, "FLEXIBLE_STEPS": 2,
        "EPOCH_STEPS": 2, "PATCH_SIZES": (12, 48), "EXPORT_PATCHES": (32,), "ARTIFACT_CLIPS": 10,
    }.items():  # fmt: skip
        monkeypatch.setattr(demo, name, value)
    code, out, message = run("demo", "--out", tmp_path / "demo")
    assert code == 0, message
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["backend"] == keras.backend.backend()
    assert set(report["accuracy"]["flexible"]) == {"12", "48"}
    assert report["clips"] == 90 and 0.9 < report["row_fill"] <= 1
    assert report["packed_max_abs_difference"] < 1e-4
    assert set(report["export"]) == {"serving patch_32", "export_32_float32"}
    assert all(check["max_abs_difference"] < 1e-4 for check in report["export"].values())
    assert "Accuracy on held-out voices" in out
    assert load_run(tmp_path / "demo").model.segments == 16
    code, _, message = run("demo", "--out", tmp_path / "demo")
    assert code != 0 and "exists already" in message
