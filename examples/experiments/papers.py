"""The experiments of FlexiAST and ElasticAST, and ours, on speech that anyone can make.

python examples/experiments/papers.py WORK [--scale small|gpu|quick] [--jobs 1] [--only NAME,...]
    [--seeds 3] [--report]

WORK holds the data sets and the runs. What is done is skipped, also after a kill: there is one
JSON for each run in results/papers/SCALE/ beside this file, as `flexast report` reads them.
--report writes their tables and pictures and the table of targets. EXPERIMENTS below says what is
trained; each run is a process of its own, and --jobs of them go at a time.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

from keras_flexast.settings import Recipe, TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings, FbankSettings

RESULTS = pathlib.Path(__file__).parent / "results" / "papers"  # or $FLEXAST_RESULTS
RESULTS = pathlib.Path(os.environ.get("FLEXAST_RESULTS", RESULTS))
ALL_SIZES = tuple(range(8, 49, 2))
WIDE_SIZES = (4, 6, *ALL_SIZES, 56, 64)
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 20)  # seconds
SHIFTS = (10, 15, 20, 30, 40)  # milliseconds
# From AST/16, with as many passes as the flexible ones.
SPECIALISTS = {8: "AST/8", 16: "AST/16, continued", 32: "AST/32"}
GRID = (8, 128)  # cells of the position tables: 20 s, the longest sentences
STAGES = (48, 24, 8)  # of the cascade
OURS = "FlexiAST, all sizes"
BETWEEN = {14: (12, 16), 18: (16, 20), 22: (20, 24), 28: (24, 30), 36: (32, 40), 44: (40, 48)}
SWEPT_SIZES = (*PATCH_SIZES, *BETWEEN, (16, 12), (24, 16))


def weights_of(sizes):
    """Options of patches that draw sizes evenly in the logarithm of the size."""
    return {"patch_weights": tuple(1 / size for size in sizes)}


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
        "nano", {"words": (120, 25, 50), "speakers": (25, 8, 16)},
        scratch_epochs=60, epochs={"words": 15, "speakers": 30},
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
        f"AST, {shift} ms": Experiment(
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
    "FlexiAST, sizes 4 to 64": Experiment(
        **WORDS, recipe={"patch_sizes": WIDE_SIZES, "patches": weights_of(WIDE_SIZES)}
    ),
    # From scratch, where the model differs
    "FlexiAST, from scratch": Experiment(**WORDS, recipe={}, init=None),
    "AST/16 as published": Experiment(
        **WORDS, recipe={**AT_16, "model": {"pooling": "cls", **GRIDDED}}, init=None
    ),
    "FlexiAST as published": Experiment(
        **WORDS, recipe={"model": GRIDDED, "patches": {"clips_per_draw": 16}},
        init="AST/16 as published",
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


def recipe_of(name, scale, seed):
    """The Recipe of an experiment, without where it starts from."""
    own = EXPERIMENTS[name]
    given = dict(own.recipe)
    base = Recipe(
        TrainSettings(
            epochs=scale.epochs[own.data] if own.init else scale.scratch_epochs,
            learning_rate=scale.learning_rates[bool(own.init)],
            optimizer="muon", betas=(0.9, 0.99), weight_decay=0.05, decay_all=False,
            batch_clips=scale.batch_clips, seed=seed, dtype=scale.dtype,
        ),
        AugmentSettings(**{"gain_db": 6.0, **given.pop("augment", {})}),
        model={} if own.init else {"size": scale.size, "grid": GRID},
    )  # fmt: skip
    model = {**base.model, **given.pop("model", {})}
    return base.replaced(model=model, **given)


def set_of(data, work, scale_name):
    """Folder of a data set, made where it is missing."""
    from speech_sets import make_set

    counts = dict(zip(("train", "validation", "test"), SCALES[scale_name].clips[data], strict=True))
    return make_set(data, work / scale_name, **counts)


# === One run, in a process of its own ===


def slug(name, seed):
    """Name of the files of a run."""
    words = name.lower().replace("/", "-").replace(",", "").split()
    return f"{'-'.join(words)}_{seed}"


def run_one(work, scale_name, name, seed):
    """Train an experiment, evaluate it, and write its JSON."""
    from keras_flexast.evaluation import evaluate_cascade
    from keras_flexast.runs import load_run
    from keras_flexast.sweeps import evaluate_sweep
    from keras_flexast.training import train_run
    from tf_data_pipelines import read_data

    own, scale = EXPERIMENTS[name], SCALES[scale_name]
    out = work / "runs" / scale_name / slug(own.trained or name, seed)
    recipe, partial = recipe_of(name, scale, seed), out.with_name(f"{out.name}.partial")
    for kind in ("init", "teacher"):
        if other := getattr(own, kind):
            recipe = recipe.replaced(**{kind: str(out.with_name(slug(other, seed)))})
    folder = set_of(own.data, work, scale_name)
    start, seconds = time.perf_counter(), None
    if not out.exists():
        resume = partial.exists()
        train_run(folder, out, **recipe.arguments(), resume=resume)
        seconds = None if resume else round(time.perf_counter() - start, 1)
    run = load_run(out)
    run = run.resized(own.resize) if own.resize else run
    found = {}
    data = read_data(folder, run.fbank, classes=run.classes, split="test", shares=run.shares)
    for sweep in own.sweeps:
        points = {"patch-size": points_of(own), "length": LENGTHS, "frame-shift": SHIFTS}[sweep]
        points = points[:2] if scale_name == "quick" else points
        swept = evaluate_sweep(run, data, sweep, points=points)["sweeps"][sweep]
        found[sweep] = [
            {key: one[key] for key in ("point", "metric", "value", "standard_error", "clips",
                                       "tokens", "rows", "operations")}
            for one in swept
        ]  # fmt: skip
    cascade = []
    if own.cascade:
        for one in evaluate_cascade(run, folder, STAGES):
            keys = "name", "value", "operations", "threshold", "reached", "clips"
            cascade.append({key: one[key] for key in keys if key in one})
    result = {
        "name": name, "data": own.data, "seed": seed, "sweeps": found, "cascade": cascade,
        "scale": scale_name, "size": scale.size, "epochs": recipe.train.epochs,
        "seconds": seconds, "init": own.init, "versions": run.made_by["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device()}",
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    path = result_path(scale_name, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def points_of(experiment):
    """Patch sizes of an evaluation: those along one axis where the training has no others."""
    sizes = experiment.recipe.get("patch_sizes", PATCH_SIZES)
    if any(isinstance(size, tuple) for size in sizes):
        return sizes
    return (*SWEPT_SIZES, 4, 6, 56, 64) if sizes == WIDE_SIZES else SWEPT_SIZES


def _device():
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    import tensorflow as tf

    return tf.config.list_logical_devices()[-1].device_type


# === All runs ===


def run_all(work, scale_name, *, names, seeds, jobs):
    """Train what is missing, each run after the one that it starts from."""
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
    if failed:
        raise SystemExit("\n".join(f"{name}, seed {seed}: {why}"
                                   for (name, seed), why in failed.items()))  # fmt: skip


def missing(work, scale_name, *, names, seeds):
    """(name, seed) of the runs to make, and of those that they need and that are not in WORK."""
    found = {}

    def add(one):
        for other in before(one):
            if not (work / "runs" / scale_name / slug(*other)).exists():
                add(other)
        found[one] = None

    for seed in range(seeds):
        for name in names:
            if not result_path(scale_name, name, seed).exists():
                add((name, seed))
    return [*found]


def before(one):
    """(name, seed) of the runs that a run needs."""
    name, seed = one
    own = EXPERIMENTS[name]
    return [(other, seed) for other in (own.init, own.teacher, own.trained) if other]


def result_path(scale_name, name, seed):
    return RESULTS / scale_name / f"{slug(name, seed)}.json"


def log_path(work, scale_name, name, seed):
    return work / "logs" / scale_name / f"{slug(name, seed)}.log"


def _in_process(work, scale_name, name, seed):
    start = time.perf_counter()
    path = log_path(work, scale_name, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(work), "--scale", scale_name, "--one", name, str(seed)]
    with path.open("a") as log:
        code = subprocess.call(command, stdout=log, stderr=log)
    return code, time.perf_counter() - start


# === What it says ===


def report(scale_name):
    """Tables and pictures of what is done, the table of targets, and accuracy against cost."""
    from keras_flexast.report import read_results, write_report

    folder = RESULTS / scale_name
    files = sorted(folder.glob("*_[0-9]*.json"))
    write_report(read_results(files), folder / "report", overwrite=True)
    runs = [json.loads(path.read_text()) for path in files]
    rows = ["| | to reach | reached |", "|---|---|---|"]
    rows += [f"| {' | '.join(row)} |" for row in targets(runs)]
    (folder / "targets.md").write_text("\n".join(rows) + "\n")
    draw_costs(runs, folder / "cost.png")
    print("\n".join(rows))


def targets(runs):
    """(what, to reach, reached) of each target whose runs are there."""

    def at(name, data, sweep, point):
        """{seed: percent}."""
        return {
            run["seed"]: 100 * one["value"]
            for run in runs if (run["name"], run["data"]) == (name, data)
            for one in run["sweeps"].get(sweep, ()) if str(one["point"]) == str(point)
        }  # fmt: skip

    def minus(a, b):
        """Mean difference over the seeds that both have; None where there are none."""
        both = a.keys() & b.keys()
        return statistics.mean(a[seed] - b[seed] for seed in both) if both else None

    def size(point, name=OURS):
        return at(name, "words", "patch-size", point)

    def row(what, reach, *numbers):
        texts = ["-" if one is None else f"{one:+.1f}" for one in numbers]
        return [(what, reach, ", ".join(texts))] if {*texts} != {"-"} else []

    rows = []
    for name in ("FlexiAST", "FlexiAST, distilled", OURS):
        own = [minus(size(p, name), size(p, fixed)) for p, fixed in SPECIALISTS.items()]
        rows += row(f"{name} against the AST trained at 8, 16, 32", "-1 or more", *own)
    for name in ("FlexiAST", OURS):
        dips = []
        for point, (low, high) in BETWEEN.items():
            share, below, above = (point - low) / (high - low), size(low, name), size(high, name)
            line = {
                seed: (1 - share) * below[seed] + share * above[seed]
                for seed in below.keys() & above.keys()
            }
            dips.append(minus(size(point, name), line))
        rows += row(f"{name} at {', '.join(map(str, BETWEEN))} against the line between the "
                    f"neighbors", "-1 or more", *dips)  # fmt: skip
        rows += row(f"{name} at 48 against 16", "-4 or more", minus(size(48, name), size(16, name)))
        rows += row(f"{name} at 8 against 16", "0 or more", minus(size(8, name), size(16, name)))
    away = [minus(size(p, "AST/16"), size(p, "AST/16, bilinear")) for p in (8, 12, 24, 32)]
    rows += row("AST/16 at 8, 12, 24, 32: PI-resize against bilinear", "the papers': ahead", *away)
    for name in ("time", "frequency"):
        both = [
            minus(at(f"FlexiAST, {name}", "speakers", "patch-size", point),
                  at("FlexiAST, both axes", "speakers", "patch-size", p))
            for p in (8, 32, 48) for point in [f"16x{p}" if name == "time" else f"{p}x16"]
        ]  # fmt: skip
        rows += row(f"patch sizes along {name} at 8, 32, 48 against both axes", "ahead", *both)
    for second in (4, 8, 20):
        fixed = [at(f"AST, {s} s", "speakers", "length", second) for s in (2, 4, 8)]
        best = max(fixed, key=lambda one: statistics.mean(one.values()) if one else -1)
        rows += row(
            f"ElasticAST against the best fixed-length AST, clips cut after {second} s",
            "ahead",
            minus(at("ElasticAST", "speakers", "length", second), best),
        )
    shifts = [
        minus(at("ElasticAST, mixed frame shifts", "speakers", "frame-shift", shift),
              at(name, "speakers", "frame-shift", shift))
        for shift, name in ((10, "ElasticAST"), *((s, f"AST, {s} ms") for s in (20, 30, 40)))
    ]  # fmt: skip
    rows += row("mixed frame shifts at 10, 20, 30, 40 ms against training at each", "-2 or more",
                *shifts)  # fmt: skip
    unified = [minus(size(p, "unified, words"), size(p, OURS)) for p in (8, 16, 32, 48)]
    rows += row(f"unified against {OURS} at 8, 16, 32, 48", "-1.5 or more", *unified)
    lengths = [
        minus(at("unified, speakers", "speakers", "length", s),
              at("ElasticAST", "speakers", "length", s)) for s in (2, 4, 8, 20)
    ]  # fmt: skip
    rows += row("unified against ElasticAST at 2, 4, 8, 20 s", "-1.5 or more", *lengths)
    for run in runs:
        if run["cascade"]:
            *stages, cascade, mean = run["cascade"]
            best = max(stages, key=lambda one: one["value"])
            rows.append((
                f"cascade {','.join(one['name'] for one in stages)} of {run['name']}, seed "
                f"{run['seed']}, against its best size ({best['name']})",
                "0 or more at 50 % of its cost",
                f"{100 * (cascade['value'] - best['value']):+.1f} at "
                f"{100 * cascade['operations'] / best['operations']:.0f} %; the mean of all sizes "
                f"{100 * (mean['value'] - best['value']):+.1f}",
            ))  # fmt: skip
    return rows


def draw_costs(runs, path):
    """Accuracy against operations of a clip: the flexible models, their cascades, the ASTs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    words = [run for run in runs if run["data"] == "words" and run["seed"] == 0]
    for run in words:
        points = run["sweeps"]["patch-size"]
        for own in (str(p) for p, name in SPECIALISTS.items() if name == run["name"]):
            for point in (one for one in points if one["point"] == own):
                axes.plot(point["operations"], 100 * point["value"], "k*", ms=10)
                axes.annotate(f"AST/{own}", (point["operations"], 100 * point["value"]), fontsize=8,
                              xytext=(5, -10), textcoords="offset points")  # fmt: skip
        if run["cascade"]:
            square = sorted((one for one in points if "x" not in one["point"]),
                            key=lambda one: one["operations"])  # fmt: skip
            (line,) = axes.plot(
                [one["operations"] for one in square],
                [100 * one["value"] for one in square],
                ".-",
                label=run["name"],
            )
            for one, marker in zip(run["cascade"][-2:], "DP", strict=True):
                axes.plot(
                    one["operations"],
                    100 * one["value"],
                    marker,
                    color=line.get_color(),
                    ms=8,
                    label=f"{run['name']}: {one['name']} of {','.join(map(str, STAGES))}",
                )
    axes.set(xscale="log", xlabel="operations of a clip", ylabel="accuracy (%)",
             title="Words, seed 0: one model, cascades, specialists")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", help="names of experiments, separated by semicolons")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="tables of what is done, alone")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run_one(given.work, given.scale, given.one[0], int(given.one[1]))
    else:
        names = given.only.split(";") if given.only else [*EXPERIMENTS]
        if unknown := [name for name in names if name not in EXPERIMENTS]:
            parser.error(f"--only {unknown[0]!r} is none of {'; '.join(EXPERIMENTS)}.")
        if given.jobs < 1:
            parser.error("--jobs must be at least 1.")
        if not given.report:
            run_all(given.work, given.scale, names=names, seeds=given.seeds, jobs=given.jobs)
        report(given.scale)
