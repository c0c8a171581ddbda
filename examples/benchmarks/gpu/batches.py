"""Packed batches for `train.py`, made where TensorFlow is: python batches.py batches.npz

Clips as long as VoxCeleb's, 4 to 20 s and most of them around 7 s, packed into rows of 2,048
tokens at patch 16, and again at random patch sizes. Their contents are noise, so the file holds
none: lengths, positions and places are what time and memory depend on.
"""

import argparse
import pathlib

import numpy as np
import tensorflow as tf

from tf_data_pipelines.packing import batch_rows, pack
from tf_data_pipelines.settings import PATCH_SIZES, PackSettings, PatchSettings
from tf_data_pipelines.stages import make_tokens

MEL_BINS, GRID = 128, (8, 125)
BATCHES = 4


def lengths(count, rng):
    """Frames of clips with VoxCeleb's median, least and, but for one clip in a hundred, most."""
    seconds = np.clip(np.exp(rng.normal(np.log(7), 0.45, count)), 4, 20)
    return 1 + (seconds * 16000 - 400).astype("int64") // 160


def packed(patch_sizes, packing, seed=0):
    """A few batches: {name: array (batches, rows, ...)}, without the tokens' contents."""
    rng = np.random.default_rng(seed)
    frames = lengths(64 * BATCHES * packing.rows, rng)
    clips = tf.data.Dataset.from_tensor_slices((np.arange(len(frames)), frames)).map(
        lambda number, count: {
            "features": tf.zeros([count, MEL_BINS]), "frame_shift_scale": 1.0,
            "label": tf.cast(number % 10, tf.int32), "clip_id": number,
        }
    )  # fmt: skip
    patches = PatchSettings(patch_sizes, grid=GRID)
    rows = pack(make_tokens(clips, patches, seed=seed, packing=packing), packing)
    names = "positions", "segment_ids", "labels", "weights"
    batches = [*batch_rows(rows, packing).take(BATCHES).as_numpy_iterator()]
    return {name: np.stack([batch[name] for batch in batches]) for name in names}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row-length", type=int, default=2048)
    options = parser.parse_args()
    packing = PackSettings(options.rows, options.row_length, segments=64)
    arrays = {}
    for name, sizes in (("16", ((16, 16),)), ("random", tuple((p, p) for p in PATCH_SIZES))):
        arrays |= {f"{name}_{key}": value for key, value in packed(sizes, packing).items()}
    np.savez_compressed(options.out, **arrays)
    for name in ("16", "random"):
        filled = (arrays[f"{name}_segment_ids"] > 0).mean()
        clips = int(arrays[f"{name}_weights"].sum() / BATCHES)
        print(f"patch {name}: {clips} clips a batch, rows {100 * filled:.1f} % full")
