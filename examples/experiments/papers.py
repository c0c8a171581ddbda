"""The experiments of FlexiAST and ElasticAST, and ours, on speech that anyone can make.

python examples/experiments/papers.py WORK [--scale small|gpu|quick] [--jobs 1] [--only NAME;...]
    [--seeds 3] [--costs] [--report] [--results FOLDER]

WORK holds the data sets and the runs, and in WORK/results (or FOLDER) a JSON for each run, as
`flexast report` reads them. What is done is skipped, also after a kill; a run or a result of
another recipe is refused. --costs exports those of seed 0 and measures a clip's time. --report
writes tables and pictures of what is done, alone. paper_experiments.py says what is trained; each
run is a process of its own, and --jobs of them go at a time.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
from paper_experiments import (
    CASCADES,
    COST_SIZES,
    COSTED,
    EXPERIMENTS,
    LENGTHS,
    SCALES,
    SHIFTS,
    SPECIALISTS,
    points_of,
    recipe_of,
    stages_text,
)
from paper_figures import COSTS, report
from speech_sets import make_set

from keras_flexast.evaluation import evaluate_cascade, score_clips
from keras_flexast.export import export_run
from keras_flexast.files import partial_of
from keras_flexast.inference.classifier import load_classifier
from keras_flexast.interrupts import end_on_interrupt
from keras_flexast.runs import load_run, versions
from keras_flexast.sweeps import evaluate_sweep
from keras_flexast.training import train_run
from tf_data_pipelines import load_source, read_data
from tf_data_pipelines.atomic import atomic_write


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the data sets, the runs and the results of a scale are.

    Args:
        work: folder of data sets, runs and logs.
        scale_name: key of SCALES.
        results: folder of the results of all scales; None for `results` in `work`.
    """

    work: pathlib.Path
    scale_name: str
    results: pathlib.Path | None = None

    @property
    def results_folder(self):
        return (self.results or self.work / "results") / self.scale_name

    def run(self, name, seed):
        return self.work / "runs" / self.scale_name / slug(name, seed)

    def result(self, name, seed):
        return self.results_folder / f"{slug(name, seed)}.json"

    def facts(self, name, seed):
        """File that says what a run in `work` is of."""
        return self.run(name, seed).with_suffix(".json")

    def log(self, name, seed):
        return self.work / "logs" / self.scale_name / f"{slug(name, seed)}.log"

    def data(self, name):
        """Folder of a data set, made where it is missing."""
        counts = SCALES[self.scale_name].clips[name]
        splits = dict(zip(("train", "validation", "test"), counts, strict=True))
        return make_set(name, self.work / self.scale_name, **splits)


# === One run, in a process of its own ===


def slug(name, seed):
    """Name of the files of a run."""
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}_{seed}"


