"""The experiments of FlexiAST and ElasticAST, and ours, on speech that anyone can make.

python examples/experiments/papers.py WORK [--scale small|gpu|quick] [--jobs 1] [--only NAME;...]
    [--seeds 3] [--costs] [--report] [--results FOLDER]

WORK holds the data sets and the runs, and in WORK/results (or FOLDER) a JSON for each run, as
`flexast report` reads them. What is done is skipped, also after a kill; a result of another
recipe is refused. --costs exports those of seed 0 and measures a clip's time. --report writes
tables and pictures of what is done, alone. EXPERIMENTS below says what is trained; each run is a
process of its own, and --jobs of them go at a time. On two threads of one x86-64 core, 18 of the
runs of a seed at the small scale took two hours beside other work.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

from keras_flexast.settings import BETWEEN_SIZES, Recipe, TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings, FbankSettings

RESULTS = None  # folder of the JSONs, from the command line
ALL_SIZES = tuple(range(8, 49, 2))
WIDE_SIZES = (4, *ALL_SIZES, 56, 64)
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 20)  # seconds
SHIFTS = (10, 15, 20, 30, 40)  # milliseconds
# From AST/16, with as many passes as the flexible ones.
SPECIALISTS = {8: "AST/8", 16: "AST/16, continued", 32: "AST/32"}
GRID = (8, 128)  # cells of the position tables: 20 s, the longest sentences
STAGES = (48, 24, 8)  # of the cascade
COST_SIZES, COSTS = (8, 12, 16, 24, 32, 40, 48), "cost.json"  # whose cascade is that of STAGES
OURS = "FlexiAST, all sizes"
BETWEEN = {
    size: (max(p for p in PATCH_SIZES if p < size), min(p for p in PATCH_SIZES if p > size))
    for size in BETWEEN_SIZES
}
SWEPT_SIZES = (*PATCH_SIZES, *BETWEEN, (16, 12), (24, 16))


def weights_of(sizes):
    """Options of patches that draw sizes evenly in the logarithm of the size."""
    ends = 2 * sizes[0] - sizes[1], *sizes, 2 * sizes[-1] - sizes[-2]
    gaps = [(after - before) / 4 for before, after in zip(ends, ends[2:], strict=False)]
    return {"patch_weights": tuple(gap / size for gap, size in zip(gaps, sizes, strict=True))}


EVENLY = weights_of(ALL_SIZES)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained, and how fast."""

    size: str
    clips: dict  # of each data set: clips of each class for training, validation and test
    scratch_epochs: int = 1
    epochs: dict = dataclasses.field(default_factory=lambda: {"words": 1, "speakers": 1})
    learning_rates: tuple = (4e-3, 2e-3)  # from scratch, and from another run
    batch_clips: int = 16
    dtype: str = "float32"


