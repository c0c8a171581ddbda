"""Cards: what is measured is the artifact; the choice is the best within the budget."""

import concurrent.futures
import dataclasses
import json
import re

import numpy as np
import pytest
import soundfile
from helpers import CLASSES, MODEL, card_point, tiny_saved_model, tiny_tflite
from typer.testing import CliRunner

from keras_flexast import cli
from keras_flexast.evaluation import evaluate_run, measure, spread
from keras_flexast.export.backgrounds import BACKGROUNDS, BufferedClips, in_buffer
from keras_flexast.export.model_card import (
    CARD,
    POINT,
    choose_point,
    is_own_card,
    latencies,
    operating_points,
    read_card,
    write_card,
)
from keras_flexast.figures import patch_order
from keras_flexast.inference.artifacts import load_artifact, load_artifacts
from keras_flexast.inference.cascade import best_stages, best_threshold, load_cascade
from keras_flexast.inference.runtimes import OPENERS
from keras_flexast.metrics import mean_average_precision
from tf_data_pipelines.audio import read_audio
from tf_data_pipelines.settings import DataWarning, FbankSettings
from tf_data_pipelines.sources import load_source, scan_source


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


def of_run(value, **more):
    """The point of a run at patch 16, made by hand."""
    alone = card_point("the run itself", value, 0.0, format="run", **more)
    return {name: one for name, one in alone.items() if name not in ("path", "latency_ms")}


def backgrounds(*values):
    """Values alone and in each background, made by hand."""
    names = ["alone", *(one.name for one in BACKGROUNDS)]
    return {"clips": 12, **dict(zip(names, values, strict=True))}


