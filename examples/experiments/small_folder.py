"""Which recipe suits a few hundred clips? Trainings on three small sets, beside a plain CNN.

python examples/experiments/small_folder.py WORK [--only NAME,...] [--seeds 3] [--report]

WORK holds the data sets and the runs; what is done is skipped, also after a kill. The results, one
JSON for each run, are in results/small_folder/ beside this file; --report prints their table.
"""

import argparse
import dataclasses
import json
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

from keras_flexast.evaluation import evaluate_run
from keras_flexast.settings import TrainSettings
from keras_flexast.training import train_run
from tf_data_pipelines import read_data
from tf_data_pipelines.fbank import features
from tf_data_pipelines.settings import AugmentSettings, FbankSettings

RESULTS = pathlib.Path(__file__).parent / "results" / "small_folder"
SIZES = (8, 16, 24, 32, 48)
NANO = {"size": "nano"}
PASSES = 40  # over the training clips, of every recipe: they compete at equal work
NOISE = {"gain_db": 6.0, "noise_snr_db": (10.0, 50.0)}
MASKS = {"freq_mask": 24, "time_mask_ms": 200.0}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a training has that others have not."""

    settings: dict = dataclasses.field(default_factory=dict)
    augment: dict | None = None
    model: dict = dataclasses.field(default_factory=dict)


VARIANTS = {
    "defaults": Variant(),
    "masks": Variant(augment=MASKS),
    "noise": Variant(augment=NOISE),
    "noise and masks": Variant(augment={**NOISE, **MASKS}),
}


def train_variant(variant, data, out, seed):
    """{patch size: test accuracy} of a training, and its seconds."""
    settings = TrainSettings(**{"epochs": PASSES, "seed": seed, **variant.settings})
    augment = AugmentSettings(**variant.augment) if variant.augment else None
    start = time.perf_counter()
    run, _ = train_run(
        data, out, settings=settings, augment=augment, model_options={**NANO, **variant.model}
    )
    seconds = time.perf_counter() - start
    found = {
        result["name"]: result["value"] for result in evaluate_run(run, data, patch_sizes=SIZES)
    }
    return found, seconds


# === A plain CNN ===

FIXED_SECONDS = 2.0
WIDTHS = (16, 32, 64, 128)  # 0.3 M weights


def plain_cnn(frames, mel_bins, classes):
    """Four blocks of two 3x3 convolutions, batch norm and pooling; then the global average."""
    x = inputs = keras.Input((frames, mel_bins, 1))
    for width in WIDTHS:
        for _ in range(2):
            x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
            x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
        x = keras.layers.MaxPooling2D(2)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


class StopAfter(keras.callbacks.Callback):
    """Ends a training after so many seconds of steps, the first of which compiles."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_train_batch_end(self, batch, logs=None):
        self.start = getattr(self, "start", time.perf_counter())
        if time.perf_counter() - self.start > self.seconds:
            self.model.stop_training = True


def train_cnn(folder, seconds, seed):
    """{"2 s": test accuracy} of the CNN after so many seconds, and its seconds."""
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

    steps, epochs = -(-len(parts["train"]) // 32), 200
    model = plain_cnn(*cut(heard["train"][0], 0).shape[:2], len(data.source.classes))
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps * PASSES)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    held, labels = ({n: one(n) for n in ("validation", "test")} for one in (
        lambda n: np.stack([cut(clip, max(0, len(clip) - size) // 2) for clip in heard[n]]),
        lambda n: parts[n].targets(),
    ))  # fmt: skip
    best = keras.callbacks.ModelCheckpoint(
        folder.with_name(f"{folder.name}_cnn.weights.h5"), "val_accuracy",
        save_best_only=True, save_weights_only=True,
    )  # fmt: skip
    start = time.perf_counter()
    model.fit(
        batches(), steps_per_epoch=steps, epochs=epochs, verbose=2,
        validation_data=(held["validation"], labels["validation"]),
        callbacks=[best, StopAfter(seconds)],
    )  # fmt: skip
    spent = time.perf_counter() - start
    model.load_weights(best.filepath)
    found = np.argmax(model.predict(held["test"], verbose=0), -1) == labels["test"]
    return {"2 s": float(found.mean())}, spent


# === What is missing is trained ===


def result_of(place, name, seed):
    return RESULTS / f"{place}_{name.replace(' ', '-')}_{seed}.json"


def run_all(work, names, seeds):
    for seed in range(seeds):
        for name in names:
            for place in SETS:
                path = result_of(place, name, seed)
                if path.exists():
                    continue
                folder = make_set(place, work)
                out = work / "runs" / path.stem
                shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
                shutil.rmtree(out, ignore_errors=True)
                if name == "cnn":
                    pace = json.loads(result_of(place, "defaults", seed).read_text())["seconds"]
                    found, seconds = train_cnn(folder, pace, seed)
                else:
                    found, seconds = train_variant(VARIANTS[name], folder, out, seed)
                facts = {
                    "set": place, "variant": name, "seed": seed, "accuracy": found,
                    "seconds": round(seconds, 1), "backend": keras.backend.backend(),
                    "machine": platform.machine(), "date": time.strftime("%Y-%m-%d"),
                }  # fmt: skip
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(facts, indent=1) + "\n")


def report():
    """Mean and spread of the accuracy, over sizes and then over seeds."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        facts = json.loads(path.read_text())
        key = facts["variant"], facts["set"]
        found.setdefault(key, []).append(100 * statistics.mean(facts["accuracy"].values()))
    table = Table("", *SETS, title="Test accuracy in percent, mean over sizes and seeds (spread)")
    for name in dict.fromkeys(name for name, _ in found):
        row = [found.get((name, place), []) for place in SETS]
        table.add_row(
            name, *(f"{np.mean(v):.1f} ({min(v):.1f}-{max(v):.1f})" if v else "" for v in row)
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--only", help="names of the recipes, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="print the table of what is done")
    given = parser.parse_args()
    if not given.report:
        run_all(
            given.work, given.only.split(",") if given.only else [*VARIANTS, "cnn"], given.seeds
        )
    report()