SCALES = {
    "quick": Scale("nano", {"words": (4, 2, 2), "speakers": (4, 2, 2)}),
    "small": Scale(
        "nano", {"words": (360, 25, 50), "speakers": (75, 8, 16)},
        scratch_epochs=20, epochs={"words": 5, "speakers": 10},
    ),
    "gpu": Scale(
        "tiny", {"words": (200, 30, 60), "speakers": (60, 10, 20)},
        scratch_epochs=100, epochs={"words": 40, "speakers": 60},
        learning_rates=(3e-3, 1e-3), batch_clips=64, dtype="mixed_bfloat16",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One row of the tables: what is trained, and what it is evaluated on."""

    data: str
    recipe: dict  # what is replaced in the recipe of all
    sweeps: tuple = ("patch-size",)
    init: str | None = "AST/16"  # name of the experiment that it starts from; None from scratch
    teacher: str | None = None
    cascade: bool = False
    trained: str | None = None  # another experiment, whose run is evaluated
    resize: str | None = None  # of the evaluation
    times: int = 1  # as many passes as others
    members: tuple = ()  # (experiment, patch size) whose mean scores are evaluated; nothing trained


WORDS, SPEAKERS = {"data": "words"}, {"data": "speakers"}
AT_16 = {"patch_sizes": (16,)}
GRIDDED = {"position": "grid", "remainder": "crop"}  # as the papers
ALL_SWEEPS = ("patch-size", "length", "frame-shift")
# AST/16 on words is what all others start from, as the papers' start from AudioSet's.
EXPERIMENTS = {
    # FlexiAST, on words
    "AST/16": Experiment(**WORDS, recipe=AT_16, init=None),
    "AST/16, bilinear": Experiment(**WORDS, recipe={}, trained="AST/16", resize="bilinear"),
    "AST/16, continued": Experiment(**WORDS, recipe=AT_16),
    "AST/8": Experiment(**WORDS, recipe={"patch_sizes": (8,)}),
    "AST/32": Experiment(**WORDS, recipe={"patch_sizes": (32,)}),
    "FlexiAST": Experiment(**WORDS, recipe={}),
    OURS: Experiment(**WORDS, recipe={"patch_sizes": ALL_SIZES, "patches": EVENLY}, cascade=True),
    # ElasticAST, on speakers
    "ElasticAST": Experiment(**SPEAKERS, recipe=AT_16, sweeps=("length", "frame-shift")),
    **{
        f"AST, {seconds} s": Experiment(
            **SPEAKERS, sweeps=("length",),
            recipe={**AT_16, "fbank": FbankSettings(clip_ms=1000 * seconds)},
        )
        for seconds in (2, 4, 8)
    },
    "ElasticAST, mixed frame shifts": Experiment(
        **SPEAKERS, recipe={**AT_16, "augment": {"frame_shift_range_ms": (10, 40)}},
        sweeps=("length", "frame-shift"),
    ),
    **{
        f"ElasticAST, {shift} ms": Experiment(
            **SPEAKERS, recipe={**AT_16, "frame_shifts_ms": (shift,)}, sweeps=("frame-shift",)
        )
        for shift in (20, 30, 40)
    },
    # Ours: any patch size, native length and any frame shift, in the same rows
    **{
        f"unified, {data}": Experiment(
            data, {"patch_sizes": ALL_SIZES, "patches": EVENLY,
                   "augment": {"frame_shift_range_ms": (10, 40)}},
            sweeps=ALL_SWEEPS, cascade=data == "words",
        )
        for data in ("words", "speakers")
    },
    # The ablations of both papers
    "FlexiAST, distilled": Experiment(**WORDS, recipe={}, teacher="AST/16"),
    "FlexiAST, bilinear": Experiment(**WORDS, recipe={"model": {"resize": "bilinear"}}),
    **{
        f"FlexiAST, {axis}": Experiment(**SPEAKERS, recipe={"patch_sizes": sizes})
        for axis, sizes in {
            "both axes": PATCH_SIZES,
            "time": tuple((16, size) for size in PATCH_SIZES),
            "frequency": tuple((size, 16) for size in PATCH_SIZES),
        }.items()
    },
    # Which sizes it is trained on
    "FlexiAST, few sizes": Experiment(**WORDS, recipe={"patch_sizes": (8, 16, 32, 48)}),
    "FlexiAST, sizes uniformly": Experiment(**WORDS, recipe={"patch_sizes": ALL_SIZES}),
    "FlexiAST, large sizes often": Experiment(
        **WORDS, recipe={"patch_sizes": ALL_SIZES, "patches": {"patch_weights": ALL_SIZES}}
    ),
    "FlexiAST, all sizes, four times as long": Experiment(
        **WORDS, recipe={"patch_sizes": ALL_SIZES, "patches": EVENLY}, times=4, cascade=True,
    ),
    "FlexiAST, sizes 4 to 64": Experiment(
        **WORDS, recipe={"patch_sizes": WIDE_SIZES, "patches": weights_of(WIDE_SIZES)}
    ),
    # One model at three sizes, and three models: equal cost
    "mean of one model at 8, 16, 32": Experiment(
        **WORDS, recipe={}, sweeps=(), init=None, members=tuple((OURS, p) for p in SPECIALISTS),
    ),
    "mean of the ASTs of 8, 16, 32": Experiment(
        **WORDS, recipe={}, sweeps=(), init=None,
        members=tuple((name, p) for p, name in SPECIALISTS.items()),
    ),
    # From scratch, where the model differs
    "FlexiAST, from scratch": Experiment(**WORDS, recipe={}, init=None),
    "AST/16, the papers' grid and [CLS]": Experiment(
        **WORDS, recipe={**AT_16, "model": {"pooling": "cls", **GRIDDED}}, init=None
    ),
    "FlexiAST, the papers' grid and [CLS]": Experiment(
        **WORDS, recipe={"model": GRIDDED, "patches": {"clips_per_draw": "a batch"}},
        init="AST/16, the papers' grid and [CLS]",
    ),
    "AST/16, average": Experiment(
        **WORDS, recipe={**AT_16, "model": {"pooling": "mean"}}, init=None
    ),
    "ElasticAST, average": Experiment(
        **SPEAKERS, recipe=AT_16, sweeps=("length",), init="AST/16, average"
    ),
    "AST/16, joint table": Experiment(
        **WORDS, recipe={**AT_16, "model": {"table": "joint"}}, init=None
    ),
}  # fmt: skip


FIGURES = {  # file: title, data set, sweep, and the experiments that are lines
    "patch_sizes": (
        "One flexible model, and ASTs of one size (FlexiAST, Figure 1 and Table 1)", "words",
        "patch-size", ("AST/8", "AST/16, continued", "AST/32", "FlexiAST", OURS, "unified, words"),
    ),
    "resize": (
        "PI-resize and bilinear (FlexiAST, Figures 4b and 5)", "words", "patch-size",
        ("AST/16", "AST/16, bilinear", "FlexiAST", "FlexiAST, bilinear"),
    ),
    "starts": (
        "From an AST, with it as teacher, from scratch (FlexiAST, Figure 4b)", "words",
        "patch-size", ("FlexiAST", "FlexiAST, distilled", "FlexiAST, from scratch"),
    ),
    "axes": (
        "Patch sizes along one axis, and along both at fewer tokens (FlexiAST, Figure 4a)",
        "speakers", "patch-size",
        tuple(f"FlexiAST, {axis}" for axis in ("both axes", "time", "frequency")),
    ),
    "lengths": (
        "Native and fixed lengths, clips cut after so many seconds (ElasticAST, Figure 4)",
        "speakers", "length",
        ("ElasticAST", *(f"AST, {s} s" for s in (2, 4, 8)), "ElasticAST, average",
         "unified, speakers"),
    ),
    "frame_shifts": (
        "Mixed and single frame shifts (ElasticAST, Figure 5)", "speakers", "frame-shift",
        ("ElasticAST", *(f"ElasticAST, {s} ms" for s in (20, 30, 40)),
         "ElasticAST, mixed frame shifts", "unified, speakers"),
    ),
    "sizes": (
        "Which sizes are trained", "words", "patch-size",
        ("FlexiAST", OURS, "FlexiAST, few sizes", "FlexiAST, sizes uniformly",
         "FlexiAST, large sizes often", "FlexiAST, sizes 4 to 64",
         "FlexiAST, all sizes, four times as long"),
    ),
    "models": (
        "Other poolings, positions and tables", "words", "patch-size",
        ("AST/16", "AST/16, the papers' grid and [CLS]", "AST/16, average", "AST/16, joint table",
         "FlexiAST", "FlexiAST, the papers' grid and [CLS]"),
    ),
}  # fmt: skip


def recipe_of(name, scale, seed):
    """The Recipe of an experiment, without where it starts from."""
    own = EXPERIMENTS[name]
    given = dict(own.recipe)
    base = Recipe(
        TrainSettings(
            epochs=own.times * (scale.epochs[own.data] if own.init else scale.scratch_epochs),
            learning_rate=scale.learning_rates[bool(own.init)],
            optimizer="muon", betas=(0.9, 0.99), weight_decay=0.05, decay_all=False,
            batch_clips=scale.batch_clips, seed=seed, dtype=scale.dtype,
        ),
        AugmentSettings(**{"gain_db": 6.0, **given.pop("augment", {})}),
        model={} if own.init else {"size": scale.size, "grid": GRID},
    )  # fmt: skip
    model = {**base.model, **given.pop("model", {})}
    if "clips_per_draw" in given.get("patches", {}):
        given["patches"] = {"clips_per_draw": scale.batch_clips}
    return base.replaced(model=model, **given)


def set_of(data, work, scale_name):
    """Folder of a data set, made where it is missing."""
    from speech_sets import make_set

    counts = dict(zip(("train", "validation", "test"), SCALES[scale_name].clips[data], strict=True))
    return make_set(data, work / scale_name, **counts)


# === One run, in a process of its own ===


def slug(name, seed):
    """Name of the files of a run."""
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}_{seed}"


def run_one(work, scale_name, name, seed):
    """Train an experiment, evaluate it, and write its JSON."""
    own = EXPERIMENTS[name]
    folder = set_of(own.data, work, scale_name)
    if own.members:
        members = evaluate_mean(own, folder, work=work, scale_name=scale_name, seed=seed)
        found = {"sweeps": {}, "members": members}
    else:
        out = run_path(work, scale_name, own.trained or name, seed)
        seconds = None
        if not own.trained:
            recipe = recipe_of(name, SCALES[scale_name], seed)
            for kind in ("init", "teacher"):
                if other := getattr(own, kind):
                    recipe = recipe.replaced(**{kind: str(run_path(work, scale_name, other, seed))})
            seconds = train_one(recipe, folder, out)
        found = {"seconds": seconds} | evaluate_one(own, folder, out, quick=scale_name == "quick")
    result = {
        "name": name, "data": own.data, "seed": seed, **found, **facts_of(name, scale_name, seed),
        "versions": versions_here(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device()}",
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    write_json(result, result_path(scale_name, name, seed))


def facts_of(name, scale_name, seed):
    """What a result is of: another one of the same name must not take its place."""
    own, scale = EXPERIMENTS[name], SCALES[scale_name]
    facts = {"scale": scale_name, "clips": scale.clips[own.data]}
    if own.members:
        facts["of"] = own.members
    else:
        trained = own.trained or name
        facts |= {"init": EXPERIMENTS[trained].init, "teacher": EXPERIMENTS[trained].teacher,
                  "recipe": recipe_of(trained, scale, seed).to_dict()}  # fmt: skip
    return json.loads(json.dumps(facts))  # tuples are lists in a file


def is_done(scale_name, name, seed):
    """Whether there is a result; SystemExit where it is of another recipe."""
    path = result_path(scale_name, name, seed)
    if not path.exists():
        return False
    found, facts = json.loads(path.read_text()), facts_of(name, scale_name, seed)
    if differing := [key for key in facts if found.get(key) != facts[key]]:
        raise SystemExit(
            f"{path} is a result of another {' and '.join(differing)} than EXPERIMENTS has now. "
            f"Delete it, or choose another folder with --results."
        )
    return True


def write_json(values, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(values, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def versions_here():
    from keras_flexast.runs import versions

    return versions()


def train_one(recipe, folder, out):
    """Train what is missing; seconds, or None where it went on after a kill or was there."""
    from keras_flexast.training import train_run

    if out.exists():
        return None
    start, resume = time.perf_counter(), out.with_name(f"{out.name}.partial").exists()
    train_run(folder, out, **recipe.arguments(), resume=resume)
    return None if resume else round(time.perf_counter() - start, 1)


def evaluate_one(own, folder, out, quick):
    """Sweeps and cascade of a run, of each result what is reported."""
    from keras_flexast.evaluation import evaluate_cascade
    from keras_flexast.runs import load_run
    from keras_flexast.sweeps import evaluate_sweep
    from tf_data_pipelines import read_data

    run, found = load_run(out), {}
    run = run.resized(own.resize) if own.resize else run
    data = read_data(folder, run.fbank, classes=run.classes, split="test", shares=run.shares)
    for sweep in own.sweeps:
        points = {"patch-size": points_of(own), "length": LENGTHS, "frame-shift": SHIFTS}[sweep]
        swept = evaluate_sweep(run, data, sweep, points=points[:2] if quick else points)
        keys = ("point", "metric", "value", "standard_error", "clips", "tokens", "rows",
                "operations")  # fmt: skip
        found[sweep] = [{key: one[key] for key in keys} for one in swept["sweeps"][sweep]]
    cascade = evaluate_cascade(run, folder, STAGES) if own.cascade else []
    keys = "name", "value", "operations", "threshold", "reached", "clips"
    return {
        "sweeps": found,
        "cascade": [{key: one[key] for key in keys if key in one} for one in cascade],
    }


def evaluate_mean(own, folder, *, work, scale_name, seed):
    """Accuracy of each member, and of the mean of their scores, in the form of a cascade."""
    import numpy as np

    from keras_flexast.evaluation import score_clips
    from keras_flexast.inference.classifier import load_classifier
    from tf_data_pipelines import load_source

    source = load_source(folder).split("test")
    files, found, total = [clip.path for clip in source.clips], [], 0
    for name, size in own.members:
        classifier = load_classifier(run_path(work, scale_name, name, seed), size)
        scores = np.asarray(classifier.predict_files(files).scores)
        total = total + scores / len(own.members)
        found.append({"name": f"{name} at {size}", **score_clips(source, scores)})
    return [*found, {"name": "mean", **score_clips(source, total)}]


def points_of(experiment):
    """Patch sizes of an evaluation: those along one axis where the training has no others."""
    sizes = experiment.recipe.get("patch_sizes", PATCH_SIZES)
    if any(isinstance(size, tuple) for size in sizes):
        return sizes
    return (*SWEPT_SIZES, 4, 6, 56, 64) if sizes == WIDE_SIZES else SWEPT_SIZES


def measure_costs(work, scale_name):
    """Accuracy and time of a clip in `.tflite` files of seed 0, written to cost.json."""
    import shutil

    from keras_flexast.export import export_run

    paths = [run_path(work, scale_name, name, 0) for name in (OURS, *SPECIALISTS.values())]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise SystemExit(f"--costs needs {', '.join(missing)}. Train them first, without --costs.")
    folder, found = set_of("words", work, scale_name), []
    for name, sizes in ((OURS, COST_SIZES), *((name, (p,)) for p, name in SPECIALISTS.items())):
        out = work / "exports" / scale_name / slug(name, 0)
        shutil.rmtree(out, ignore_errors=True)
        export_run(
            run_path(work, scale_name, name, 0), out, patch_sizes=sizes, formats=("mobile",),
            precisions=("float32",), data=folder,
        )  # fmt: skip
        for one in json.loads((out / "card.json").read_text())["points"]:
            if name != OURS or "_multi" in one["path"]:  # the file of all sizes
                keys = "patch_size", "value", "standard_error", "clips", "latency_ms"
                kept = {key: one[key] for key in keys}
                found.append({"name": name, **kept, "cascade": one.get("cascade")})
    values = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "points": found,
              "date": time.strftime("%Y-%m-%d"), "versions": versions_here()}  # fmt: skip
    write_json(values, RESULTS / scale_name / COSTS)


def _device():
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    import tensorflow as tf

    return tf.config.list_logical_devices()[-1].device_type


# === All runs ===


def run_all(work, scale_name, *, names, seeds, jobs):
    """Train what is missing, each run after the one that it starts from; what failed, and why."""
    for data in sorted({EXPERIMENTS[name].data for name in names}):
        set_of(data, work, scale_name)
    waiting = missing(work, scale_name, names=names, seeds=seeds)
    asked, running, failed = {*waiting}, {}, {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        while waiting or running:
            for one in [*waiting]:
                needs = before(one)
                if any(other in failed for other in needs):
                    failed[one] = "what it starts from failed"
                    waiting.remove(one)
                elif len(running) < jobs and not any(other in asked for other in needs):
                    waiting.remove(one)
                    running[threads.submit(_in_process, work, scale_name, *one)] = one
            if not running:
                continue
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                one = running.pop(future)
                asked.discard(one)
                code, seconds = future.result()
                print(f"{one[0]}, seed {one[1]}: {'done' if not code else f'exit code {code}'} "
                      f"after {seconds:.0f} s", flush=True)  # fmt: skip
                if code:
                    failed[one] = f"exit code {code}, see {log_path(work, scale_name, *one)}"
    return [f"{name}, seed {seed}: {why}" for (name, seed), why in failed.items()]


def missing(work, scale_name, *, names, seeds):
    """(name, seed) of the runs to make, and of those that they need and that are not in WORK."""
    found = {}

    def add(one):
        for other in before(one):
            if not run_path(work, scale_name, *other).exists():
                add(other)
        found[one] = None

    for seed in range(seeds):
        for name in names:
            if not is_done(scale_name, name, seed):
                add((name, seed))
    return [*found]


def before(one):
    """(name, seed) of the runs that a run needs."""
    name, seed = one
    own = EXPERIMENTS[name]
    others = own.init, own.teacher, own.trained, *(other for other, _ in own.members)
    return [(other, seed) for other in dict.fromkeys(others) if other]


def run_path(work, scale_name, name, seed):
    return work / "runs" / scale_name / slug(name, seed)


def result_path(scale_name, name, seed):
    return RESULTS / scale_name / f"{slug(name, seed)}.json"


def log_path(work, scale_name, name, seed):
    return work / "logs" / scale_name / f"{slug(name, seed)}.log"


def _in_process(work, scale_name, name, seed):
    start = time.perf_counter()
    path = log_path(work, scale_name, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, __file__, str(work), "--scale", scale_name, "--results", str(RESULTS)),
        *("--one", name, str(seed)),
    ]
    with path.open("a") as log:
        code = subprocess.call(command, stdout=log, stderr=log)
    return code, time.perf_counter() - start


# === What it says ===


def report(scale_name):
    """Tables and pictures of what is done, the table of targets, and accuracy against cost."""
    from keras_flexast.report import read_results, write_report

    folder = RESULTS / scale_name
    files = sorted(folder.glob("*_[0-9]*.json"))
    runs = [json.loads(path.read_text()) for path in files]
    swept = [path for path, run in zip(files, runs, strict=True) if run["sweeps"]]
    if not swept:
        raise SystemExit(f"nothing is done yet in {folder}.")
    results = read_results(swept)
    write_report(results, folder / "report", overwrite=True)
    for file, (title, *what) in FIGURES.items():
        draw_lines(results, folder / f"{file}.png", title, *what)
    rows = ["| | to reach | reached, in points | met | seeds |", "|---|---|---|---|---|"]
    rows += [f"| {' | '.join(row)} |" for row in targets(runs)]
    errors = {one["data"]: 0 for one in results}
    for one in results:
        errors[one["data"]] = max(errors[one["data"]], 100 * one["standard_error"])
    texts = (f"{error:.1f} on {data}" for data, error in errors.items())
    note = f"Standard error of one accuracy by its clips, in points: up to {', '.join(texts)}."
    rows += ["", note]
    (folder / "targets.md").write_text("\n".join(rows) + "\n")
    costs = folder / COSTS
    if costs.exists():
        draw_costs(json.loads(costs.read_text()), folder / "cost.png")
    print("\n".join(rows))


def targets(runs):
    """(what, to reach, reached, met, seeds) of each target whose runs are there.

    Reached is the mean of the differences over the seeds, in points, and their least and most.
    """

    def at(name, data, sweep, point):
        """{seed: percent}."""
        return {
            run["seed"]: 100 * one["value"]
            for run in runs if (run["name"], run["data"]) == (name, data)
            for one in run["sweeps"].get(sweep, ()) if str(one["point"]) == str(point)
        }  # fmt: skip

    def minus(a, b):
        """Differences of the seeds that both have."""
        return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]

    def size(point, name=OURS):
        return at(name, "words", "patch-size", point)

    def row(what, least, *differences):
        """A target of at least so many points in each of the differences."""
        found = [one for one in differences if one]
        if not found:
            return []
        texts = [_spread(one) for one in differences]
        if any(statistics.mean(one) < least for one in found):
            met = "no"
        else:
            met = "yes" if len(found) == len(differences) else "not all is run"
        seeds = {*map(len, found)}
        count = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)}-{max(seeds)}"
        return [(what, f"{least:g} or more", "; ".join(texts), met, count)]

    def lengths_against(name, others, seconds):
        """Differences to the best of others at each length, by the mean of the common seeds."""
        found = []
        for second in seconds:
            own = at(name, "speakers", "length", second)
            known = [at(other, "speakers", "length", second) for other in others]
            known = [one for one in known if one] or [{}]  # what is not run is not in the title
            seeds = own.keys() & set.intersection(*(set(one) for one in known))
            best = max(known, key=lambda one: sum(one[seed] for seed in seeds))
            found.append([own[seed] - best[seed] for seed in sorted(seeds)])
        return found

    rows = []
    for name in ("FlexiAST", "FlexiAST, distilled", OURS, f"{OURS}, four times as long"):
        own = [minus(size(p, name), size(p, fixed)) for p, fixed in SPECIALISTS.items()]
        rows += row(f"{name} at 8, 16, 32 against the AST trained at each", -1, *own)
    for name in ("FlexiAST", OURS, f"{OURS}, four times as long"):
        dips = []
        for point, (low, high) in BETWEEN.items():
            share, below, above = (point - low) / (high - low), size(low, name), size(high, name)
            line = {
                seed: (1 - share) * below[seed] + share * above[seed]
                for seed in below.keys() & above.keys()
            }
            dips.append(minus(size(point, name), line))
        rows += row(f"{name} at {', '.join(map(str, BETWEEN))} against the line between the "
                    f"neighbors", -1, *dips)  # fmt: skip
        rows += row(f"{name} at 48 against 16", -4, minus(size(48, name), size(16, name)))
        rows += row(f"{name} at 8 against 16", 0, minus(size(8, name), size(16, name)))
    away = [minus(size(p, "AST/16"), size(p, "AST/16, bilinear")) for p in (8, 12, 24, 32)]
    rows += row("AST/16 at 8, 12, 24, 32: PI-resize against bilinear", 0, *away)
    away = [minus(size(p, "FlexiAST"), size(p, "FlexiAST, bilinear")) for p in (8, 16, 32, 48)]
    rows += row("FlexiAST at 8, 16, 32, 48: PI-resize against bilinear", 0, *away)
    for name in ("time", "frequency"):
        both = [
            minus(at(f"FlexiAST, {name}", "speakers", "patch-size", point),
                  at("FlexiAST, both axes", "speakers", "patch-size", p))
            for p in (8, 32, 48) for point in [f"16x{p}" if name == "time" else f"{p}x16"]
        ]  # fmt: skip
        what = f"patch sizes along {name} alone, 8, 32, 48, against along both (other costs)"
        rows += row(what, 0, *both)
    ran = {run["name"] for run in runs}
    cut = [name for name in (f"AST, {s} s" for s in (2, 4, 8)) if name in ran] or ["AST, 2 s"]
    named = "; ".join(cut)
    rows += row(f"ElasticAST on clips cut after 2, 4, 8, 20 s, against the best of {named}", 0,
                *lengths_against("ElasticAST", cut, (2, 4, 8, 20)))  # fmt: skip
    shifts = [
        minus(at("ElasticAST, mixed frame shifts", "speakers", "frame-shift", shift),
              at(name, "speakers", "frame-shift", shift))
        for shift, name in ((10, "ElasticAST"), *((s, f"ElasticAST, {s} ms") for s in (20, 30, 40)))
    ]  # fmt: skip
    rows += row("mixed frame shifts at 10, 20, 30, 40 ms against training at each", -2, *shifts)
    unified = [minus(size(p, "unified, words"), size(p, OURS)) for p in (8, 16, 32, 48)]
    rows += row(f"unified at 8, 16, 32, 48 against {OURS}", -1.5, *unified)
    rows += row("unified on clips cut after 2, 4, 8, 20 s, against ElasticAST", -1.5,
                *lengths_against("unified, speakers", ["ElasticAST"], (2, 4, 8, 20)))  # fmt: skip
    means = [
        {run["seed"]: 100 * run["members"][-1]["value"] for run in runs if run["name"] == name}
        for name in ("mean of one model at 8, 16, 32", "mean of the ASTs of 8, 16, 32")
    ]
    rows += row("mean of one model's scores at 8, 16, 32 against that of three ASTs", 0,
                minus(*means))  # fmt: skip
    for name, own in EXPERIMENTS.items():
        cascades = [run["cascade"] for run in runs if own.cascade and run["name"] == name]
        if cascades:
            rows.append(_cascade_row(name, cascades))
    return rows


def _cascade_row(name, cascades):
    """The target of the cascades of an experiment, one of each seed."""
    gains, means, costs = [], [], []
    for *stages, cascade, mean in cascades:
        best = max(stages, key=lambda one: one["value"])
        gains.append(100 * (cascade["value"] - best["value"]))
        means.append(100 * (mean["value"] - best["value"]))
        costs.append(100 * cascade["operations"] / best["operations"])
    met = statistics.mean(gains) >= 0 and statistics.mean(costs) <= 50
    return (
        f"cascade {','.join(map(str, STAGES))} of {name} against the best of the three sizes",
        "0 or more at 50 % of its cost or less",
        f"{_spread(gains)} at {statistics.mean(costs):.0f} %; the mean of all three "
        f"{_spread(means)}",
        "yes" if met else "no",
        str(len(cascades)),
    )


def _spread(differences):
    """Mean of the differences, and their least and most."""
    if not differences:
        return "-"
    mean = f"{statistics.mean(differences):+.1f}"
    if len(differences) == 1:
        return mean
    return f"{mean} ({min(differences):+.1f} to {max(differences):+.1f})"


def draw_lines(results, path, title, data, sweep, names):
    """One figure of the papers, of the experiments that are done."""
    from keras_flexast.figures import sweep_figure
    from keras_flexast.report import join_results, report_tables
    from keras_flexast.settings import SWEEPS

    found = [one for name in names for one in results
             if (one["name"], one["data"], one["sweep"]) == (name, data, sweep)]  # fmt: skip
    if sweep == "patch-size":
        found = [{**one, "point": _side(one)} for one in found if _side(one)]
    done = {one["name"] for one in found}
    if 2 * len(done) <= len(names):  # a title that promises more than is drawn
        return
    joined = join_results(found)
    (table,) = report_tables(joined)
    sweep_figure(joined[data][sweep], table.points, path, title=title, xlabel=SWEEPS[sweep],
                 ylabel="accuracy (%)")  # fmt: skip


def _side(result):
    """The side of a patch that training changes; None for other patches that are not square."""
    freq, *time = str(result["point"]).split("x")
    if not time or result["name"].endswith("frequency"):
        return freq
    return time[0] if result["name"].endswith("time") else None


def draw_costs(measured, path):
    """Accuracy against a clip's time: the flexible model, its cascade, the ASTs of one size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()

    def draw(point, *args, **kwargs):
        place = point["latency_ms"]["1"], 100 * point["value"]
        axes.plot(*place, *args, **kwargs)
        axes.annotate(point["patch_size"], place, (5, -11), textcoords="offset points", fontsize=8)

    ours = [one for one in measured["points"] if one["name"] == OURS]
    sizes = sorted((one for one in ours if not one["cascade"]),
                   key=lambda one: one["latency_ms"]["1"])  # fmt: skip
    axes.plot([one["latency_ms"]["1"] for one in sizes], [100 * one["value"] for one in sizes],
              "C0-", label="one flexible model at each size")  # fmt: skip
    for one in sizes:
        draw(one, "C0o")
    cascades = [one for one in ours if one["cascade"]]
    for one in cascades:
        draw(one, "C1D", ms=9, label="its cascade, on average")
    for number, one in enumerate(p for p in measured["points"] if p["name"] != OURS):
        draw(one, "k*", ms=11, label=None if number else "an AST for each size")
    axes.set(
        xscale="log", xlabel="milliseconds of a clip of the longest word, one thread, .tflite",
        ylabel="accuracy (%)", title="Words, seed 0: accuracy against time",
    )  # fmt: skip
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", help="names of experiments, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--costs",
        action="store_true",
        help="accuracy and time of exported models, where nothing else runs",
    )
    parser.add_argument("--report", action="store_true", help="tables of what is done, alone")
    parser.add_argument("--results", type=pathlib.Path, help="WORK/results where it is left out")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    RESULTS = given.results or given.work / "results"
    if given.one:
        run_one(given.work, given.scale, given.one[0], int(given.one[1]))
    else:
        names = given.only.split(";") if given.only else [*EXPERIMENTS]
        if unknown := [name for name in names if name not in EXPERIMENTS]:
            parser.error(f"--only {unknown[0]!r} is none of {'; '.join(EXPERIMENTS)}.")
        if given.jobs < 1:
            parser.error("--jobs must be at least 1.")
        failed = []
        if given.costs:
            measure_costs(given.work, given.scale)
        elif not given.report:
            how = {"names": names, "seeds": given.seeds, "jobs": given.jobs}
            failed = run_all(given.work, given.scale, **how)
        report(given.scale)
        raise SystemExit("\n".join(failed))