POINTS = [
    card_point("best", 0.98, 40.0, 8.0),
    card_point("tie_slow", 0.97, 20.0, 2.0),
    card_point("tie_fast", 0.97, 15.0, 3.0),
    card_point("small", 0.90, 10.0, 0.5, precision="int8"),
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
    with pytest.raises(ValueError, match="max_mb=nan must be a positive number"):
        choose_point(POINTS, max_mb=float("nan"))
    with pytest.raises(ValueError, match=r"threads=4: .* only with 1, 2"):
        choose_point(POINTS, 9.0, threads=4)


SERVER = card_point(
    "serving patch_24", 0.99, 18.0, 9.0, format="saved_model", path="serving/1",
    signature="patch_24", patch_size="24", latency_ms={"2": 18.0},
)  # fmt: skip


def test_a_server_is_chosen_by_its_time_on_all_cores(tmp_path):
    points = [*POINTS, SERVER]
    for threads in (1, 2):
        best, _ = choose_point(points, 20.0, threads=threads)
        assert (best["name"], best["ms"]) == ("serving patch_24", 18.0)
    assert choose_point(points, 16.0)[0]["name"] == "tie_fast"
    assert choose_point([SERVER], 20.0)[0]["signature"] == "patch_24"
    with pytest.raises(ValueError, match=r"threads=4: .* only with 1, 2"):
        choose_point(points, 20.0, threads=4)
    write_card(tmp_path, points, {**MODEL, "default_patch_size": "24"})
    assert "**Server**: patch 24, the most accurate" in (tmp_path / "README.md").read_text()
    code, out, message = choose(tmp_path, "--budget", "20ms")
    assert code == 0, message
    assert "serving/1, signature patch_24" in out.replace("\n", "")
    assert "server: all cores" in out
    code, out, _ = choose(tmp_path, "--budget", "20ms", "--formats", "mobile,onnx")
    assert code == 0 and "tie_fast.tflite" in out.replace("\n", "") and "serving" not in out
    code, _, message = choose(tmp_path, "--formats", "onnx")
    assert code == 1 and "no operating point of onnx" in message
    code, _, message = choose(tmp_path, "--formats", "apk")
    assert code == 1 and "formats='apk' is unknown" in message


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


def test_a_cascade_is_an_operating_point(found, artifacts, tmp_path):
    path, data = artifacts / "full.tflite", found["single"]
    *stages, point = operating_points([path], data, threads=(1,), held_out=data)
    assert (point["name"], point["patch_size"]) == ("full cascade 16,8", "16,8")
    threshold, reached = point["cascade"]["threshold"], point["cascade"]["reached"]
    waveforms = [read_audio(clip.path) for clip in data.source.clips]
    scores = load_cascade(path, (16, 8), threshold=threshold).predict(waveforms)
    assert point["value"] == np.mean(scores.argmax(1) == data.source.targets())
    coarse = load_artifact(path, "patch_16").scores(waveforms)
    assert reached == [1, np.mean(coarse.max(1) < threshold)]
    fine, coarse = (one["latency_ms"]["1"] for one in sorted(stages, key=lambda p: p["name"])[::-1])
    assert point["latency_ms"]["1"] == pytest.approx(coarse + reached[1] * fine, abs=1e-3)
    assert len(operating_points([path], found["multi"], threads=(1,), held_out=found["multi"])) == 2
    write_card(tmp_path, [{**point, "value": 1.0}, *stages], MODEL)
    assert choose_point(read_card(tmp_path)["points"])[0]["name"] == point["name"]
    text = (tmp_path / "README.md").read_text()
    shares = f"100 %, {100 * reached[1]:.0f} %"
    assert f"`full cascade 16,8`: its stages hear {shares}" in text
    command = f"full.tflite FILE --cascade 16,8 --threshold {threshold:g}"
    assert command in text
    done = CliRunner().invoke(cli.app, ["choose", str(tmp_path)])
    assert command in done.stdout.replace("\n", "")
    most = choose_point(read_card(tmp_path)["points"])[0]["most_ms"]
    assert most == pytest.approx(coarse + fine, abs=1e-3)
    assert f"A clip that all of its patch sizes hear takes {most:.3g} ms." in done.stdout


def test_a_file_of_several_sizes_is_loaded_once(artifacts, found, monkeypatch):
    loaded, opener = [], OPENERS[".tflite"]
    monkeypatch.setitem(OPENERS, ".tflite", lambda *given: loaded.append(given) or opener(*given))
    path = artifacts / "full.tflite"
    cascade = load_cascade(path, (16, 8))
    assert [one.patch_size for one in cascade.classifiers] == ["16", "8"] and len(loaded) == 1
    results = evaluate_run(path, found["single"], patch_sizes=(16, 8))
    assert [one["name"] for one in results] == ["16", "8"] and len(loaded) == 2
    with pytest.raises(ValueError, match="frame_shift_ms=20 cannot be changed in an exported"):
        load_cascade(path, (16, 8), frame_shift_ms=20)
    with pytest.raises(ValueError, match="has no patch size 12; it has"):
        load_cascade(path, (16, 12))
    with pytest.raises(ValueError, match="patch_sizes is empty; give at least one size"):
        evaluate_run(path, found["single"], patch_sizes=())


def test_threads_that_share_a_file_get_their_own_scores(artifacts):
    cascade = load_cascade(artifacts / "full.tflite", (16, 8), threshold=None)
    rng = np.random.default_rng(0)
    clips = [[rng.normal(0, 0.1, 1000).astype("float32")] for _ in range(60)]
    expected = [cascade.predict(one) for one in clips]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        np.testing.assert_array_equal(list(pool.map(cascade.predict, clips)), expected)


def test_a_cascade_of_several_labels_is_no_operating_point(found, tmp_path):
    card = {"precision": "float32", "multi_label": True}
    path = tiny_tflite(tmp_path / "several.tflite", {"patch_8": 8, "patch_16": 16}, card=card)
    data = found["single"]
    assert len(operating_points([path], data, threads=(1,), held_out=data)) == 2


CASCADE = {"threshold": 0.5, "reached": [1, 0.5], "most_ms": {"1": 80.0, "2": 45.0}}


@pytest.mark.parametrize(("threads", "milliseconds"), [(1, 80), (2, 45)])
def test_the_longest_time_is_that_of_the_threads(tmp_path, threads, milliseconds):
    cascade = card_point("a b", 0.9, 10.0, patch_size="24,8", cascade=CASCADE)
    write_card(tmp_path / "a card", [cascade], MODEL)
    text = (tmp_path / "a card" / "README.md").read_text()
    assert "a clip that all of them hear takes 80 ms with 1 thread and 45 ms with 2 threads" in text
    done = CliRunner().invoke(cli.app, ["choose", str(tmp_path / "a card"), "--threads", threads])
    assert f"hear takes {milliseconds} ms" in done.stdout
    assert "a card/a b.tflite' FILE --cascade 24,8" in done.stdout.replace("\n", "")
    done = CliRunner().invoke(cli.app, ["choose", str(tmp_path / "a card"), "--json"])
    assert json.loads(done.stdout)["nearest"] is None  # there is no limit


@pytest.mark.parametrize(
    "wrong",
    [
        [], {**CASCADE, "threshold": "x"}, {**CASCADE, "threshold": 2}, {**CASCADE, "most_ms": {}},
        {"threshold": 0.5},
    ],
)  # fmt: skip
def test_a_damaged_cascade_of_a_card_is_named(tmp_path, wrong):
    write_card(tmp_path, [card_point("a", 0.9, 10.0, patch_size="24,8", cascade=CASCADE)], MODEL)
    card = json.loads((tmp_path / "card.json").read_text())
    card["points"][0]["cascade"] = wrong
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"card\.json is damaged"):
        read_card(tmp_path)


