"""What each recipe takes on its data set, worked out: clips, tokens, operations and hours.

KERAS_BACKEND=tensorflow python examples/benchmarks/recipes.py [--gpu-tflops 100]

Tokens a clip are the mean over the recipe's patch sizes, frame shifts and token dropout. The
operations of a token are six times the weights of the encoder, and those of attention in a clip.
Hours here come from the rate of one step of the base model, measured here; those of a GPU from
--gpu-tflops, the operations that it sustains in training. None was run to its end.
"""

import argparse
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from keras_flexast import ElasticAST
from keras_flexast.optimizers import compile_packed
from keras_flexast.recipes import load_recipe
from keras_flexast.settings import SIZES
from tf_data_pipelines.lengths import mean_tokens, training_packing
from tf_data_pipelines.settings import FbankSettings, PatchSettings
from tf_data_pipelines.sources import WaveformSource

DATA = {  # recipe: training clips, their seconds, and the deviation of their logarithm
    "ast-audioset-balanced": (20_550, 10, 0),
    "flexiast-audioset": (2_000_000, 10, 0),
    "elasticast-audioset": (2_000_000, 10, 0),
    "flexiast-vggsound": (183_000, 10, 0),
    "elasticast-vggsound": (183_000, 10, 0),
    "flexiast-esc50": (1_600, 5, 0),
    "flexiast-speech-commands": (84_843, 1, 0),
    "flexiast-voxceleb": (138_000, 7.2, 0.5),
    "elasticast-voxceleb": (138_000, 7.2, 0.5),
    "elasticast-epic-sounds": (60_055, 2.5, 1.0),
    "small-folder": (300, 2, 0),
    "small-folder-init": (300, 2, 0),
}
EXAMPLES, LONGEST = 64, 60.0  # clips whose lengths stand for all; seconds


def lengths(seconds, spread):
    """Seconds of some clips with this median."""
    ranks = np.random.default_rng(0).normal(size=EXAMPLES)
    return np.clip(seconds * np.exp(spread * ranks), 0.3, LONGEST)


def rate(rows=2, length=512):
    """Floating-point operations a second of a training step of the base model."""
    model = ElasticAST(10, size="base")
    compile_packed(model, 1e-4, row_length=length)
    rng = np.random.default_rng(0)
    inputs = {
        "tokens": rng.normal(size=(rows, length, 256)).astype("float32"),
        "positions": np.ones((rows, length, 4), "float32"),
        "segment_ids": np.ones((rows, length), "int32"),
    }
    labels, weights = np.zeros((rows, 16), int), np.eye(1, 16).repeat(rows, 0)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        model.train_on_batch(inputs, labels, sample_weight=weights)
        seconds.append(time.perf_counter() - start)
    return rows * length * operations("base", length) / min(seconds)


def operations(size, clip_tokens):
    """Floating-point operations of a token in training, in a clip of so many tokens."""
    dim, depth, _ = SIZES[size]
    return 6 * depth * (12 * dim**2 + 2 * dim * clip_tokens)


def tokens_of(recipe, seconds):
    """Mean tokens of clips of these seconds, and the PackSettings of their batches."""
    data = WaveformSource([np.zeros(round(16000 * one), "float32") for one in seconds])
    names = {name: recipe.model[name] for name in ("remainder", "position") if name in recipe.model}
    patches = PatchSettings(
        patch_sizes=recipe.patch_sizes, frame_shifts_ms=recipe.frame_shifts_ms, **names,
        **recipe.patches,
    )  # fmt: skip
    fbank, settings = recipe.fbank or FbankSettings(), recipe.train
    packing = training_packing(
        [data], fbank, patches=patches, batch_clips=settings.batch_clips,
        row_length=settings.row_length, segments=settings.segments, augment=recipe.augment,
        overlong="crop",
    )  # fmt: skip
    tokens = mean_tokens(data, fbank, patches=patches, packing=packing, augment=recipe.augment)
    return tokens.mean(), packing


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu-tflops", type=float, default=100.0)
    options = parser.parse_args()
    here = rate()
    table = Table("recipe", "clips", "epochs", "tokens a clip", "rows x tokens", "1e15 operations",
                  "hours here", "hours on the GPU", title=f"{here / 1e9:.0f} GFLOP/s here, "
                  f"{options.gpu_tflops:.0f} TFLOP/s on a GPU")  # fmt: skip
    for name, (clips, median, spread) in DATA.items():
        recipe = load_recipe(name)
        tokens, packing = tokens_of(recipe, lengths(median, spread))
        epochs = recipe.train.epochs
        work = clips * epochs * tokens * operations(recipe.model.get("size", "base"), tokens)
        table.add_row(
            name, f"{clips:,}", str(epochs), f"{tokens:.0f}",
            f"{packing.rows} x {packing.row_length:,}", f"{work / 1e15:,.3g}",
            f"{work / here / 3600:,.2g}", f"{work / options.gpu_tflops / 3.6e15:,.2g}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
