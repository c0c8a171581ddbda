"""How full the packer's rows are, and what packing costs.

python examples/benchmarks/packing.py [--data FOLDER] [--json PATH]

With --data, the training clips of a data set take the place of drawn ones: what is padded and cut
at patch size 16 where all clips are brought to one length, in the ElasticAST authors' packing, and
in this packer's rows of several lengths with several numbers of waiting clips.

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
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tf_data_pipelines import load_source
from tf_data_pipelines.packing import ARRIVALS, pack
from tf_data_pipelines.settings import PATCH_SIZES, PackSettings

SETTINGS = PackSettings(row_length=2048)  # the ElasticAST authors' rows
CLIPS = 4000  # about 800 rows of speech, 1,200 of mixed patch sizes
SEEDS = (0, 1, 2)
TIMED = (500, 4500)  # the difference is timed, to leave out the 0.1 s of making an iterator
OPEN_ROWS = 8  # of first fit and best fit; 64 fill 0.4 % more
BATCH = 12  # clips the authors pack together
TOKEN_BYTES = (256 + 4) * 4  # float32 tokens and positions
FIXED_SECONDS = (2, 4, 8)
ROW_LENGTHS, BUFFERS = (1024, 2048, 4096), (16, 64, 256)


def speech(clips, seed):
    """Clips of 4 to 30 s, half of them under 7 s, as in VoxCeleb; patch 16, 8 tokens a column."""
    return tokens_of(np.random.default_rng(seed).lognormal(np.log(7), 0.5, clips).clip(4, 30))


def tokens_of(seconds):
    """Tokens of clips of these lengths at patch size 16: 8 a column, of whole columns."""
    frames = 1 + (16000 * np.asarray(seconds) - 400).astype(int) // 160
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


def shares(rows, settings=SETTINGS):
    """Shares of real tokens, and of pairs of tokens of one clip, in rows of full length."""
    squares = sum(np.sum(np.square(row)) for row in rows)
    return {
        "fill": sum(map(sum, rows)) / (len(rows) * settings.row_length),
        "pairs": squares / (len(rows) * settings.row_length**2),
    }


def ours(lengths, settings=SETTINGS):
    """This packer, without the rows at the end that it fills from the last clips."""
    rows, left = [], len(lengths)
    for row in pack(clips_of(lengths, 1, settings.row_length), settings).as_numpy_iterator():
        if left < settings.buffer_size:
            break
        ids = row["clip_ids"][row["clip_ids"] >= 0]
        rows.append(lengths[ids])
        left -= len(ids)
    return {**shares(rows, settings), "waiting": settings.buffer_size - 1 + ARRIVALS}


def clips_of(lengths, width, most=SETTINGS.row_length):
    """Clips that cost next to nothing, because they are slices of one tensor."""
    lengths = tf.constant(lengths, tf.int32)
    tokens, positions = tf.zeros([most, width]), tf.zeros([most, 4])

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


def measure_data(folder):
    """Padded, cut and computed tokens of a data set's training clips, in three orders."""
    clips = load_source(folder).split("train").clips
    lengths = tokens_of([clip.announced_seconds() for clip in clips])
    orders = [np.random.default_rng(seed).permutation(lengths) for seed in SEEDS]
    results = []

    def add(method, padded, pairs, cut=0.0):
        results.append({"method": method, "padded": padded, "cut": cut, "pairs": pairs})

    for seconds in FIXED_SECONDS:
        fixed = tokens_of([seconds])[0]
        kept = np.minimum(lengths, fixed)
        add(f"all clips {seconds} s", [1 - kept.mean() / fixed],
            [np.mean(kept.astype(float) ** 2) / fixed**2],
            1 - kept.sum() / lengths.sum())  # fmt: skip
    found = [in_order(order) for order in orders]
    name = f"in order, {BATCH} clips a batch, rows of {SETTINGS.row_length:,}"
    add(name, [1 - one["fill"] for one in found], [one["pairs"] for one in found])
    for row_length in ROW_LENGTHS:
        for size in BUFFERS:
            segments = min(size, -(-row_length // int(min(lengths))))  # else slots end a row
            settings = dataclasses.replace(
                SETTINGS, row_length=row_length, buffer_size=size, segments=segments
            )
            if max(lengths) <= row_length and size < len(lengths):
                found = [ours(order, settings) for order in orders]
                name = f"this packer, rows of {row_length:,}, buffer_size={size}"
                add(name, [1 - one["fill"] for one in found], [one["pairs"] for one in found])
    return results


def make_data_table(results):
    table = Table("method", title="Shares of the computed tokens, and of the clips' own tokens")
    for name in ("padded %", "cut %", "pairs of one clip %"):
        table.add_column(name, justify="right")
    for result in results:
        padded, pairs = (spread([100 * one for one in result[k]], 2) for k in ("padded", "pairs"))
        table.add_row(result["method"], padded, f"{100 * result['cut']:.1f}", pairs)
    return table


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
    parser.add_argument("--data", metavar="FOLDER", help="a data set in place of drawn clips")
    arguments = parser.parse_args()
    results = measure_data(arguments.data) if arguments.data else measure()
    table = make_data_table(results) if arguments.data else make_table(results)
    Console(width=120).print(table)
    if arguments.json:
        machine = f"{os.cpu_count()} x {platform.machine()}, TensorFlow {tf.__version__}"
        report = {"machine": machine, "results": results}
        report |= (
            {"data": pathlib.Path(arguments.data).name}
            if arguments.data
            else {"row_length": SETTINGS.row_length}
        )
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=2)