def run_one(place, name, seed):
    """Train an experiment, evaluate it, and write its JSON."""
    own = EXPERIMENTS[name]
    folder = place.data(own.data)
    if own.members:
        found = {"sweeps": {}, "members": evaluate_mean(own, folder, place, seed)}
    else:
        seconds = None if own.trained else train_one(place, name, seed, folder)
        run = place.run(own.trained or name, seed)
        quick = place.scale_name == "quick"
        found = {"seconds": seconds, **evaluate_one(own, folder, run, quick=quick)}
    result = {
        "name": name, "data": own.data, "seed": seed, **found,
        **result_facts(name, place.scale_name, seed), "versions": versions(),
        "machine": machine_here(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    write_json(result, place.result(name, seed))


# === What runs and results are of: others must not take their places ===


def run_facts(name, scale_name, seed):
    """Recipe and clips of a run, and of those that it starts and learns from."""
    own, scale = EXPERIMENTS[name], SCALES[scale_name]
    facts = {
        "name": name, "scale": scale_name, "clips": scale.clips[own.data], "seed": seed,
        "recipe": recipe_of(name, scale, seed).to_dict(),
    }  # fmt: skip
    for kind in ("init", "teacher"):
        other = getattr(own, kind)
        facts[kind] = run_facts(other, scale_name, seed) if other else None
    return json.loads(json.dumps(facts))  # tuples are lists in a file


def result_facts(name, scale_name, seed):
    """What was trained for a result, and what is evaluated."""
    own = EXPERIMENTS[name]
    if own.members:
        trained = [run_facts(other, scale_name, seed) for other, _ in own.members]
        evaluated = {"members": own.members}
    else:
        trained = run_facts(own.trained or name, scale_name, seed)
        evaluated = {
            "sweeps": swept_points(own, quick=scale_name == "quick"), "resize": own.resize,
            "cascades": [*map(stages_text, CASCADES if own.cascade else ())],
        }  # fmt: skip
    return json.loads(json.dumps({"trained": trained, "evaluated": evaluated}))


def is_trained(place, name, seed):
    """Whether a run is in WORK as a whole; SystemExit where it is of another recipe."""
    run, path = place.run(name, seed), place.facts(name, seed)
    if not run.exists() and not partial_of(run).exists():
        return False
    there = run if run.exists() else partial_of(run)
    facts = run_facts(name, place.scale_name, seed)
    if not path.exists() or json.loads(path.read_text()) != facts:
        why = "another recipe than" if path.exists() else f"a recipe that no {path.name} tells, not"
        raise SystemExit(
            f"{there} is a run of {why} what paper_experiments.py has now for {name!r} and what it "
            f"starts from. Delete it, or choose another WORK."
        )
    return run.exists()


def is_done(place, name, seed):
    """Whether there is a result; SystemExit where it is of something else."""
    path = place.result(name, seed)
    if not path.exists():
        return False
    found, facts = json.loads(path.read_text()), result_facts(name, place.scale_name, seed)
    if differing := [key for key in facts if found.get(key) != facts[key]]:
        raise SystemExit(
            f"{path} is a result of something else than paper_experiments.py has now for {name!r}: "
            f"what is {' and '.join(differing)} differs. Delete it, or choose another folder with "
            f"--results."
        )
    return True


def results_of(place):
    """Files of all results of the experiments, each checked as by `is_done`."""
    found = []
    for name in EXPERIMENTS:
        for path in sorted(place.results_folder.glob(slug(name, "*") + ".json")):
            seed = path.stem.rpartition("_")[2]
            if seed.isdecimal():
                is_done(place, name, int(seed))
                found.append(path)
    costs = place.results_folder / COSTS
    if costs.exists() and json.loads(costs.read_text()).get("trained") != costs_facts(place):
        raise SystemExit(f"{costs} is of other runs. Measure again with --costs, or delete it.")
    return found


def write_json(values, path):
    atomic_write(path, json.dumps(values, indent=1) + "\n")


def train_one(place, name, seed, folder):
    """Train what is missing; seconds, or None where it went on after a kill or was there."""
    if is_trained(place, name, seed):
        return None
    own, out = EXPERIMENTS[name], place.run(name, seed)
    recipe = recipe_of(name, SCALES[place.scale_name], seed)
    for kind in ("init", "teacher"):
        if other := getattr(own, kind):
            recipe = recipe.replaced(**{kind: str(place.run(other, seed))})
    start, resume = time.perf_counter(), partial_of(out).exists()
    write_json(run_facts(name, place.scale_name, seed), place.facts(name, seed))
    train_run(folder, out, **recipe.arguments(), resume=resume)
    return None if resume else round(time.perf_counter() - start, 1)


def swept_points(own, quick):
    """{sweep: points} of an experiment."""
    points = {"patch-size": points_of(own), "length": LENGTHS, "frame-shift": SHIFTS}
    return {sweep: points[sweep][: 2 if quick else None] for sweep in own.sweeps}


def evaluate_one(own, folder, run_folder, quick):
    """Sweeps and cascades of a run, of each result what is reported."""
    run, found = load_run(run_folder), {}
    run = run.resized(own.resize) if own.resize else run
    data = read_data(folder, run.fbank, classes=run.classes, split="test", shares=run.shares)
    for sweep, points in swept_points(own, quick=quick).items():
        swept = evaluate_sweep(run, data, sweep, points=points)
        keys = ("point", "metric", "value", "standard_error", "clips", "tokens", "rows",
                "operations")  # fmt: skip
        found[sweep] = [{key: one[key] for key in keys} for one in swept["sweeps"][sweep]]
    keys = "name", "value", "operations", "threshold", "reached", "clips"
    cascades = {
        stages_text(stages): [
            {key: one[key] for key in keys if key in one}
            for one in evaluate_cascade(run, folder, stages)
        ]
        for stages in (CASCADES if own.cascade else ())
    }
    return {"sweeps": found, "cascades": cascades}


def evaluate_mean(own, folder, place, seed):
    """Accuracy of each member, and of the mean of their scores, in the form of a cascade."""
    source = load_source(folder).split("test")
    files, found, total = [clip.path for clip in source.clips], [], 0
    for name, size in own.members:
        classifier = load_classifier(place.run(name, seed), size)
        scores = np.asarray(classifier.predict_files(files).scores)
        total = total + scores / len(own.members)
        found.append({"name": f"{name} at {size}", **score_clips(source, scores)})
    return [*found, {"name": "mean", **score_clips(source, total)}]


def costed():
    """{experiment: patch sizes} of the exported files of the costs."""
    flexible = dict.fromkeys(COSTED, COST_SIZES)
    return {**flexible, **{name: (size,) for size, name in SPECIALISTS.items()}}


def costs_facts(place):
    """What was trained for the costs."""
    return [run_facts(name, place.scale_name, 0) for name in costed()]


def measure_costs(place):
    """Accuracy and time of a clip in `.tflite` files of seed 0, written to cost.json."""
    if missing := [str(place.run(name, 0)) for name in costed() if not is_trained(place, name, 0)]:
        raise SystemExit(f"--costs needs {', '.join(missing)}. Train them first, without --costs.")
    folder, found = place.data("words"), []
    for name, sizes in costed().items():
        out = place.work / "exports" / place.scale_name / slug(name, 0)
        shutil.rmtree(out, ignore_errors=True)
        export_run(
            place.run(name, 0), out, patch_sizes=sizes, formats=("mobile",),
            precisions=("float32",), data=folder,
        )  # fmt: skip
        for one in json.loads((out / "card.json").read_text())["points"]:
            if name not in COSTED or "_multi" in one["path"]:  # the file of all sizes
                keys = "patch_size", "value", "standard_error", "clips", "latency_ms"
                kept = {key: one[key] for key in keys}
                found.append({"name": name, **kept, "cascade": one.get("cascade")})
    values = {
        "trained": costs_facts(place), "points": found, "machine": machine_here(),
        "date": time.strftime("%Y-%m-%d"), "versions": versions(),
    }  # fmt: skip
    write_json(values, place.results_folder / COSTS)


def machine_here():
    if keras.backend.backend() == "jax":
        import jax

        device = jax.devices()[0].device_kind
    else:
        import tensorflow as tf

        device = tf.config.list_logical_devices()[-1].device_type
    return f"{platform.machine()}, {os.cpu_count()} cores, {device}"


# === All runs ===


def run_all(place, *, names, seeds, jobs):
    """Train what is missing, each run after the one that it starts from; what failed, and why."""
    waiting = missing(place, names=names, seeds=seeds)
    for data in sorted({EXPERIMENTS[name].data for name, _ in waiting}):
        place.data(data)
    unfinished, running, failed = {*waiting}, {}, {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        while waiting or running:
            for one in [*waiting]:
                needs = before(one)
                if any(other in failed for other in needs):
                    failed[one] = "what it starts from failed"
                    waiting.remove(one)
                elif len(running) < jobs and not any(other in unfinished for other in needs):
                    waiting.remove(one)
                    running[threads.submit(_in_process, place, *one)] = one
            if not running:
                continue
            done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            for future in done:
                one = running.pop(future)
                unfinished.discard(one)
                code, seconds = future.result()
                print(f"{one[0]}, seed {one[1]}: {'done' if not code else f'exit code {code}'} "
                      f"after {seconds:.0f} s", flush=True)  # fmt: skip
                if code:
                    failed[one] = f"exit code {code}, see {place.log(*one)}"
    return [f"{name}, seed {seed}: {why}" for (name, seed), why in failed.items()]


def missing(place, *, names, seeds):
    """(name, seed) of the runs to make, and of those that they need and that are not in WORK."""
    found = {}

    def add(one):
        for other in before(one):
            if not is_trained(place, *other):
                add(other)
        found[one] = None

    for seed in range(seeds):
        for name in names:
            if not is_done(place, name, seed):
                add((name, seed))
    return [*found]


def before(one):
    """(name, seed) of the runs that a run needs."""
    name, seed = one
    own = EXPERIMENTS[name]
    others = own.init, own.teacher, own.trained, *(other for other, _ in own.members)
    return [(other, seed) for other in dict.fromkeys(others) if other]


def _in_process(place, name, seed):
    """Exit code and seconds of a run in a process of its own, which ends with this one."""
    start = time.perf_counter()
    path = place.log(name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, __file__, str(place.work), "--scale", place.scale_name, "--results"),
        *(str(place.results_folder.parent), "--one", name, str(seed), str(os.getpid())),
    ]
    with path.open("a") as log:
        code = subprocess.call(command, stdout=log, stderr=log)
    return code, time.perf_counter() - start


def end_with(driver):
    """End this process where its driver, the process of that number, was killed."""

    def watch():
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)  # what was saved is whole, and the next driver goes on from there

    threading.Thread(target=watch, daemon=True).start()


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
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    place = Place(given.work, given.scale, given.results)
    if given.one:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver's, which ends this one
        name, seed, driver = given.one
        end_with(int(driver))
        run_one(place, name, int(seed))
    else:
        names = given.only.split(";") if given.only else [*EXPERIMENTS]
        if unknown := [name for name in names if name not in EXPERIMENTS]:
            parser.error(f"--only {unknown[0]!r} is none of {'; '.join(EXPERIMENTS)}.")
        if given.jobs < 1:
            parser.error("--jobs must be at least 1.")
        if not given.costs:
            results_of(place)  # what is stale is refused before hours of work
        failed = []
        if given.costs:
            measure_costs(place)
        elif not given.report:
            leave = end_on_interrupt(
                lambda: f"Stopped. What is done is in {place.work}; the same command goes on."
            )
            try:  # the runs end with this process
                failed = run_all(place, names=names, seeds=given.seeds, jobs=given.jobs)
            except KeyboardInterrupt:
                leave()
        for one in failed:
            print(one, file=sys.stderr)
        try:
            report(place.results_folder, results_of(place))
        except (OSError, ValueError) as error:  # such as a report that was edited
            raise SystemExit(f"{error}") from None
        raise SystemExit(1 if failed else 0)
