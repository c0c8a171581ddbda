"""Runs on disk: the same model and settings come back, and nothing half-written stays."""

import dataclasses
import json
import os

import numpy as np
import pytest

from keras_flexast import PackedAST
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines.settings import FbankSettings, PackSettings, PatchSettings

BATCH = {
    "tokens": np.random.default_rng(0).normal(size=(2, 7, 256)).astype("float32"),
    "positions": np.ones((2, 7, 4), "float32"),
    "segment_ids": np.array([[1, 1, 2, 2, 2, 3, 0]] * 2, "int32"),
}


@pytest.fixture(scope="module")
def run():
    return Run(
        PackedAST(3, dim=22, depth=1, num_heads=2, grid=(3, 5), segments=3),
        FbankSettings(frame_shift_ms=12.5, mel_bins=48, mean=-3.25, std=2.5),
        patches=PatchSettings(
            (8, (16, 24)), (10.0, 20.0), remainder="pad", position="grid", resize="bilinear",
            grid=(3, 5),
        ),
        packing=PackSettings(3, 61, 3, buffer_size=5, overlong="crop"),
        classes=("bird", "dog", "été"),
        multi_label=True,
        clip_seconds=1.7,
        shares=(0.2, 0.3),
        made_by={"command": "train", "data": "birds", "settings": {"epochs": 3}},
    )  # fmt: skip


@pytest.fixture
def folder(run, tmp_path):
    save_run(run, tmp_path)
    return tmp_path


def test_a_run_comes_back(run, folder):
    assert sorted(os.listdir(folder)) == ["labels.txt", "model.keras", "settings.json"]
    assert (folder / "labels.txt").read_text().split() == list(run.classes)
    again = load_run(folder)
    for field in dataclasses.fields(Run):
        if field.name != "model":
            assert getattr(again, field.name) == getattr(run, field.name)
    outputs = [r.model.predict_on_batch(BATCH) for r in (again, run)]
    np.testing.assert_array_equal(*outputs)


def test_a_run_of_before_the_shares_were_saved_has_the_usual_ones(folder):
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "shares"}))
    assert load_run(folder).shares == (0.1, 0.1)


@pytest.mark.parametrize(
    ("made_by", "seed"),
    [
        ({}, None),
        ({"seed": 3}, 3),
        ({"settings": {"seed": 5}, "seed": 3}, 5),
        ({"settings": [1]}, None),
    ],
)
def test_a_run_knows_its_seed(run, made_by, seed):
    assert dataclasses.replace(run, made_by=made_by).seed == seed


def test_saving_again_replaces(run, folder):
    save_run(dataclasses.replace(run, classes=("a", "b", "c")), folder)
    assert load_run(folder).classes == ("a", "b", "c")
    assert sorted(os.listdir(folder)) == ["labels.txt", "model.keras", "settings.json"]


def test_scores(run):
    logits = np.array([[0, np.log(2), np.log(5)]], "float32")
    np.testing.assert_allclose(run.scores(logits), [[1 / 2, 2 / 3, 5 / 6]], rtol=1e-6)
    single = dataclasses.replace(run, multi_label=False)
    np.testing.assert_allclose(single.scores(logits), [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-6)


def test_patches_at(run):
    patches = run.patches_at([(16, 40), 12])
    assert (patches.patch_sizes, patches.frame_shifts_ms) == (((16, 40), (12, 12)), ())
    assert (patches.remainder, patches.grid) == ("pad", (3, 5))
    assert run.patches_at([8], 20.0).frame_shifts_ms == (20.0,)


def test_another_frame_shift(run):
    fbank, scale = run.front_end(25.0)
    assert (fbank.frame_shift_ms, fbank.mean, scale) == (25.0, run.fbank.mean, 2.0)
    assert run.front_end() == (run.fbank, 1.0)


@pytest.mark.parametrize("missing", ["settings.json", "model.keras"])
def test_missing_files_are_named(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{missing} does not exist.*is not a run"):
        load_run(folder)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_run(folder / "nowhere")


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: "{",
        lambda s: "[]",
        lambda s: json.dumps({k: v for k, v in s.items() if k != "classes"}),
        lambda s: json.dumps({**s, "fbank": {"frames": 3}}),
        lambda s: json.dumps({**s, "patches": {**s["patches"], "remainder": "drop"}}),
        lambda s: json.dumps({**s, "packing": None}),
        lambda s: json.dumps({**s, "fbank": {**s["fbank"], "mean": float("nan")}}),
        lambda s: json.dumps({**s, "patches": {**s["patches"], "grid": [0, 0]}}),
        lambda s: "[" * 100_000,
    ],
    ids=[
        "cut off", "a list", "no classes", "unknown name", "unknown policy", "null", "NaN", "grid",
        "nested",
    ],
)  # fmt: skip
def test_damaged_settings_are_named(folder, damage):
    path = folder / "settings.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=r"settings\.json is damaged"):
        load_run(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": "abc"}, "classes='abc' must be a list of names"),
        ({"classes": ["a", "b", 3]}, "must be a list of names"),
        ({"classes": ["a", "b", "a"]}, "classes has 'a' twice"),
        ({"multi_label": "no"}, "multi_label='no' must be True or False"),
        ({"clip_seconds": float("nan")}, "clip_seconds=nan must be a positive number"),
        ({"made_by": []}, r"made_by=\[\] must be a dictionary"),
        ({"fbank": {"mel_bins": 64}}, "fbank.mel_bins is 64, but the model has 48"),
        ({"patches": {"prefix_tokens": 1}}, "patches.prefix_tokens is 1, but the model has 0"),
        ({"patches": {"grid": [3, 6]}}, r"patches.grid is \(3, 6\), but the model has \(3, 5\)"),
        ({"patches": {"base_patch": 8, "stride": 8}}, r"base_patch is \(8, 8\), but the model has"),
        ({"patches": {"stride": [16, 10]}}, r"patches.stride is \(16, 10\), but the model has"),
        ({"packing": {"segments": 2}}, "packing.segments is 2, but the model has 3"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_model_are_named(folder, change, message):
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    for name, value in change.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"settings\.json does not fit: .*" + message):
        load_run(folder)


def test_weights_of_a_diverged_training_are_refused(run, folder):
    diverged = PackedAST.from_config(run.model.get_config())
    diverged.head.bias.assign([0, np.nan, 0])
    save_run(dataclasses.replace(run, model=diverged), folder)
    with pytest.raises(ValueError, match=r"1 of \d+ weights hold NaN.*head/bias: its training div"):
        load_run(folder)


def test_damaged_models_are_named(folder):
    path = folder / "model.keras"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"config.json", b"other.json!"))
    with pytest.raises(ValueError, match=r"model\.keras cannot be loaded"):
        load_run(folder)
    for damaged in (content[:1000], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.keras is damaged: its end is missing"):
            load_run(folder)


def test_files_of_different_runs_are_told_apart(folder):
    path = folder / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "classes": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"number of classes is 2, but the model has 3\."):
        load_run(folder)
