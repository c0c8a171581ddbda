"""One set of weights along an axis: patch sizes, lengths, frame shifts, pooling."""

import dataclasses
import json

import numpy as np
import pytest
import soundfile
from helpers import randomize, write_tones
from typer.testing import CliRunner

from keras_flexast import FlexiAST, evaluate_run
from keras_flexast.cli import app
from keras_flexast.evaluation import artifact_scores
from keras_flexast.inference.cascade import clip_operations
from keras_flexast.runs import Run, save_run
from keras_flexast.sweeps import evaluate_sweep
from tf_data_pipelines import load_source, scan_source, training_batches
from tf_data_pipelines.settings import DataWarning, FbankSettings, PackSettings

FBANK = FbankSettings(mel_bins=32)


@pytest.fixture(scope="module")
def run():
    model = randomize(FlexiAST(2, dim=16, depth=1, num_heads=2, grid=(2, 64), mel_bins=32), 3)
    return Run(
        model, FBANK, patches=model.patch_settings((8, 16)), classes=("high", "low"),
        packing=PackSettings(2, 256, model.segments), made_by={"settings": {"seed": 7}},
    )  # fmt: skip


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("sounds"))


def same(points, results):
    """Whether the numbers are those of other results, to the last clip."""
    keys = "value", "tokens", "auc", "confusion", "operations"
    return [[one[key] for key in keys] for one in points] == [
        [one[key] for key in keys] for one in results
    ]


def test_patch_sizes_and_frame_shifts_are_those_of_evaluate(run, sounds):
    found = evaluate_sweep(run, sounds, "patch-size", points=(8, (16, 12)), split="all")
    assert (found["data"], found["seed"]) == (sounds.name, 7)
    (points,) = found["sweeps"].values()
    assert [one["point"] for one in points] == ["8", "16x12"]
    assert same(points, evaluate_run(run, sounds, patch_sizes=(8, (16, 12)), split="all"))
    points = evaluate_sweep(
        run, sounds, "frame-shift", points=(10, 25), patch_size=8, split="all"
    )["sweeps"]["frame-shift"]  # fmt: skip
    for one in points:
        expected = evaluate_run(
            run, sounds, patch_sizes=(8,), frame_shift_ms=one["point"], split="all"
        )
        assert same([one], expected)
    assert points[0]["tokens"] > points[1]["tokens"]


def test_progress_names_each_point(run, sounds, capsys):
    evaluate_sweep(run, sounds, "frame-shift", points=(12.5, 25), split="all", progress=True)
    shown = capsys.readouterr().out
    assert "Evaluating at patch 16, frame-shift 12.5" in shown and "frame-shift 25" in shown


def test_lengths_are_those_of_files_that_are_cut(run, sounds, tmp_path):
    points = evaluate_sweep(run, sounds, "length", points=(0.2, 0.45, 9), split="all")
    for one in points["sweeps"]["length"]:
        for path in sounds.rglob("*.wav"):
            copy = tmp_path / str(one["point"]) / path.relative_to(sounds)
            copy.parent.mkdir(parents=True, exist_ok=True)
            waveform, rate = soundfile.read(path, dtype="int16")
            soundfile.write(copy, waveform[: round(one["point"] * rate)], rate)
        cut = tmp_path / str(one["point"])
        assert same([one], evaluate_run(run, cut, patch_sizes=(16,), split="all"))


def test_a_run_of_one_length_hears_that_length(run, sounds):
    fixed = dataclasses.replace(run, fbank=dataclasses.replace(FBANK, clip_ms=480))
    points = evaluate_sweep(fixed, sounds, "length", points=(0.2, 0.4), split="all")
    tokens = [one["tokens"] for one in points["sweeps"]["length"]]
    assert tokens == [8 * (1 + 2 * 3)] * 2  # eight clips of [CLS] and 48 frames


