"""Prepared shards against sound files, in the pipeline; and the start of a training from many.

taskset -c 1 python examples/benchmarks/shards.py [--json PATH]
python examples/benchmarks/shards.py --clips 100000
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile
from rich.console import Console
from rich.table import Table

KINDS = {  # sound files: number, seconds, sample rate
    "1 s at 16 kHz": (500, 1.0, 16000),
    "10 s at 16 kHz": (100, 10.0, 16000),
    "5 s at 44.1 kHz": (100, 5.0, 44100),
}
REPEATS = 5  # in turn, so that both ways meet the same neighbors on the machine
SHORT = 0.5  # seconds of each of many clips


def write_files(folder, files, seconds, rate):
    """16-bit WAV files of two classes: tones in noise."""
    rng, times = np.random.default_rng(0), np.arange(round(seconds * rate)) / rate
    noise = rng.normal(0, 0.03, 2 * times.size)
    for number in range(files):
        path = folder / f"class{number % 2}" / f"{number:06}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 4000) * times)
        shift = rng.integers(times.size)
        soundfile.write(path, tone + noise[shift : shift + times.size], rate)


# === Clips a second ===


def endless(data):
    """Iterator of the weights of the batches of a data set, over and over."""
    import tensorflow as tf

    from tf_data_pipelines import PackSettings, PatchSettings, evaluation_batches, read_data
    from tf_data_pipelines.settings import PATCH_SIZES, FbankSettings

    batches = evaluation_batches(
        read_data(data, FbankSettings(), shares=(0, 0)),
        FbankSettings(),
        patches=PatchSettings(PATCH_SIZES),
        packing=PackSettings(rows=4, row_length=2048),
    )
    return iter(batches.repeat().map(lambda inputs, labels, weights, ids: tf.reduce_sum(weights)))


def milliseconds(iterator, clips):
    """Processor time for one clip, of all threads, also of those that refill buffers."""
    from features import settled

    seen, start = 0, settled()
    while seen < clips:
        seen += float(next(iterator))
    return 1000 * (settled() - start) / seen


def compare(folder):
    """{kind of files: {way: milliseconds a clip, one for each repeat}}."""
    from tf_data_pipelines.prepare import prepare_data

    results = {}
    for number, (kind, (files, seconds, rate)) in enumerate(KINDS.items()):
        data, out = folder / f"data{number}", folder / f"shards{number}"
        write_files(data, files, seconds, rate)
        prepare_data(data, out, shares=(0, 0))
        ways = {"files": endless(data), "shards": endless(out)}
        runs = {way: [] for way in ways}
        for repeat in range(REPEATS + 1):
            for way, iterator in ways.items():
                spent = milliseconds(iterator, 2 * files)
                if repeat:  # the first fills the packer
                    runs[way].append(spent)
        results[kind] = runs
    return results


def comparison(results):
    title = f"Clips a second from 16-bit WAV files and from shards, one core, median of {REPEATS}"
    table = Table("clips", "files", "shards", "shards / files (least to most)", title=title)
    for kind, runs in results.items():
        rates = [f"{1000 / statistics.median(values):,.0f}" for values in runs.values()]
        ratios = [a / b for a, b in zip(runs["files"], runs["shards"], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        table.add_row(kind, *rates, ratio)
    return table


# === The start of a training ===


def begin(data):
    """Print seconds and memory until the first batch, and the memory 200 batches later."""
    import tensorflow as tf

    from tf_data_pipelines import PackSettings, PatchSettings, read_data, training_batches
    from tf_data_pipelines.settings import FbankSettings

    tf.zeros([1]) + 1  # TensorFlow's own start
    before, start = memory(), time.perf_counter()
    scanned = read_data(data, FbankSettings(), split="train")
    batches = iter(
        training_batches(
            scanned,
            FbankSettings(mean=scanned.mean, std=scanned.std),
            patches=PatchSettings((16,)),
            packing=PackSettings(rows=4, row_length=512),
            seed=1,
        )
    )
    next(batches)
    seconds, first = time.perf_counter() - start, memory()
    for _ in range(200):
        next(batches)
    print(
        json.dumps(
            {
                "clips": len(scanned.source),
                "seconds": round(seconds, 2),
                "import_mb": round(before),
                "first_batch_mb": round(first - before),
                "later_mb": round(memory() - before),
                "peak_mb": round(
                    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
                ),
            }
        )
    )


def memory():
    """Resident memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def start_of_training(folder, clips):
    """Facts of a training's start from so many prepared clips, and from a fifth of them."""
    results = []
    for number in (clips // 5, clips):  # each of more bytes than the blocks that are in memory
        data, out = folder / f"data{number}", folder / f"shards{number}"
        write_files(data, number, SHORT, 16000)
        command = "import sys; from tf_data_pipelines.prepare import prepare_data as p;"
        command += "p(*sys.argv[1:], progress=True)"
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", command, data, out], check=True)
        prepared = time.perf_counter() - start
        done = subprocess.run(
            [sys.executable, __file__, "--begin", out], check=True, stdout=subprocess.PIPE
        )
        facts = json.loads(done.stdout) | {
            "prepare_seconds": round(prepared, 1),
            "json_mb": round((out / "dataset.json").stat().st_size / 2**20, 2),
        }
        print(json.dumps(facts))
        results.append(facts)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="also write the numbers here")
    parser.add_argument("--clips", type=int, help="measure the start from this many clips instead")
    parser.add_argument("--begin", metavar="SHARDS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.begin:
        begin(arguments.begin)
        sys.exit()
    if not arguments.clips and len(os.sched_getaffinity(0)) != 1:
        parser.error("run it on one core: taskset -c 1 python examples/benchmarks/shards.py")
    with tempfile.TemporaryDirectory() as place:
        if arguments.clips:
            results = start_of_training(pathlib.Path(place), arguments.clips)
        else:
            results = compare(pathlib.Path(place))
            Console(width=110).print(comparison(results))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results))