def test_a_card_says_what_is_heard_of_a_clip(tmp_path):
    write_card(tmp_path, [card_point("a", 0.9, 10.0)], {**MODEL, "heard_seconds": 0.715})
    assert "A server hears the first 0.715 s of a clip." in (tmp_path / "README.md").read_text()


def test_stages_of_a_cascade_are_of_different_areas(found, tmp_path):
    sizes = {"patch_16x8": 1, "patch_8x16": 2, "patch_16": 3, "patch_32": 4, "patch_4": 5}
    path = tiny_tflite(tmp_path / "many.tflite", sizes, card={"precision": "float32"})
    source = found["single"].source
    half = dataclasses.replace(
        found["single"], source=dataclasses.replace(source, clips=source.clips[::2]),
        durations=found["single"].durations[::2],
    )  # fmt: skip
    *stages, point = operating_points([path], found["single"], threads=(1,), held_out=half)
    names = point["patch_size"].split(",")
    areas = [patch_order(name)[0] for name in names]
    assert point["name"] == f"many cascade {point['patch_size']}" and "8x16" not in names
    assert areas == sorted(set(areas), reverse=True)
    chosen = [next(p for p in stages if p["patch_size"] == name) for name in names]
    waveforms = [read_audio(clip.path) for clip in half.source.clips]
    scores = [load_artifact(path, one["signature"]).scores(waveforms) for one in chosen]
    costs = [[one["latency_ms"]["1"]] for one in chosen]
    heard = np.ones((len(chosen), 6), bool)
    tried = [p for p in stages if p["patch_size"] != "8x16"]
    tried.sort(key=lambda p: -patch_order(p["patch_size"])[0])
    table = np.stack([load_artifact(path, p["signature"]).scores(waveforms) for p in tried])
    best = best_stages(
        table, np.ones((4, 6), bool), targets=half.source.targets(),
        costs=np.repeat([[p["latency_ms"]["1"]] for p in tried], 6, 1),
        areas=[patch_order(p["patch_size"])[0] for p in tried],
    )  # fmt: skip
    assert [tried[stage]["patch_size"] for stage in best] == names
    assert point["cascade"]["threshold"] == best_threshold(
        np.stack(scores), heard, targets=half.source.targets(), costs=heard * np.array(costs)
    )