def test_pooled_frames_make_fewer_tokens(run, sounds):
    points = evaluate_sweep(run, sounds, "pooling", split="all")["sweeps"]["pooling"]
    assert same(points[:1], evaluate_run(run, sounds, patch_sizes=(16,), split="all"))
    scanned = scan_source(load_source(sounds), FBANK)
    frames = FBANK.frames(np.rint(scanned.durations * 16000).astype(int))
    for one in points:
        tokens = 1 + 2 * -(-(frames // one["point"]) // 16)
        assert one["tokens"] == tokens.sum()
        np.testing.assert_allclose(one["operations"], clip_operations(run.model, tokens).mean())


def test_usual_points(run, sounds):
    lengths = evaluate_sweep(run, sounds, "length", split="all")["sweeps"]["length"]
    longest = max(scan_source(load_source(sounds), FBANK).durations)
    assert lengths[0]["point"] >= 0.1
    assert lengths[-1]["point"] == pytest.approx(longest, abs=0.01)
    shifts = evaluate_sweep(run, sounds, "frame-shift", split="all")["sweeps"]["frame-shift"]
    assert [one["point"] for one in shifts] == [10, 15, 20, 25, 30, 35, 40]


@pytest.mark.parametrize(
    ("sweep", "how", "message"),
    [
        ("patch", {}, "sweep='patch'"),
        ("patch-size", {"patch_size": 8}, "patch_size=8 belongs to other sweeps"),
        ("patch-size", {"points": (64,)}, "64"),
        ("length", {"points": (0.01,)}, "points=0.01"),
        ("length", {"points": (1, 1.0)}, "different values"),
        ("length", {"points": ()}, "one or more"),
        ("frame-shift", {"points": (0,)}, "points=0"),
        ("pooling", {"points": (5,)}, "points=5"),
        ("pooling", {"points": (1.5,)}, "points=1.5"),
        ("patch-size", {"points": (8, (8, 8))}, "different values"),
    ],
)
def test_bad_points(run, sounds, sweep, how, message):
    with pytest.raises(ValueError, match=message):
        evaluate_sweep(run, sounds, sweep, split="all", **how)


def test_clips_of_shards_and_clips_that_begin_with_silence_are_cut(run, sounds, tmp_path):
    from tf_data_pipelines.prepare import prepare_data

    for path in sounds.rglob("*.wav"):
        waveform, rate = soundfile.read(path, dtype="int16")
        waveform[:4000] = 0
        (tmp_path / "late" / path.parent.name).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "late" / path.relative_to(sounds), waveform, rate)
    prepare_data(tmp_path / "late", tmp_path / "shards", shares=run.shares)
    found = [
        evaluate_sweep(run, tmp_path / name, "length", points=(0.2, 0.4), split="all")
        for name in ("late", "shards")
    ]
    late, shards = (one["sweeps"]["length"] for one in found)
    assert [one["value"] for one in late] == [one["value"] for one in shards]
    silent = 1 + 2 * -(-FBANK.frames(3200) // 16)  # tokens of 0.2 s
    assert [one["tokens"] for one in (late[0], shards[0])] == [8 * silent] * 2


def test_shortened_clips_stay_short_and_are_for_evaluation_by_runs(run, sounds):
    data = scan_source(load_source(sounds), FBANK).shortened(0.3).shortened(0.5)
    assert (data.most_seconds, data.durations.max()) == (0.3, 0.3)
    with pytest.raises(ValueError, match="shortened clips are for evaluation"):
        training_batches(data, FBANK, patches=run.patches, packing=run.packing)
    with pytest.raises(ValueError, match="an artifact hears whole files"):
        artifact_scores(None, data)


def test_clips_too_short_for_any_usual_length(run, sounds):
    data = scan_source(load_source(sounds), FBANK)
    short = dataclasses.replace(data, durations=np.full(8, 0.09))
    with pytest.raises(ValueError, match=r"no clip is 0\.1 s long"):
        evaluate_sweep(run, short, "length", split="all")


def test_a_run_of_one_length_says_what_it_does_not_hear(run, sounds):
    fixed = dataclasses.replace(run, fbank=dataclasses.replace(FBANK, clip_ms=400))
    with pytest.warns(DataWarning, match=r"\d of 8 clips are longer"):
        evaluate_sweep(fixed, sounds, "pooling", points=np.array([1, 2]), split="all")


def test_the_command(run, sounds, tmp_path):
    (tmp_path / "run").mkdir()
    save_run(run, tmp_path / "run")
    command = ["evaluate", str(tmp_path / "run"), str(sounds), "--split", "all"]
    short = ["--sweep", "length", "--points", "0.2,0.4", "--patch-sizes", "8"]
    done = CliRunner().invoke(app, [*command, *short, "--json"])
    found = json.loads(done.stdout)
    assert found["name"] == "run"
    expected = evaluate_sweep(
        tmp_path / "run", sounds, "length", points=(0.2, 0.4), patch_size=8, split="all"
    )
    assert found == json.loads(json.dumps(expected))
    done = CliRunner().invoke(app, [*command, *short, "--per-class"])
    assert "seconds" in done.stdout
    assert "patch 8 ┃" not in done.stdout
    pooling = ["--sweep", "pooling", "--points", "1,2", "--name", "mine", "--json"]
    found = json.loads(CliRunner().invoke(app, [*command, *pooling]).stdout)
    assert found["name"] == "mine"
    assert [one["point"] for one in found["sweeps"]["pooling"]] == [1, 2]
    assert "0.2" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "length", "--patch-sizes", "8,16"], "takes one patch size"),
        (["--sweep", "patch-size", "--points", "8"], "--points belongs to"),
        (["--points", "1,2"], "--points belongs to"),
        (["--name", "mine"], "--name belongs to"),
        (["--sweep", "length", "--points", "a"], "--points 'a'"),
        (["--sweep", "length", "--cascade", "48,8"], "no other change of what is heard"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    done = CliRunner().invoke(app, ["evaluate", "run", "data", *options], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    assert message in done.output
