"""Cards: what is measured is the artifact; the choice is the best within the budget."""

import json
import re

import numpy as np
import pytest
import soundfile
from helpers import CLASSES, tiny_saved_model, tiny_tflite
from typer.testing import CliRunner

from keras_flexast import cli
from keras_flexast.evaluation import measure
from keras_flexast.export.model_card import (
    choose_point,
    latencies,
    operating_points,
    read_card,
    write_card,
)
from keras_flexast.inference.artifacts import load_artifact, load_artifacts
from keras_flexast.metrics import mean_average_precision
from tf_data_pipelines.audio import read_audio
from tf_data_pipelines.settings import FbankSettings
from tf_data_pipelines.sources import load_source, scan_source

MODEL = {
    "name": "tones", "classes": list(CLASSES), "multi_label": False, "parameters": 3000,
    "pooling": "mean", "sample_rate": 16000, "mel_bins": 128, "frame_shift_ms": 10.0,
    "window_ms": 25.0, "mean": -8.5, "std": 4.25, "data": "the test tones", "command": "flexast x",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """12 clips, two labels each for some; their classes are the artifacts' labels."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    lines = ["path,label"]
    for number in range(12):
        clip = rng.normal(0, 0.1, 700 + 20 * number)
        soundfile.write(folder / f"{number}.wav", clip, 16000)
        lines.append(f"{number}.wav,{CLASSES[number % 3]}")
    (folder / "single.csv").write_text("\n".join(lines))
    (folder / "multi.csv").write_text("\n".join([*lines[:-1], "11.wav,low;high"]))
    return {
        name: scan_source(load_source(folder / f"{name}.csv", CLASSES), FbankSettings())
        for name in ("single", "multi")
    }


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifacts")
    tiny_tflite(
        folder / "full.tflite", {"patch_8": 8, "patch_16": 16}, card={"precision": "float32"}
    )
    card = {"precision": "int8", "patch_sizes": {"serving_default": [16, 16]}}
    tiny_tflite(folder / "small.tflite", {"serving_default": 5}, card=card)
    tiny_saved_model(folder / "serving" / "1", 16)
    return folder


def point(name, value, milliseconds, megabytes=1.0, **more):
    """An operating point made by hand."""
    return {
        "name": name, "path": f"{name}.tflite", "signature": "serving_default",
        "format": "tflite", "patch_size": "16", "precision": "float32", "metric": "accuracy",
        "value": value, "standard_error": 0.01, "clips": 600, "seconds": 1.0,
        "megabytes": megabytes, "latency_ms": {"1": milliseconds, "2": milliseconds / 2}, **more,
    }  # fmt: skip


POINTS = [
    point("best", 0.98, 40.0, 8.0),
    point("tie_slow", 0.97, 20.0, 2.0),
    point("tie_fast", 0.97, 15.0, 3.0),
    point("small", 0.90, 10.0, 0.5, precision="int8"),
]


@pytest.mark.parametrize(
    ("budget", "megabytes", "threads", "best"),
    [
        (None, None, 1, "best"),
        (40.0, None, 1, "best"),
        (39.9, None, 1, "tie_fast"),
        (20.0, None, 2, "best"),
        (20.0, 2.5, 1, "tie_slow"),
        (None, 1.0, 1, "small"),
        (12.0, None, 1, "small"),
        (9.0, None, 1, None),
        (100.0, 0.1, 1, None),
    ],
)
def test_the_best_within_the_budget_is_chosen(budget, megabytes, threads, best):
    chosen, _ = choose_point(POINTS, budget, megabytes, threads)
    assert (chosen and chosen["name"]) == best


def test_the_nearest_miss_is_the_smallest_excess():
    assert choose_point(POINTS, 9.0)[1]["name"] == "small"  # 10 / 9
    assert choose_point(POINTS, 9.0, 0.25)[1]["name"] == "small"  # 2, 2.2 and more
    assert choose_point(POINTS[:3], 1.0, 1.0)[1]["name"] == "tie_fast"
    with pytest.raises(ValueError, match=r"threads=4: .* only with 1, 2"):
        choose_point(POINTS, 9.0, threads=4)


def test_measuring_runs_the_artifact_on_every_clip(found, artifacts):
    for name, clips in found.items():
        artifact = load_artifact(artifacts / "full.tflite", "patch_8")
        result = measure(artifact, clips)
        scores = np.concatenate([artifact.scores([read_audio(c.path)]) for c in clips.source.clips])
        targets = np.array([[k in c.labels for k in range(3)] for c in clips.source.clips])
        if name == "single":
            hits = int((scores.argmax(1) == targets.argmax(1)).sum())
            share = (hits + 2) / 16
            expected = "accuracy", hits / 12
            assert result["standard_error"] == pytest.approx((share * (1 - share) / 16) ** 0.5)
        else:
            expected = "mAP", mean_average_precision(targets, scores)
            assert result["standard_error"] is None
        assert (result["metric"], result["value"]) == (expected[0], pytest.approx(expected[1]))
        assert result["clips"] == 12


def test_measuring_refuses_other_classes_and_refused_clips(found, artifacts, tmp_path):
    named = tiny_tflite(tmp_path / "a.tflite", {"serving_default": 1}, labels=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"classes low, middle, high, .* the labels a, b, c"):
        measure(load_artifact(named), found["single"])
    served = load_artifact(artifacts / "serving")
    long = found["single"].source.clips[-1].path
    soundfile.write(long, np.random.default_rng(1).normal(0, 0.1, 1001), 16000)
    try:
        with pytest.raises(ValueError, match=r"cannot score 1 of 12 clips: .*more than 1000"):
            measure(served, found["single"])
    finally:
        soundfile.write(long, np.random.default_rng(1).normal(0, 0.1, 900), 16000)


def test_latencies_are_of_each_number_of_threads(artifacts):
    loaded = [*load_artifacts(artifacts / "full.tflite").values()]
    times = latencies([*loaded, load_artifact(artifacts / "serving")], rounds=3, seconds=0.05)
    assert [set(one) == {"1", "2"} for one in times[:2]] == [True, True] and len(times[2]) == 1
    assert all(0 < value < 1000 for one in times for value in one.values())


def test_a_card_tells_what_was_measured(found, artifacts):
    paths = [artifacts / name for name in ("full.tflite", "small.tflite", "serving")]
    points = operating_points(paths, found["single"], threads=(1,))
    assert [p["name"] for p in points] == ["full patch_16", "full patch_8", "small", "serving"]
    for one, path in zip(points, (paths[0], *paths[:2], paths[2] / "1"), strict=True):
        artifact = load_artifact(path, one["signature"])
        assert one["value"] == measure(artifact, found["single"])["value"]
    assert points[0]["seconds"] == 0.062 and points[3]["seconds"] == 0.062
    points[2]["value"] = points[0]["value"] - 0.031
    card = write_card(artifacts, points, MODEL)
    assert read_card(artifacts) == card == json.loads((artifacts / "card.json").read_text())
    assert [p["path"] for p in card["points"]] == [
        "full.tflite", "full.tflite", "small.tflite", "serving/1"
    ]  # fmt: skip
    assert [p["loss_points"] for p in card["points"]] == [None, None, 3.1, None]
    assert (artifacts / "points.png").read_bytes()[:4] == b"\x89PNG"
    text = (artifacts / "README.md").read_text()
    size = (artifacts / "small.tflite").stat().st_size / 1e6
    share = 100 * points[2]["value"]
    assert re.search(
        rf"\| `small` \| 16 \| int8 \| {share:.1f} ± .* \| 3\.1 .* {size:.2f} \|", text
    )
    assert "`small` lost 3.1 points, more than 2:" in text
    for fact in ("low, middle, high", "mean -8.5000", "12 clips of the test tones", "`flexast x`"):
        assert fact in text
    assert card["measured"]["date"] in text and f"{card['measured']['cores']} cores" in text


def test_losses_within_the_bounds_are_said_to_be(tmp_path):
    points = [POINTS[0], point("int8", 0.965, 20.0, precision="int8")]  # 1.5 points lost
    write_card(tmp_path, points, MODEL)
    text = (tmp_path / "README.md").read_text()
    assert "\nNo artifact lost more than 2 points (int8).\n" in text
    write_card(tmp_path, points[:1], MODEL)
    assert "lost more" not in (tmp_path / "README.md").read_text()


def choose(*arguments):
    result = CliRunner().invoke(cli.app, ["choose", *map(str, arguments)])
    return result.exit_code, result.stdout, f"{result.exception} {result.stderr}"


@pytest.mark.parametrize("budget", ["20ms", "0.02s", "20", "20.0 ms"])
def test_choose_marks_the_point_and_draws_it(tmp_path, budget):
    write_card(tmp_path, POINTS, MODEL)
    figure = tmp_path / "points" / "figure.png"
    code, out, message = choose(tmp_path, "--budget", budget, "--figure", figure)
    assert code == 0, message
    assert f"Best within the budget: {tmp_path}/tie_fast.tflite" in out.replace("\n", "")
    (marked,) = [line for line in out.splitlines() if "→" in line]
    assert "tie_fast" in marked and "97.0 ± 1.0" in marked
    assert all(one["name"] in out for one in POINTS)
    assert figure.read_bytes()[:4] == b"\x89PNG"
    code, out, _ = choose(tmp_path, "--budget", budget, "--max-mb", 2.5, "--json")
    assert code == 0 and json.loads(out)["best"]["name"] == "tie_slow"
    assert len(json.loads(out)["points"]) == 4


def test_choose_says_what_is_nearest_and_what_is_wrong(tmp_path):
    write_card(tmp_path, POINTS, MODEL)
    code, _, message = choose(tmp_path, "--budget", "5ms", "--max-mb", 9)
    assert code == 1 and "within 5 ms and 9 MB; the nearest is small with 10 ms" in message
    code, out, message = choose(tmp_path, "--budget", "5ms", "--json")
    assert code == 1 and json.loads(out)["best"] is None
    assert "within 5 ms; the nearest is small" in message
    assert json.loads(out)["nearest"]["name"] == "small"
    for text in ("fast", "-3ms", "0", "nan"):
        code, _, message = choose(tmp_path, "--budget", text)
        assert code == 2 and "is not a time such as" in message
    code, _, message = choose(tmp_path / "no")
    assert code == 1 and "card.json does not exist" in message
    for content in ("{", '{"points": [{"name": "x"}]}', '{"points": []}'):
        (tmp_path / "card.json").write_text(content)
        code, _, message = choose(tmp_path)
        assert code == 1 and "card.json" in message and "Export again" in message
