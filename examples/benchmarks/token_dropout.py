"""How much faster is a training that leaves out half of the tokens? Seconds a clip, side by side.

KERAS_BACKEND=tensorflow python examples/benchmarks/token_dropout.py [--share 0.5] [--steps 20]

Clips of 4 to 30 s go through the whole pipeline, at random patch sizes, into two rows of 2,048
tokens: the same rows hold more clips. Both trainings take one step in turn. What it costs in
accuracy: examples/experiments/small_folder.py.
"""

import argparse
import json
import pathlib
import time

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from keras_flexast import ElasticAST
from keras_flexast.optimizers import compile_packed
from tf_data_pipelines import training_batches
from tf_data_pipelines.settings import AugmentSettings, FbankSettings, PackSettings, PatchSettings
from tf_data_pipelines.sources import WaveformSource

CLIPS, CLASSES, ROWS, ROW_LENGTH = 96, 10, 2, 2048
WARM_UP = 2  # steps that compile


def noises(rng):
    """Clips of noise, log-normal around 7 s and 4 to 30 s long."""
    seconds = np.clip(np.exp(rng.normal(np.log(7), 0.5, CLIPS)), 4, 30)
    clips = [rng.normal(0, 0.1, round(16000 * length)).astype("float32") for length in seconds]
    return WaveformSource(clips)


class Training:
    """A model, its batches, and the seconds and clips of each step."""

    def __init__(self, data, share, size):
        packing = PackSettings(ROWS, ROW_LENGTH, segments=64)
        self.batches = training_batches(
            data, FbankSettings(), patches=PatchSettings(), packing=packing,
            augment=AugmentSettings(token_dropout=share),
        ).as_numpy_iterator()  # fmt: skip
        self.model = ElasticAST(CLASSES, size=size, segments=64)
        compile_packed(self.model, 1e-4, row_length=ROW_LENGTH)
        self.seconds, self.clips = [], []

    def step(self):
        start = time.perf_counter()
        inputs, labels, weights = next(self.batches)
        self.model.train_on_batch(inputs, labels, sample_weight=weights)
        self.seconds.append(time.perf_counter() - start)
        self.clips.append(int(weights.sum()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--share", type=float, default=0.5, help="of the tokens that are left out")
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    data = noises(np.random.default_rng(0))
    trainings = {share: Training(data, share, options.size) for share in (0.0, options.share)}
    for _ in range(WARM_UP + options.steps):
        for training in trainings.values():
            training.step()
    table = Table("left out", "clips", "clips a step", "seconds a clip", "times as fast")
    base, report = None, {"backend": keras.backend.backend(), "size": options.size}
    for share, training in trainings.items():
        seconds, clips = training.seconds[WARM_UP:], training.clips[WARM_UP:]
        of_clip = sum(seconds) / sum(clips)
        base = base or of_clip
        table.add_row(
            f"{share:.0%}", f"{sum(clips)}", f"{np.mean(clips):.1f}", f"{of_clip:.3f}",
            f"{base / of_clip:.2f}",
        )  # fmt: skip
        report[str(share)] = {"seconds": seconds, "clips": clips}
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
