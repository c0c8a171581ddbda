"""How full the packer's rows are, and what packing costs.

python examples/benchmarks/packing.py [--json PATH]

2026-11-21, two cores of an AMD EPYC shared with other work (load 2 to 3), TensorFlow 2.21: 56 s.
Rows of 2,048 tokens, 4,000 clips, three seeds; `pairs` are those of two tokens of one clip,
among all that attention over the rows computes.

                              speech                        mixed patch sizes
                              fill %   pairs %  µs a clip   fill %   pairs %  µs a clip
in order, 12 clips a batch     81.07     20.89               74.41     45.97
first fit, 8 open rows         96.43     23.49               98.36     59.51
best fit, 8 open rows          96.45     23.47               99.01     60.15
this packer, buffer_size=32   100.00     24.36    56 ± 23    99.55     60.35     66 ± 3

At most 47 clips wait in the buffer: 19 and 29 MB of tokens.
"""

import argparse
import json
import os
import platform
import statistics
import time

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tf_data_pipelines.packing import ARRIVALS, pack
from tf_data_pipelines.settings import PATCH_SIZES, PackSettings

SETTINGS = PackSettings(row_length=2048)  # the ElasticAST authors' rows
CLIPS = 4000  # about 800 rows of speech, 1,200 of mixed patch sizes
SEEDS = (0, 1, 2)
TIMED = (500, 4500)  # the difference is timed, to leave out the 0.1 s of making an iterator
OPEN_ROWS = 8  # of first fit and best fit; 64 fill 0.4 % more
BATCH = 12  # clips the authors pack together
TOKEN_BYTES = (256 + 4) * 4  # float32 tokens and positions


