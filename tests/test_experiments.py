"""The experiments: their generated sets, and the driver that trains, skips and reports."""

import csv
import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from helpers import ONCE, ROOT

pytest.importorskip("espeakng_loader")

from tf_data_pipelines import FbankSettings, load_source, read_data
from tf_data_pipelines.patches import patch_tokens
from tf_data_pipelines.settings import PatchSettings

PLACE = ROOT / "examples" / "experiments" / "speech_sets.py"
COUNTS = {"train": 2, "validation": 1, "test": 1}  # clips of each class


def load():
    spec = importlib.util.spec_from_file_location("speech_sets", PLACE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


speech_sets = load()
speech_sets.BABBLE_SENTENCES = 8  # the sets are tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {name: speech_sets.make_set(name, folder, **COUNTS, seed=3) for name in speech_sets.SETS}


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def rows_of(folder):
    with open(folder / speech_sets.LIST, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_split(rows, value):
    return [{value(row) for row in rows if row["split"] == split} for split in speech_sets.SPLITS]


def disjoint(sets):
    return all(sets) and sum(map(len, sets)) == len(set().union(*sets))


@pytest.mark.parametrize("name", ["words", "speakers"])
def test_a_set_is_read_in_its_layout(made, name):
    source = load_source(made[name])
    speakers = [f"id{10001 + index}" for index in range(speech_sets.SPEAKERS)]
    assert list(source.classes) == {"words": sorted(speech_sets.WORDS), "speakers": speakers}[name]
    for split, count in COUNTS.items():
        labels = [clip.labels for clip in source.clips if clip.split == split]
        assert sorted(labels) == [(c,) for c in range(len(source.classes)) for _ in range(count)]
    assert len(read_data(made[name], FbankSettings(), split="test").source.clips) == len(
        source.classes
    )


@pytest.mark.parametrize("name", ["words", "speakers"])
def test_clips_are_short_files_of_16_khz(made, name):
    low, high = {"words": (0.5, 1.6), "speakers": (0.8, 20)}[name]
    for row in rows_of(made[name]):
        info = soundfile.info(made[name] / row["path"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert low <= info.duration <= high


@pytest.mark.parametrize("name", ["words", "speakers"])
def test_a_seed_repeats_every_byte(made, name, tmp_path):
    first = digests(made[name])
    assert digests(speech_sets.make_set(name, tmp_path / "same", **COUNTS, seed=3)) == first
    other = digests(
        speech_sets.make_set(name, tmp_path / "other", train=1, validation=0, test=0, seed=4)
    )
    sounds = {value for path, value in first.items() if path.endswith(".wav")}
    assert not sounds & set(other.values())


def test_a_complete_set_is_left_alone_and_another_is_refused(made, monkeypatch):
    monkeypatch.setattr(speech_sets, "Engine", None)
    assert speech_sets.make_words(made["words"], **COUNTS, seed=3) == made["words"]
    with pytest.raises(FileExistsError, match="not the set of these arguments"):
        speech_sets.make_words(made["words"], **COUNTS, seed=4)


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(speech_sets, "_mix", None)
    with pytest.raises(TypeError):
        speech_sets.make_set("words", tmp_path, **COUNTS)
    assert not list(tmp_path.iterdir())


def test_words_share_no_voice_between_splits(made):
    rows = rows_of(made["words"])
    assert disjoint(by_split(rows, lambda row: row["voice"].partition("+")[2]))
    assert disjoint(by_split(rows, lambda row: row["path"].partition("/")[2][:8]))


def test_speakers_share_no_sentence_between_splits(made):
    rows = rows_of(made["speakers"])
    starts = tuple(f" {place} " for place in speech_sets.PLACES)

    def core(sentence):
        return min((sentence.partition(start)[0] for start in starts), key=len)

    said = [
        {
            core(s.strip(". "))
            for row in rows
            if row["split"] == split
            for s in row["text"].split(".")
        }
        - {""}
        for split in speech_sets.SPLITS
    ]
    assert disjoint(said)
    assert len({row["voice"] for row in rows}) == speech_sets.SPEAKERS


# === The driver ===


@pytest.fixture
def papers(monkeypatch):
    """The driver."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import papers

    return papers


@pytest.fixture
def place(papers, tmp_path):
    return papers.Place(tmp_path, "quick")


def result(place, name, seed, values, cascades=None):
    """Write the JSON of a run with {(sweep, point): value}."""
    import papers

    sweeps = {}
    for (sweep, point), value in values.items():
        sweeps.setdefault(sweep, []).append(
            {"point": point, "metric": "accuracy", "value": value, "standard_error": 0.01,
             "clips": 100, "operations": 1e6 / int(point.split("x")[0])
             if isinstance(point, str) else 1e6}
        )  # fmt: skip
    path = place.result(name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    run = {"name": name, "data": papers.EXPERIMENTS[name].data, "seed": seed, "sweeps": sweeps,
           "cascades": cascades or {}, **papers.result_facts(name, "quick", seed)}  # fmt: skip
    path.write_text(json.dumps(run))


def sizes(values):
    return {("patch-size", name): value for name, value in values.items()}


def test_every_experiment_is_a_recipe_that_starts_from_another_one(papers):
    for name, own in papers.EXPERIMENTS.items():
        for scale in papers.SCALES.values():
            recipe = papers.recipe_of(name, scale, 3)
            assert recipe.train.seed == 3
            assert ("size" in recipe.model) == (own.init is None)
        for other, _ in papers.before((name, 0)):
            assert [*papers.EXPERIMENTS].index(other) < [*papers.EXPERIMENTS].index(name)
    slugs = {papers.slug(name, 0) for name in papers.EXPERIMENTS}
    assert len(slugs) == len(papers.EXPERIMENTS)


def test_targets_are_differences_of_means_over_seeds(papers, place, capsys):
    from paper_experiments import LONGER

    for seed, more in ((0, 0.0), (1, 0.02)):
        result(place, "AST/16, continued", seed, sizes({"8": 0.4, "16": 0.8 + more, "32": 0.3}))
        own = {"8": 0.85, "12": 0.84, "14": 0.80, "16": 0.82, "32": 0.7, "48": 0.6}
        result(place, LONGER, seed, sizes(own), cascades={"auto": [
            {"name": "48", "value": 0.6, "operations": 1e6 / 48},
            {"name": ("8", "12")[seed], "value": 0.85, "operations": 1e6 / 8},
            {"name": "cascade", "value": 0.86, "operations": 1e6 / 32, "threshold": 0.5,
             "reached": [1, 0.5]},
            {"name": "mean", "value": 0.87, "operations": 5e6},
        ]})  # fmt: skip
    result(place, "ElasticAST", 0, {("length", 4): 0.9, ("frame-shift", 10): 0.8})
    result(place, "ElasticAST, four times as long", 0, {("length", 4): 0.92})
    for seconds, value in ((2, 0.7), (4, 0.88), (8, 0.85)):
        result(place, f"AST, {seconds} s", 0, {("length", 4): value})
    papers.report(place.results_folder, papers.results_of(place))
    lines = (place.results_folder / "targets.md").read_text()
    assert capsys.readouterr().out == lines
    assert (
        "at 8, 16, 32 against the AST trained at each | -1 or more | -; +1.0 (+0.0 to +2.0); -"
        in lines
    )
    assert "neighbors | -1 or more | -3.0 (-3.0 to -3.0); -; -; -; -; - | no | 2 |" in lines
    assert "at 48 against 16 | -4 or more | -22.0 (-22.0 to -22.0) | no | 2 |" in lines
    assert (
        "best of AST, 2 s; AST, 4 s; AST, 8 s | 0 or more | -; +2.0; -; - | not all is run | 1 |"
        in lines
    )
    assert (
        "cascade found on the validation clips (48,8; 48,12) of FlexiAST, all sizes, four times "
        in lines
    )
    assert (
        "| +1.0 (+1.0 to +1.0) against 8 at 25.0 %, +16.0 (+16.0 to +16.0) against 32; the mean of "
        "all +2.0 (+2.0 to +2.0) against 8 | yes | 2 |" in lines
    )
    assert (place.results_folder / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    assert not (place.results_folder / "patch_sizes.png").exists()  # most of it is not run
    table = (place.results_folder / "report" / "report.md").read_text()
    assert "81.0 (80.0-82.0)" in table
    for seed in (0, 1):  # each of what it is against has other seeds
        result(place, "ElasticAST", seed, {("length", 4): 0.9})
    result(place, "AST, 2 s", 0, {("length", 4): 0.7})
    result(place, "AST, 4 s", 1, {("length", 4): 0.85})
    result(place, "AST, 8 s", 0, {("length", 4): 0.88})
    place.result("AST, 4 s", 0).unlink()
    papers.report(place.results_folder, papers.results_of(place))
    assert "AST, 8 s | 0 or more | -; +2.0; -; - | not all is run | 1 |" in capsys.readouterr().out
    result(place, "AST/32", 1, sizes({"32": 0.6}))  # of one seed
    papers.report(place.results_folder, papers.results_of(place))
    assert "| -; +1.0 (+0.0 to +2.0); +10.0 | not all is run | 1-2 |" in capsys.readouterr().out


def test_figures_name_experiments_of_their_data_and_sweep(papers):
    import paper_figures

    means = {*map(paper_figures.mean_of, (paper_figures.OURS, paper_figures.LONGER))}
    assert {*means, paper_figures.MEAN_OF_ASTS} <= {*papers.EXPERIMENTS}
    for _, data, sweep, names in paper_figures.FIGURES.values():
        for name in names:
            own = papers.EXPERIMENTS[name]
            assert own.data == data and sweep in own.sweeps


def test_what_a_run_starts_from_is_made_before_it(papers, place):
    runs = papers.missing(place, names=["unified, words", "AST/32"], seeds=2)
    assert runs == [
        (name, seed) for seed in (0, 1) for name in ("AST/16", "unified, words", "AST/32")
    ]
    place.run("AST/16", 0).mkdir(parents=True)
    papers.write_json(papers.run_facts("AST/16", "quick", 0), place.facts("AST/16", 0))
    result(place, "AST/32", 0, sizes({"32": 0.5}))
    assert papers.missing(place, names=["AST/32", "AST/8"], seeds=1) == [("AST/8", 0)]


@pytest.mark.parametrize(
    "done, changed, how",
    [
        ("AST/32", "AST/32", {"times": 2}),
        ("AST/32", "AST/16", {"times": 2}),  # from which it starts
        ("AST/16, bilinear", "AST/16, bilinear", {"resize": "pi"}),
        ("AST/16, bilinear", "AST/16", {"times": 2}),
        ("mean of the ASTs of 8, 16, 32", "AST/8", {"times": 2}),
    ],
)
def test_a_result_of_another_recipe_is_refused(papers, place, monkeypatch, done, changed, how):
    result(place, done, 0, sizes({"32": 0.5}))
    assert papers.is_done(place, done, 0)
    changed_to = dataclasses.replace(papers.EXPERIMENTS[changed], **how)
    monkeypatch.setitem(papers.EXPERIMENTS, changed, changed_to)
    for ask in (
        lambda: papers.missing(place, names=[done], seeds=1),
        lambda: papers.results_of(place),  # for a report
    ):
        with pytest.raises(SystemExit, match=r"something else than paper_experiments.*--results"):
            ask()


def test_a_result_of_other_sweeps_is_refused(papers, place, monkeypatch):
    result(place, "AST/32", 0, sizes({"32": 0.5}))
    own = papers.EXPERIMENTS["AST/32"]
    monkeypatch.setitem(papers.EXPERIMENTS, "AST/32", dataclasses.replace(own, cascade=True))
    with pytest.raises(SystemExit, match="what is evaluated differs"):
        papers.is_done(place, "AST/32", 0)


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_of_another_recipe_is_refused(papers, place, monkeypatch, whole):
    run = place.run("AST/16", 0)
    (run if whole else papers.partial_of(run)).mkdir(parents=True)
    papers.write_json(papers.run_facts("AST/16", "quick", 0), place.facts("AST/16", 0))
    assert papers.is_trained(place, "AST/16", 0) is whole
    other = dataclasses.replace(papers.EXPERIMENTS["AST/16"], times=2)
    monkeypatch.setitem(papers.EXPERIMENTS, "AST/16", other)
    with pytest.raises(SystemExit, match=r"run of another recipe .* another WORK"):
        papers.train_one(place, "AST/16", 0, None)


def test_a_target_is_met_to_the_clip(papers):
    import paper_figures

    for behind in range(6, 600):
        (found,) = paper_figures.row("", -1, [100 * (behind - 6) / 600 - 100 * behind / 600])
        assert found[3] == "yes"


def test_a_run_ends_with_its_driver():
    child = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); import papers;"
        "papers.end_with(os.getppid()); print('ready', os.getpid(), flush=True); time.sleep(60)"
    )
    driver = "import subprocess, sys; subprocess.call([sys.executable, '-c', *sys.argv[1:]])"
    folder = str(ROOT / "examples" / "experiments")
    process = subprocess.Popen(
        [sys.executable, "-c", driver, child, folder], stdout=subprocess.PIPE, text=True
    )
    ready, number = process.stdout.readline().split()
    assert ready == "ready"
    process.kill()
    process.wait()
    process.stdout.read()  # ends when the last process that holds it does
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(number), 0)
            time.sleep(0.1)


@pytest.mark.parametrize("page", ["README.md", "examples/experiments/README.md"])
def test_the_pages_have_the_table_of_targets(page):
    results = ROOT / "examples" / "experiments" / "results" / "papers" / "small"
    assert (results / "targets.md").read_text().strip() in (ROOT / page).read_text()


def test_the_results_are_those_of_the_experiments(papers):
    import paper_figures

    results = ROOT / "examples" / "experiments" / "results" / "papers"
    found = papers.results_of(papers.Place(ROOT, "small", results))
    rows = paper_figures.targets([json.loads(path.read_text()) for path in found])
    written = (results / "small" / "targets.md").read_text()
    assert [row for row in rows if f"| {' | '.join(row)} |" not in written] == []


def test_sizes_are_drawn_evenly_in_their_logarithm(papers):
    from paper_experiments import ALL_SIZES, WIDE_SIZES, weights_of

    even = weights_of(ALL_SIZES)["patch_weights"]
    assert even == pytest.approx([1 / size for size in ALL_SIZES])
    wide = dict(zip(WIDE_SIZES, weights_of(WIDE_SIZES)["patch_weights"], strict=True))
    assert wide[56] == pytest.approx(4 / 56)  # 8 from the sizes beside it, not 2


@ONCE
def test_the_driver_trains_what_is_missing_and_only_that(papers, place, monkeypatch, capsys):
    """One run that starts from another one, each in a process of its own, at the smallest scale."""
    import paper_figures
    from paper_experiments import Experiment

    few = "FlexiAST, few sizes"
    how = {"names": [few, "AST/16"], "seeds": 1, "jobs": 2}
    papers.run_all(place, **how)
    lines = [line for line in capsys.readouterr().out.splitlines() if "seed" in line]
    assert [line.split(", seed")[0] for line in lines] == ["AST/16", few]
    run = json.loads(place.result(few, 0).read_text())
    assert run["trained"]["init"]["name"] == "AST/16"
    assert [one["point"] for one in run["sweeps"]["patch-size"]] == ["8", "10"]
    papers.run_all(place, **how)
    assert capsys.readouterr().out == ""
    members = ("AST/16", 16), (few, 8)
    mean = Experiment("words", {}, (), None, members=members)
    monkeypatch.setitem(papers.EXPERIMENTS, "mean", mean)
    papers.run_one(place, "mean", 0)
    found = json.loads(place.result("mean", 0).read_text())["members"]
    assert [one["name"] for one in found] == ["AST/16 at 16", f"{few} at 8", "mean"]
    assert all(one["clips"] == 2 * len(speech_sets.WORDS) for one in found)
    swept = json.loads(place.result(few, 0).read_text())["sweeps"]["patch-size"]
    assert found[1]["value"] == pytest.approx(swept[0]["value"], abs=0.05)
    for module in (papers, paper_figures):
        monkeypatch.setattr(module, "COSTED", {few: "1 pass"})
    monkeypatch.setattr(papers, "COST_SIZES", (16, 32))
    monkeypatch.setattr(papers, "SPECIALISTS", {})  # they are exported the same way
    papers.measure_costs(place)
    costs = json.loads((place.results_folder / "cost.json").read_text())["points"]
    assert [one["patch_size"] for one in costs] == ["16", "32", "32,16"]
    assert all(one["latency_ms"]["1"] > 0 for one in costs)
    papers.report(place.results_folder, papers.results_of(place))
    assert (place.results_folder / "cost.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(papers, "_in_process", lambda *_: (1, 0.0))
    names = ["AST/8", "ElasticAST, average"]
    failed = papers.run_all(place, names=names, seeds=1, jobs=1)
    assert [one.split(":")[0] for one in failed] == [
        f"{name}, seed 0" for name in ("AST/8", "AST/16, average", "ElasticAST, average")
    ]
    assert "what it starts from failed" in failed[-1]


# === Questions of the papers ===


def test_a_ridge_changes_the_tokens(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "experiments"))
    import conditioning

    from tf_data_pipelines.resize import kernel_matrix

    for size in conditioning.SIZES:
        np.testing.assert_allclose(
            conditioning.ridge_matrix(0.0)(size, 16), kernel_matrix(size), atol=1e-9
        )
    assert conditioning.amplification(16) == 1 < conditioning.amplification(18)
    spectrogram = np.random.default_rng(0).normal(size=(64, 128)).astype("float32")

    def tokens():
        return patch_tokens(spectrogram, PatchSettings((20,)))[0].numpy()

    found = [conditioning.with_ridge(ridge, tokens) for ridge in (0.0, 0.1)]
    assert np.abs(found[1]).sum() < 0.9 * np.abs(found[0]).sum()
    np.testing.assert_array_equal(tokens(), found[0])  # nothing is left changed
