"""Trainings killed with -9 at random moments: do they end with the weights of an unbroken one?

KERAS_BACKEND=tensorflow python examples/benchmarks/resume.py [--kills 20] [--seed 0]

A tiny training with dropout and averaged weights saves its state after every step. Each process
is killed at a moment drawn uniformly from the time that an unbroken one takes, from its start to
after its end; the next one goes on with --resume. A training that ends is compared, bit for bit,
and another one begins, until all kills are done.
"""

import argparse
import hashlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

import h5py
import numpy as np
import soundfile

RECIPE = """
from keras_flexast.settings import TrainSettings
train = TrainSettings(
    epochs=4, batch_tokens=128, row_length=64, segments=4, ema=0.9, save_minutes=1e-9
)
patch_sizes = (8, 16, 32)
model = {"size": None, "dim": 16, "depth": 1, "num_heads": 2, "dropout": 0.1}
"""


def write_sounds(root, clips=24):
    """Two classes of noisy tones."""
    rng = np.random.default_rng(0)
    for number in range(clips):
        times = np.arange(6000 + 100 * number) / 16000
        tone = 0.3 * np.sin(2 * np.pi * (300, 2000)[number % 2] * times)
        path = root / ("low", "high")[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone + rng.normal(0, 0.1, len(times)), 16000)


def start(folder, out, resume=False):
    """The process of a training."""
    command = ["train", folder / "sounds", "--out", out, "--recipe", folder / "recipe.py"]
    return subprocess.Popen(
        [sys.executable, "-m", "keras_flexast.cli", *map(str, command), *["--resume"] * resume],
        env={**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process):
    """Wait for a training that must not fail."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"A training failed:\n{errors}")


def weights_of(run):
    """Digest of the weights of a run, whatever else its file holds."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(run / "model.keras") as archive:
        content = h5py.File(io.BytesIO(archive.read("model.weights.h5")))
    names = []
    content.visit(names.append)
    for name in sorted(names):
        if isinstance(content[name], h5py.Dataset) and not name.startswith("optimizer"):
            digest.update(name.encode() + content[name][()].tobytes())
    return digest.hexdigest()[:16]


def place(partial):
    """What was there at a kill: how many batches, or how far it came before the first."""
    if not partial.exists():
        return "before the folder"
    if not (partial / "state.npz").exists():
        return "before the state"
    with zipfile.ZipFile(partial / "state.npz") as archive:
        facts = json.loads(archive.read("facts.json"))
    return f"batch {facts['place']} of {4 * facts['steps']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_sounds(folder / "sounds")
        (folder / "recipe.py").write_text(RECIPE)
        finished(start(folder, folder / "first"))  # compiles
        begin = time.monotonic()
        finished(start(folder, folder / "unbroken"))
        seconds, expected = time.monotonic() - begin, weights_of(folder / "unbroken")
        same = weights_of(folder / "first") == expected
        print(f"unbroken: {seconds:.1f} s, weights {expected}, twice the same: {same}", flush=True)
        kills, number, wrong = 0, 0, 0
        while kills < options.kills or number == 0:
            number += 1
            out, partial = folder / f"run{number}", folder / f"run{number}.partial"
            while not out.exists():
                process = start(folder, out, resume=partial.exists())
                moment = draw.uniform(0, 1.1 * seconds)
                if kills < options.kills:
                    try:
                        process.wait(moment)
                    except subprocess.TimeoutExpired:
                        process.send_signal(signal.SIGKILL)
                        process.communicate()
                        kills += 1
                        print(f"kill {kills}: {moment:5.1f} s, {place(partial)}", flush=True)
                        continue
                finished(process)
            found = weights_of(out)
            wrong += found != expected
            print(f"training {number}: weights {found}, equal: {found == expected}", flush=True)
        print(f"{kills} kills, {number} trainings, {wrong} with other weights")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