def test_a_card_tells_what_was_measured(found, artifacts):
    paths = [artifacts / name for name in ("full.tflite", "small.tflite", "serving")]
    points = operating_points(paths, found["single"], threads=(1,))
    assert [p["name"] for p in points] == ["full patch_16", "full patch_8", "small", "serving"]
    for one, path in zip(points, (paths[0], *paths[:2], paths[2] / "1"), strict=True):
        artifact = load_artifact(path, one["signature"])
        assert one["value"] == measure(artifact, found["single"])["value"]
    assert points[0]["seconds"] == 0.062 and points[3]["seconds"] == 0.058
    waveforms = [read_audio(clip.path) for clip in found["single"].source.clips]
    artifact = load_artifact(paths[1])
    noisy = [in_buffer(one, BACKGROUNDS[3], 1000, seed) for seed, one in enumerate(waveforms)]
    labels = found["single"].source.targets()
    for name, clips in (("alone", waveforms), ("20 dB SNR", noisy)):
        share = np.mean(artifact.scores(clips).argmax(1) == labels)
        assert points[2]["backgrounds"][name] == pytest.approx(share)
    points[2]["value"] = 0.9
    run = of_run(0.931, backgrounds=backgrounds(0.99, 0.98, 0.97, 0.96, 0.95))
    points[2]["backgrounds"] = backgrounds(0.9, 0.985, 0.97, 0.6, 0.5)
    card = write_card(artifacts, [*points, run], MODEL)
    assert read_card(artifacts) == card == json.loads((artifacts / "card.json").read_text())
    assert [p["path"] for p in card["points"]] == [
        "full.tflite", "full.tflite", "small.tflite", "serving/1"
    ]  # fmt: skip
    assert [p["takes_length"] for p in card["points"]] == [False, False, False, True]
    assert card["points"][2]["loss_points"] == pytest.approx(3.1)
    assert card["points"][1]["loss_points"] is None  # no run at patch 8
    (given,) = card["run"]
    lost = dict(zip([one.name for one in BACKGROUNDS], (1, 2, 3, 4), strict=True))
    assert given["background_loss_points"] == pytest.approx(lost) and given["loss_points"] == 0
    assert (artifacts / "points.png").read_bytes()[:4] == b"\x89PNG"
    text = (artifacts / "README.md").read_text()
    size = (artifacts / "small.tflite").stat().st_size / 1e6
    losses = r"3\.1 \| 0\.5 \| 2\.0 \| 39\.0 \| 49\.0"
    assert re.search(rf"\| `small` \| 16 \| int8 \| 90\.0 ± .* \| {losses} .* {size:.2f} \|", text)
    assert "| the run itself | 16 | float32 | 93.1 ± 1.0 | 0.0 | 1.0 | 2.0 | 3.0 | 4.0 |" in text
    assert "`small` lost 3.1 points, more than 2: it is not told the length of a clip" in text
    assert re.search(r" -40 dBFS: \d+\.\d \(`(small|full patch_16)`\)\.", text)
    assert "heard with 12 of the clips" in text and all(one.text in text for one in BACKGROUNDS)
    for fact in ("low, middle, high", "mean -8.5000", "12 clips of the test tones", "`flexast x`"):
        assert fact in text
    assert card["measured"]["date"] in text and f"{card['measured']['cores']} cores" in text


def test_the_largest_loss_is_named(tmp_path):
    points = [POINTS[0], card_point("int8", 0.965, 20.0, precision="int8")]
    write_card(tmp_path, [*points, of_run(0.98)], MODEL)
    text = (tmp_path / "README.md").read_text()
    assert "\nLargest loss at own lengths: 1.5 points (`int8`).\n" in text
    assert "more than" not in text and "silence*:" not in text
    write_card(tmp_path, [POINTS[0], of_run(0.99)], MODEL)
    reason = "`best` lost 1.0 points, more than 0.5: it is not told the length of a clip"
    assert reason in (tmp_path / "README.md").read_text()
    write_card(tmp_path, points, MODEL)
    assert "lost against" not in (tmp_path / "README.md").read_text()


def test_a_background_fills_the_buffer_up():
    clip = np.random.default_rng(0).normal(0, 0.1, 4000).astype("float32")
    buffers = {one.name: in_buffer(clip, one, 9000, seed=1) for one in BACKGROUNDS}
    for name, decibels in (("-60 dBFS", -60), ("-40 dBFS", -40), ("20 dB SNR", -40)):
        noise = buffers[name].copy()
        noise[:4000] -= clip
        for part in (noise[:4000], noise[4000:]):
            assert 10 * np.log10(np.mean(part**2)) == pytest.approx(decibels, abs=0.5)
    silent = buffers["silence"]
    np.testing.assert_array_equal(silent[:4000], clip)
    assert len(silent) == 9000 and not silent[4000:].any()
    assert len(in_buffer(clip, BACKGROUNDS[1], 100, seed=1)) == 4000
    again, other = (in_buffer(clip, BACKGROUNDS[1], 9000, seed) for seed in (1, 2))
    np.testing.assert_array_equal(again, buffers["-60 dBFS"])
    assert not np.array_equal(again, other)