def speech(clips, seed):
    """Clips of 4 to 30 s, half of them under 7 s, as in VoxCeleb; patch 16, 8 tokens a column."""
    seconds = np.random.default_rng(seed).lognormal(np.log(7), 0.5, clips).clip(4, 30)
    frames = 1 + (16000 * seconds - 400).astype(int) // 160
    return 8 * (frames // 16)


def mixed_patches(clips, seed):
    """10 s clips, 128 x 1024, each at one of FlexiAST's patch sizes."""
    size = np.random.default_rng(seed).choice(PATCH_SIZES, clips)
    return -(-128 // size) * -(-1024 // size)


def in_order(lengths):
    """The papers' way: the clips of a batch in order, rows padded to the longest of them."""
    rows, computed, pairs = [], 0, 0
    for start in range(0, len(lengths), BATCH):
        batch = [0]
        for tokens in lengths[start : start + BATCH]:
            if batch[-1] + tokens > SETTINGS.row_length:
                batch.append(0)
            batch[-1] += tokens
        computed += len(batch) * max(batch)
        pairs += len(batch) * max(batch) ** 2
        rows += batch
    squares = np.sum(np.square(lengths))
    return {"fill": np.sum(rows) / computed, "pairs": squares / pairs, "waiting": BATCH}


def fit(lengths, best):
    """A few open rows: a clip goes to the first, or to the fullest, that has room for it."""
    rows, closed, waiting = [], [], 0
    for tokens in lengths:
        room = [
            row
            for row in rows
            if sum(row) + tokens <= SETTINGS.row_length and len(row) < SETTINGS.segments
        ]
        if room:
            (max(room, key=sum) if best else room[0]).append(tokens)
            continue
        if len(rows) == OPEN_ROWS:
            full = max(rows, key=sum) if best else rows[0]
            rows.remove(full)
            closed.append(full)
        rows.append([tokens])
        waiting = max(waiting, sum(map(len, rows)))
    return {**shares(closed), "waiting": waiting}


def shares(rows):
    """Shares of real tokens, and of pairs of tokens of one clip, in rows of full length."""
    squares = sum(np.sum(np.square(row)) for row in rows)
    return {
        "fill": sum(map(sum, rows)) / (len(rows) * SETTINGS.row_length),
        "pairs": squares / (len(rows) * SETTINGS.row_length**2),
    }


def ours(lengths):
    """This packer, without the rows at the end that it fills from the last clips."""
    rows, left = [], len(lengths)
    for row in pack(clips_of(lengths, width=1), SETTINGS).as_numpy_iterator():
        if left < SETTINGS.buffer_size:
            break
        ids = row["clip_ids"][row["clip_ids"] >= 0]
        rows.append(lengths[ids])
        left -= len(ids)
    return {**shares(rows), "waiting": SETTINGS.buffer_size - 1 + ARRIVALS}


def clips_of(lengths, width):
    """Clips that cost next to nothing, because they are slices of one tensor."""
    lengths = tf.constant(lengths, tf.int32)
    tokens, positions = tf.zeros([SETTINGS.row_length, width]), tf.zeros([SETTINGS.row_length, 4])

    def clip(clip_id):
        return {
            "tokens": tokens[: lengths[clip_id]],
            "positions": positions[: lengths[clip_id]],
            "label": tf.constant(0),
            "clip_id": clip_id,
        }

    return tf.data.Dataset.range(len(lengths)).map(clip)


def processor_seconds(dataset, tries=5):
    """Processor time of all threads, the least of some tries: other programs only add to it."""
    spent = []
    for _ in range(tries):
        start = time.process_time()
        for _ in dataset.skip(10**9):  # runs it without handing rows to Python
            pass
        spent.append(time.process_time() - start)
    return min(spent)


def microseconds_per_clip(lengths, repeats=3):
    """Processor time of packing tokens of width 256, without the time of making the clips."""
    few, many = (clips_of(lengths[:clips], width=256) for clips in TIMED)
    runs = []
    for _ in range(repeats):
        clips = processor_seconds(many) - processor_seconds(few)
        packed = processor_seconds(pack(many, SETTINGS)) - processor_seconds(pack(few, SETTINGS))
        runs.append(1e6 * (packed - clips) / (TIMED[1] - TIMED[0]))
    return runs


def measure():
    results = []
    for name, draw in (("speech", speech), ("mixed patch sizes", mixed_patches)):
        methods = {
            f"in order, {BATCH} clips a batch": in_order,
            f"first fit, {OPEN_ROWS} open rows": lambda lengths: fit(lengths, best=False),
            f"best fit, {OPEN_ROWS} open rows": lambda lengths: fit(lengths, best=True),
            f"this packer, buffer_size={SETTINGS.buffer_size}": ours,
        }
        for method, function in methods.items():
            runs = [function(draw(CLIPS, seed)) for seed in SEEDS]
            result = {"clips": name, "method": method}
            for key in ("fill", "pairs"):
                result[key] = [float(run[key]) for run in runs]
            result["waiting"] = max(run["waiting"] for run in runs)
            tokens = np.mean(draw(CLIPS, SEEDS[0]))
            result["megabytes"] = float(result["waiting"] * tokens * TOKEN_BYTES / 1e6)
            if function is ours:
                result["microseconds_per_clip"] = microseconds_per_clip(draw(TIMED[1], 0))
            results.append(result)
    return results


def make_table(results):
    columns = ("clips", "method", "fill %", "pairs %", "µs a clip", "waiting", "MB held")
    table = Table(*columns[:2], title=f"Rows of {SETTINGS.row_length:,} tokens")
    for name in columns[2:]:
        table.add_column(name, justify="right")
    for result in results:
        runs = result.get("microseconds_per_clip")
        cells = [
            *(spread([100 * share for share in result[key]], 2) for key in ("fill", "pairs")),
            spread(runs, 0) if runs else "",
            f"{result['waiting']}",
            f"{result['megabytes']:.0f}",
        ]
        table.add_row(result["clips"], result["method"], *cells)
    return table


def spread(values, digits):
    half = (max(values) - min(values)) / 2
    return f"{statistics.median(values):.{digits}f} ± {half:.{digits}f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="also write the numbers here")
    arguments = parser.parse_args()
    results = measure()
    Console(width=120).print(make_table(results))
    if arguments.json:
        machine = f"{os.cpu_count()} x {platform.machine()}, TensorFlow {tf.__version__}"
        report = {"machine": machine, "row_length": SETTINGS.row_length, "results": results}
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)
