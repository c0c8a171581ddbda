"""Milliseconds of packed self-attention alone on one GPU: our kernels beside the dense mask.

KERAS_BACKEND=jax python kernels.py batches.npz [--heads 12] [--width 64] [--tilings] [--csv PATH]

batches.npz is from `batches.py`; this script needs no TensorFlow. Before anything is timed, the
kernels are compared with the dense mask at every dtype; what fails is printed whole. Output and
gradients are timed in bfloat16, over CALLS calls in one compiled loop, each call's queries made
from the last call's result. With --tilings the Triton kernels also run at other tilings.
"""

import argparse
import csv
import itertools
import pathlib
import statistics
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from keras_flexast.layers import clip_bands, clip_triton
from keras_flexast.layers.kernels import dense_mask

CALLS, TIMES = 20, 3
LOOPS = "OUTPUT_LOOP", "QUERY_LOOP", "KEY_LOOP"
TILES, VISITED, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3)


def check(width):
    """Whether the kernels give the numbers of the dense mask here, printed for each dtype."""
    good = True
    for dtype, most in clip_triton.TOLERANCES.items():
        try:
            error = clip_triton.largest_error(dense_mask, width, dtype)
        except Exception:  # of any compiler
            print(f"width {width}, {dtype}: failed\n{traceback.format_exc()}", flush=True)
            good = False
            continue
        good &= error < most
        print(f"width {width}, {dtype}: largest error {error:.1e} (at most {most})", flush=True)
    return good


def lowered(attend, arrays, ids, gradients):
    """CALLS calls of output, or of output and gradients, ready to be compiled."""

    def loss(query, key, value):
        return (attend(query, key, value, ids).astype("float32") ** 2).sum()

    def many(query, key, value):
        def once(_, query):
            if gradients:
                slopes = jax.grad(loss, (0, 1, 2))(query, key, value)
                return query + 1e-3 * sum(slopes)
            return query + 1e-3 * attend(query, key, value, ids)

        return jax.lax.fori_loop(0, CALLS, once, query)

    return jax.jit(many).lower(*arrays)


def milliseconds(compiled, arrays):
    """Of one call: the median over TIMES loops."""
    jax.block_until_ready(compiled(*arrays))
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds.append((time.perf_counter() - start) / CALLS)
    return 1e3 * statistics.median(seconds)


def tilings(all_of_them):
    """(tile, loops of output, queries and keys) of every tiling that is tried, our own first."""
    yield clip_triton.TILE, tuple(getattr(clip_triton, name) for name in LOOPS)
    for tile, *loop in itertools.product(TILES, VISITED, WARPS, STAGES):
        if all_of_them and loop[0] <= tile:
            yield tile, (clip_triton.Loop(*loop),) * 3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("batches", type=pathlib.Path)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="compare alone")
    parser.add_argument("--tilings", action="store_true", help="try all tilings")
    parser.add_argument("--csv", type=pathlib.Path)
    given = parser.parse_args()
    good = all([check(width) for width in (16, given.width)])
    if given.check or not good:
        raise SystemExit(not good)
    ids = jnp.asarray(np.load(given.batches)["16_segment_ids"][0])
    keys = jax.random.split(jax.random.key(0), 3)
    shape = *ids.shape, given.heads, given.width
    arrays = [jax.random.normal(key, shape, "bfloat16") for key in keys]
    rows = [("dense", "", ""), ("clip_bands", clip_bands.TILE, "")]
    rows += [("clip_triton", *tiling) for tiling in tilings(given.tilings)]
    kernels = {"dense": dense_mask, "clip_bands": clip_bands.attend}
    programs = []
    for name, tile, loops in rows:
        if name == "clip_triton":
            clip_triton.TILE = tile
            for loop_name, loop in zip(LOOPS, loops, strict=True):
                setattr(clip_triton, loop_name, loop)
        attend = kernels.get(name, clip_triton.attend)
        programs += [lowered(attend, arrays, ids, gradients) for gradients in (False, True)]
    with ThreadPoolExecutor() as threads:
        programs = [*threads.map(compiled, programs)]
    found = []
    for row, both in zip(rows, zip(programs[::2], programs[1::2], strict=True), strict=True):
        times = [one if isinstance(one, str) else milliseconds(one, arrays) for one in both]
        loops = " ".join("/".join(map(str, loop)) for loop in row[2])
        found.append((row[0], row[1], loops, *times))
        texts = (f"{one:9.3f}" if isinstance(one, float) else f"{one:>9}" for one in times)
        print(f"{row[0]:12} {row[1]!s:>4} {loops:24}", *texts, flush=True)
    if given.csv:
        with given.csv.open("w", newline="") as file:
            titles = "kernel", "tile", "visited/warps/stages of each loop", "output ms", "both ms"
            csv.writer(file).writerows([titles, *found])


def compiled(program):
    """The program compiled, or the first line of why it cannot be."""
    try:
        return program.compile()
    except Exception as failure:  # of any compiler: a tiling may need too much shared memory
        return str(failure).partition("\n")[0][:60]


if __name__ == "__main__":
    main()
