"""How fast `prepare` is beside plain decoding and resampling, and what 50 kills do to it.

taskset -c 1 python examples/benchmarks/prepare.py [--json PATH]
python examples/benchmarks/prepare.py --kills 50
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile
import soxr
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tf_data_pipelines.prepare import prepare_data

RATE, STORED = 44100, 16000  # Hz, of the files and of the shards
FILES, SECONDS = 300, 10  # FLAC files, as AudioSet's clips are often kept: 330 MB
REPEATS = 5  # in turn, so that both ways meet the same neighbors on the machine
SMALL, SMALL_SECONDS = 1500, 1.0  # WAV files for the kills


def write_files(folder, files, seconds, ending):
    """Stereo sounds of two classes: tones in noise."""
    rng, times = np.random.default_rng(0), np.arange(round(seconds * RATE)) / RATE
    for number in range(files):
        path = folder / f"class{number % 2}" / f"{number}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 4000) * times)
        channels = np.stack([tone, 0.5 * tone], 1)
        soundfile.write(path, channels + rng.normal(0, 0.03, channels.shape), RATE)


def plain(paths):
    """Decode each file, mix it to mono and resample it; nothing is kept."""
    for path in paths:
        channels, rate = soundfile.read(path, dtype="float32", always_2d=True)
        left, right = channels.T
        soxr.resample((left + right) / 2, rate, STORED)


def speed(folder):
    """{way: processor time in ms a clip, one for each repeat}."""
    write_files(folder / "data", FILES, SECONDS, "flac")
    paths = sorted((folder / "data").rglob("*.flac"))
    runs = {"plain": [], "prepare": []}
    for repeat in range(REPEATS + 1):
        for way, work in (
            ("plain", lambda: plain(paths)),
            ("prepare", lambda: prepare_data(folder / "data", folder / "out")),
        ):
            start = time.process_time()
            work()
            if repeat:  # the first imports and compiles
                runs[way].append(1000 * (time.process_time() - start) / FILES)
        shutil.rmtree(folder / "out")
    return runs


def speed_table(runs):
    title = f"{SECONDS} s stereo FLAC at 44.1 kHz, one core, median of {REPEATS} (least to most)"
    table = Table("", "ms a clip", "clips a second", "of plain", title=title)
    for way, values in runs.items():
        ratios = [a / b for a, b in zip(runs["plain"], values, strict=True)]
        rates = [1000 / value for value in values]
        table.add_row(way, spread(values, ".2f"), spread(rates, ".0f"), spread(ratios, ".0%"))
    return table


def spread(values, form):
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({least:{form}} to {most:{form}})"


def start_preparation(data, out):
    code = "import sys; from tf_data_pipelines.prepare import prepare_data as p; p(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, data, out], stderr=subprocess.PIPE)


def kill_often(folder, kills):
    """Kill preparations at random moments; finish each, and compare it with an unbroken one."""
    draw, data, out = random.Random(0), folder / "data", folder / "out"
    write_files(data, SMALL, SMALL_SECONDS, "wav")
    start = time.perf_counter()
    prepare_data(data, folder / "unbroken")
    expected = digests(folder / "unbroken")
    finish(start_preparation(data, out))
    longest = time.perf_counter() - start
    assert digests(out) == expected
    shutil.rmtree(out)
    done = runs = 0
    moments = {"before the first shard": 0, "between shards": 0, "after the last": 0}
    for _ in track(range(kills), "Killing"):
        while True:
            process = start_preparation(data, out)
            try:
                # Exponential, so that some die at once and some come far.
                process.wait(min(longest, draw.expovariate(3 / longest)))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                place = out if out.exists() else folder / "out.partial"
                shards = len(list(place.glob("*.tfrecord")))
                of = len(expected) - 1
                moments[list(moments)[0 if not shards else 1 if shards < of else 2]] += 1
                done += 1
                if not out.exists():  # else it died with its work done
                    break
                process = None
            runs += whole(process, out, expected)
    finish(start_preparation(data, out))
    runs += whole(None, out, expected)
    return {"kills": done, "finished": runs, "shards": len(expected) - 1, **moments}


def finish(process):
    errors = process.communicate()[1].decode()
    assert process.returncode == 0, errors[-2000:]


def whole(process, out, expected):
    """1 after a check that a finished preparation is that of an unbroken one."""
    if process is not None:
        finish(process)
    assert digests(out) == expected
    shutil.rmtree(out)
    return 1


def digests(folder):
    """{name: SHA-256} of the files of a folder."""
    files = sorted(pathlib.Path(folder).iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="also write the numbers here")
    parser.add_argument("--kills", type=int, metavar="N", help="kill preparations N times instead")
    arguments = parser.parse_args()
    if not arguments.kills and len(os.sched_getaffinity(0)) != 1:
        parser.error("run it on one core: taskset -c 1 python examples/benchmarks/prepare.py")
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        if arguments.kills:
            results = kill_often(folder, arguments.kills)
            print(json.dumps(results))
        else:
            results = speed(folder)
            Console(width=110).print(speed_table(results))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(results))
