"""Which recipe suits a few hundred clips? Trainings on three small sets, beside a plain CNN.

python examples/experiments/small_folder.py WORK [--only NAME,...] [--sets NAME,...] [--seeds 3]
    [--init RUN] [--results FOLDER] [--report]

WORK holds the data sets and the runs, and in WORK/results (or FOLDER) a JSON for each run. What is
done is skipped, also after a kill; a result of another recipe is refused. --report prints a table.

    plain         what train_run does without a recipe: the tiny model, no augmentation
    small-folder  the recipe
    cnn           a plain CNN of 0.3 M weights, for the seconds of small-folder of the same seed
    no mixup      small-folder without mixup, in 105 epochs
    more fine     that, with fine patches drawn more often, in 80 epochs
    attention     that, with attention pooling in place of the mean
    sizes alike   that, with all patch sizes drawn equally often, in 60 epochs
    batch 32      that, with twice as many clips in a batch
    adamw         that, with AdamW at the learning rate that suited it
    all tokens    sizes alike without token dropout, in 40 epochs: about as many seconds
    one size      sizes alike at patch 16 alone
    distilled     sizes alike, half of whose loss is what "one size" of the same seed says
    from RUN      small-folder-init, from the run --init
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import time

import keras
import numpy as np
from rich.console import Console
from rich.table import Table
from small_sets import SETS, make_set

from keras_flexast.evaluation import evaluate_cascade, evaluate_run
from keras_flexast.files import partial_of
from keras_flexast.recipes import load_recipe
from keras_flexast.settings import Recipe
from keras_flexast.training import train_run
from tf_data_pipelines import read_data
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.fbank import features
from tf_data_pipelines.settings import PATCH_SIZES, FbankSettings

SIZES = (8, 16, 24, 32, 48)
CASCADES = {"48,24,8": (48, 24, 8), "auto": None}  # see evaluate_cascade
OURS = load_recipe("small-folder")
FINE = {8: 1 / 4, 10: 1 / 3, 12: 1 / 2}
NO_MIXUP = OURS.replaced(
    augment=dataclasses.replace(OURS.augment, mixup=0.0),
    train=dataclasses.replace(OURS.train, epochs=105),
)
MORE_FINE = NO_MIXUP.replaced(
    patches={"patch_weights": tuple(FINE.get(size, 1) for size in PATCH_SIZES)},
    train=dataclasses.replace(OURS.train, epochs=80),
)
ATTENTION = MORE_FINE.replaced(model={"size": "nano"})
ALIKE = ATTENTION.replaced(patches={}, train=dataclasses.replace(OURS.train, epochs=60))
BATCH_32 = dataclasses.replace(ALIKE.train, batch_clips=32)
VARIANTS = {
    "plain": Recipe(),
    "small-folder": OURS,
    "no mixup": NO_MIXUP,
    "more fine": MORE_FINE,
    "attention": ATTENTION,
    "sizes alike": ALIKE,
    "batch 32": ALIKE.replaced(train=BATCH_32),
    "adamw": ALIKE.replaced(
        train=dataclasses.replace(BATCH_32, optimizer="adamw", learning_rate=2e-3)
    ),
    "all tokens": ALIKE.replaced(
        augment=dataclasses.replace(ALIKE.augment, token_dropout=0.0),
        train=dataclasses.replace(ALIKE.train, epochs=40),
    ),
    "one size": ALIKE.replaced(patch_sizes=(16,)),
    "distilled": ALIKE,
    "from RUN": load_recipe("small-folder-init"),
}


def train_variant(recipe, data, out, seed, **more):
    """What is found of a training, its seconds and its epochs.

    What is found is {split: {patch size: accuracy}}, and under "cascades" what `evaluate_cascade`
    finds of the test clips, for each of CASCADES.
    """
    start = time.perf_counter()
    train = dataclasses.replace(recipe.train, seed=seed)
    recipe = recipe.replaced(train=train, **more)
    run, _ = train_run(data, out, **recipe.arguments())
    seconds = time.perf_counter() - start
    found = {
        split: {
            result["name"]: result["value"]
            for result in evaluate_run(run, data, patch_sizes=SIZES, split=split)
        }
        for split in ("test", "validation")
    }
    keys = "name", "value", "operations", "threshold", "reached"
    found["cascades"] = {
        name: [
            {key: one[key] for key in keys if key in one}
            for one in evaluate_cascade(run, data, stages)
        ]
        for name, stages in CASCADES.items()
    }
    return found, seconds, train.epochs


# === A plain CNN ===

FIXED_SECONDS = 2.0
WIDTHS = (16, 32, 64, 128)  # 0.3 M weights
CNN_RATE = 1e-3
BATCH_NORM = 0.8  # momentum: the averages must follow within some 60 steps


def plain_cnn(frames, mel_bins, classes):
    """Four blocks of two 3x3 convolutions, batch norm and pooling; then the global average."""
    x = inputs = keras.Input((frames, mel_bins, 1))
    for width in WIDTHS:
        for _ in range(2):
            x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
            x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=BATCH_NORM)(x))
        x = keras.layers.MaxPooling2D(2)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


class Clock(keras.callbacks.Callback):
    """Ends a training after so many seconds; the learning rate falls with them as a cosine."""

    def __init__(self, seconds, rate):
        super().__init__()
        self.seconds, self.rate = seconds, rate

    def on_train_begin(self, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = self.rate * (1 + math.cos(math.pi * self.passed)) / 2

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = self.passed >= 1

    @property
    def passed(self):
        return min(1.0, (time.perf_counter() - self.start) / self.seconds)


def train_cnn(folder, seconds, seed):
    """{"test": {"2 s": accuracy}} of the CNN after so many seconds, its seconds and its epochs.

    The seconds are those of `fit`, as it compiles, trains and validates after each epoch; the last
    epoch may be a part of one.
    """
    rate, rng = FbankSettings.sample_rate, np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    data = read_data(folder, FbankSettings())
    fbank = FbankSettings(mean=data.mean, std=data.std)
    parts = {name: data.split(name).source for name in ("train", "validation", "test")}
    heard = {name: [clip.read(rate) for clip in part.clips] for name, part in parts.items()}
    size = round(FIXED_SECONDS * rate) + fbank.window - fbank.shift

    def cut(waveform, start):
        short = waveform[start : start + size]
        return features(np.pad(short, (0, size - len(short))), fbank).numpy()[..., None]

    def batches():
        labels = parts["train"].targets()
        while True:
            for chosen in np.array_split(rng.permutation(len(labels)), -(-len(labels) // 32)):
                clips = (heard["train"][place] for place in chosen)
                starts = ((clip, rng.integers(max(0, len(clip) - size) + 1)) for clip in clips)
                yield np.stack([cut(*pair) for pair in starts]), labels[chosen]

    labels = {name: part.targets() for name, part in parts.items()}
    middles = {
        name: np.stack([cut(clip, max(0, len(clip) - size) // 2) for clip in heard[name]])
        for name in ("validation", "test")
    }
    steps = -(-len(parts["train"]) // 32)
    best = keras.callbacks.ModelCheckpoint(
        folder.with_name(f"{folder.name}_cnn.weights.h5"), "val_accuracy",
        save_best_only=True, save_weights_only=True,
    )  # fmt: skip

    model = plain_cnn(*middles["test"].shape[1:3], len(data.source.classes))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(CNN_RATE), loss, metrics=["accuracy"])
    start = time.perf_counter()
    history = model.fit(
        batches(), steps_per_epoch=steps, epochs=10**6, verbose=2,
        callbacks=[Clock(seconds, CNN_RATE), best],
        validation_data=(middles["validation"], labels["validation"]),
    )  # fmt: skip
    spent, epochs = time.perf_counter() - start, len(history.epoch)
    model.load_weights(best.filepath)
    found = np.argmax(model.predict(middles["test"], verbose=0), -1) == labels["test"]
    return {"test": {"2 s": float(found.mean())}}, spent, epochs


# === What is missing is trained ===


def facts_of(results, data, name, seed):
    """What a result is of; of "from RUN" without the run."""
    if name == "cnn":
        settings = {"seconds": FIXED_SECONDS, "widths": WIDTHS, "rate": CNN_RATE}
        ours = result_of(results, data, "small-folder", seed)
        allowed = json.loads(ours.read_text())["seconds"] if ours.exists() else None
        return {"recipe": {**settings, "widths": [*WIDTHS]}, "allowed": allowed}
    train = dataclasses.replace(VARIANTS[name].train, seed=seed)
    facts = {"recipe": json.loads(json.dumps(VARIANTS[name].replaced(train=train).to_dict()))}
    if name == "distilled":
        facts["taught_by"] = facts_of(results, data, "one size", seed)["recipe"]
    return facts


def result_of(results, data, name, seed):
    return results / f"{data}_{name.replace(' ', '-')}_{seed}.json"


def is_done(results, data, name, seed):
    """Whether there is a result; SystemExit where it is of something else."""
    path = result_of(results, data, name, seed)
    if not path.exists():
        return False
    found, facts = json.loads(path.read_text()), facts_of(results, data, name, seed)
    if differing := [key for key in facts if found.get(key) != facts[key]]:
        raise SystemExit(
            f"{path} is of another {' and '.join(differing)} than {name!r} is now. Delete it, or "
            f"choose another folder with --results."
        )
    return True


def before(results, data, name, seed):
    """The result of a run that another one needs."""
    path = result_of(results, data, name, seed)
    if not is_done(results, data, name, seed):
        raise SystemExit(f"{path} is missing: run --only {name!r} first.")
    return path


def run_all(work, results, *, names, places, seeds, init):
    for seed in range(seeds):
        for name in names:
            for data in places:
                if not is_done(results, data, name, seed):
                    run_one(work, results, data, name, seed=seed, init=init)


def run_one(work, results, data, name, *, seed, init):
    """Train a variant on a data set, and write its result."""
    path, folder = result_of(results, data, name, seed), make_set(data, work)
    out, how = work / "runs" / path.stem, {}
    for old in (partial_of(out), out):
        shutil.rmtree(old, ignore_errors=True)
    facts = facts_of(results, data, name, seed)
    if name == "cnn":
        ours = json.loads(before(results, data, "small-folder", seed).read_text())
        found, seconds, epochs = train_cnn(folder, ours["seconds"], seed)
    else:
        if name == "distilled":
            how["teacher"] = str(out.with_name(before(results, data, "one size", seed).stem))
        elif name == "from RUN":
            how["init"] = init
        found, seconds, epochs = train_variant(VARIANTS[name], folder, out, seed, **how)
    result = {
        "set": data, "variant": name, "seed": seed, "accuracy": found["test"],
        "cascades": found.get("cascades"), "validation": found.get("validation"),
        "epochs": epochs, "seconds": round(seconds, 1),
        **{kind: pathlib.Path(one).name for kind, one in how.items()},
        "backend": keras.backend.backend(), "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(), "date": time.strftime("%Y-%m-%d"), **facts,
    }  # fmt: skip
    atomic_write(path, json.dumps(result, indent=1) + "\n")


def report(results):
    """Mean and spread over seeds: over sizes, at one size, of cascades, at every size.

    The one size is the best on the validation clips of all seeds, of equal ones the finest.
    """
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    for run in runs:
        is_done(results, run["set"], run["variant"], run["seed"])
    names = [name for name in (*VARIANTS, "cnn") if any(run["variant"] == name for run in runs)]

    def of(name, place, value):
        return [value(run) for run in runs if (run["variant"], run["set"]) == (name, place)]

    def mean(run):
        return 100 * statistics.mean(run["accuracy"].values())

    table = Table("", *SETS, title="Test accuracy in percent, mean over sizes and seeds (spread)")
    for name in names:
        table.add_row(name, *(spread(of(name, place, mean)) for place in SETS))
    table.add_section()
    for name in names:
        at_one = [at_best_size(of(name, place, dict)) for place in SETS]
        if any(at_one):
            table.add_row(f"{name}, at one size", *at_one)
    for name in names:
        for stages in CASCADES:
            for row in ("cascade", "mean"):
                found = [
                    [cascade_result(run, stages, row) for run in of(name, place, dict)]
                    for place in SETS
                ]
                if all(map(all, found)) and all(found):
                    table.add_row(f"{name}, {row} {stages}", *map(with_operations, found))
    table.add_section()
    for name in names:
        seconds = (of(name, place, lambda run: run["seconds"]) for place in SETS)
        table.add_row(f"{name}, seconds", *(f"{np.mean(s):.0f}" if s else "" for s in seconds))
    console = Console(width=110)
    console.print(table)
    for place in SETS:
        table = Table("", *map(str, SIZES), title=f"{place}, at every patch size")
        for name in names:
            sizes = [of(name, place, lambda run, s=s: run["accuracy"].get(str(s))) for s in SIZES]
            if sizes[0] and None not in sizes[0]:
                table.add_row(name, *(spread([100 * one for one in size]) for size in sizes))
        console.print(table)


def at_best_size(runs):
    """The accuracy at the size that validation chose, and which it is; "" without validation."""
    if not runs or None in (validations := [run.get("validation") for run in runs]):
        return ""
    means = {size: statistics.mean(one[size] for one in validations) for size in validations[0]}
    size = max(means, key=means.get)
    return f"{spread([100 * run['accuracy'][size] for run in runs])} at {size}"


def cascade_result(run, stages, row):
    """What is found of a run by a cascade, or by the mean of its sizes; None where nothing is."""
    found = (run.get("cascades") or {}).get(stages, ())
    return next((one for one in found if one["name"] == row), None)


def with_operations(results):
    """Accuracy in percent, and MFLOP a clip on average."""
    cost = np.mean([one["operations"] for one in results]) / 1e6
    return f"{spread([100 * one['value'] for one in results])} at {cost:.0f}"


def spread(values):
    """The mean of some numbers, the least and the most of them; "" of none."""
    return f"{np.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if values else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--only", help="names of the recipes, separated by commas")
    parser.add_argument("--sets", help="names of the data sets, separated by commas")
    parser.add_argument("--init", help="run that training starts from, such as flexast-demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=pathlib.Path, help="WORK/results where it is left out")
    parser.add_argument("--report", action="store_true", help="print the table of what is done")
    given = parser.parse_args()
    results = given.results or given.work / "results"
    if not given.report:
        names = [*VARIANTS, "cnn"]
        if given.only:
            names = given.only.split(",")
            if "from RUN" in names and not given.init:
                parser.error("from RUN needs --init.")
        elif not given.init:
            names.remove("from RUN")
        places = given.sets.split(",") if given.sets else list(SETS)
        how = {"names": names, "places": places, "seeds": given.seeds, "init": given.init}
        run_all(given.work, results, **how)
    report(results)