def test_backgrounds_are_heard_at_the_rate_of_the_artifact(found):
    heard = []

    def scores(waveforms):
        heard.append([len(one) for one in waveforms])
        return np.eye(3)[np.arange(len(waveforms)) % 3]

    few = spread(found["single"], 5)
    assert len(few.source) == 4 and len(few.durations) == 4
    BufferedClips(few, 0.1).measure(scores, 32000)
    values = BufferedClips(found["multi"], 0.1).measure(scores, 16000)
    assert heard[0] == [2 * (700 + 20 * number) for number in (0, 3, 6, 9)]
    assert heard[1] == [3200] * 4 and heard[-1] == [1600] * 12
    assert values["clips"] == 12 and set(values) == {
        "clips", "alone", *(one.name for one in BACKGROUNDS)
    }  # fmt: skip


def test_names_in_a_card_are_text(tmp_path):
    classes = ["a|b", "*c*", "<d>", "e_f_g", "$x$"]
    one = card_point("a|b`c", 0.9, 20.0, precision="int8", loss_points=3.0)
    reference = {**POINTS[0], "value": 0.98}
    write_card(tmp_path, [reference, one], {**MODEL, "name": "[n](x)", "classes": classes})
    text = (tmp_path / "README.md").read_text()
    assert r"a\|b, \*c\*, \<d\>, e\_f\_g, \$x\$." in text and r"# \[n\](x)" in text
    assert r"| `` a\|b`c `` | 16 |" in text and "- `` a|b`c `` lost" in text


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


def test_a_card_that_was_edited_is_not_our_own(tmp_path):
    assert not is_own_card(tmp_path)
    cascade = {"threshold": 0.9, "reached": [1.0, 0.2], "most_ms": {"1": 30.0, "2": 20.0}}
    points = [*POINTS, card_point("both", 0.98, 12.5, patch_size="24,8", cascade=cascade)]
    write_card(tmp_path, points, {**MODEL, "name": "hoch-ä\udcff | [x]", "command": "a\rb"})
    assert is_own_card(tmp_path)
    for name in CARD:
        path = tmp_path / name
        before = path.read_bytes()
        path.write_bytes(before[:20] + b"mine" + before[20:])
        assert not is_own_card(tmp_path)
        path.write_bytes(b"mine")
        assert not is_own_card(tmp_path)
        path.unlink()
        assert not is_own_card(tmp_path)
        path.symlink_to(tmp_path / "elsewhere")
        assert not is_own_card(tmp_path)
        path.unlink()
        path.write_bytes(before)
    assert is_own_card(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "notes": "mine"}, indent=2) + "\n")
    assert not is_own_card(tmp_path)


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
    card = {"model": {"name": "x"}, "points": [POINTS[0]]}
    damages = [{**card, "points": [{**POINTS[0], name: {}}]} for name in POINT if name[0] != "l"]
    damages += [{**card, "model": {}}, {**card, "points": []}, {**card, "points": [{"name": "x"}]}]
    damages += [{**card, "points": [{**POINTS[0], "latency_ms": times}]} for times in (3, {"x": 1})]
    for content in ("{", "[" * 100_000, *map(json.dumps, damages)):
        (tmp_path / "card.json").write_text(content)
        code, _, message = choose(tmp_path)
        assert code == 1 and "card.json" in message and "Export again" in message


def test_a_buffer_that_is_refused_is_told_and_the_card_goes_on(found):
    """As a server's signature does that takes shorter clips than phones hear."""

    def scores(waveforms):
        if max(map(len, waveforms)) > 1500:
            raise ValueError("refused clip 0: at most 1500 samples")
        return np.ones((len(waveforms), 3), "float32")

    with pytest.warns(DataWarning, match=r"not measured in a buffer of 0\.1 s.*at most 1500"):
        values = BufferedClips(found["single"], 0.1).measure(scores, 16000)
    assert values["alone"] is not None
    assert [values[one.name] for one in BACKGROUNDS] == [None] * len(BACKGROUNDS)


def test_a_background_without_a_value_is_a_dash(tmp_path):
    heard = backgrounds(0.9, None, None, None, None)
    run = of_run(0.9, backgrounds=backgrounds(0.9, 0.9, None, None, None))
    write_card(tmp_path, [card_point("short", 0.9, 1.0, backgrounds=heard), run], MODEL)
    text = (tmp_path / "README.md").read_text()
    assert "| the run itself | 16 | float32 | 90.0 ± 1.0 | 0.0 | 0.0 | - | - | - |" in text
    assert "| `short` | 16 | float32 | 90.0 ± 1.0 | 0.0 | - | - | - | - |" in text
    assert read_card(tmp_path)["points"][0]["background_loss_points"]["silence"] is None
