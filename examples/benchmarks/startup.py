"""How long until something happens: help, imports, a model, and its first step, cold and kept.

python examples/benchmarks/startup.py [--size tiny] [--json PATH]

Every number is of a process of its own, the median of three. "Kept" finds the compiled step of
the process before on disk, where `flexast` keeps it.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

REPEATS = 3
STAGES = ("import", "model", "first step", "second step")
STEP = """
import json, sys, time
marks = [time.perf_counter()]
import keras_flexast
from keras_flexast.training import compile_packed
import keras, numpy as np
keras.utils.set_random_seed(0)
marks.append(time.perf_counter())
model = keras_flexast.ElasticAST(10, size=sys.argv[1])
compile_packed(model, 1e-4, row_length=512)
marks.append(time.perf_counter())
inputs = {
    "tokens": np.ones((2, 512, 256), "float32"),
    "positions": np.ones((2, 512, 4), "float32"),
    "segment_ids": np.repeat(np.arange(1, 9, dtype="int32")[None], 64, 1).repeat(2, 0),
}
labels, weights = np.zeros((2, 16), "int32"), np.ones((2, 16), "float32")
for _ in range(2):
    float(model.train_on_batch(inputs, labels, sample_weight=weights)[0])
    marks.append(time.perf_counter())
print("SECONDS", json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""


def first_steps(backend, size, cache):
    """Seconds of each stage in a new process."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "TF_XLA_FLAGS": f"--tf_xla_persistent_cache_directory={cache}/tensorflow",
    }
    done = subprocess.run(
        [sys.executable, "-c", STEP, size], env=environment, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SECONDS ")]
    if not lines:
        raise SystemExit(f"{backend} failed:\n{done.stderr[-2000:]}")
    return dict(zip(STAGES, json.loads(lines[0].removeprefix("SECONDS ")), strict=True))


def help_seconds():
    start = time.perf_counter()
    command = [pathlib.Path(sys.executable).with_name("flexast"), "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(size):
    runs = {"flexast --help": {"all": [help_seconds() for _ in range(REPEATS)]}}
    for backend in ("tensorflow", "jax"):
        for kept in ("cold", "kept"):
            runs[f"{backend}, {kept}"] = {stage: [] for stage in STAGES}
        for _ in range(REPEATS):
            with tempfile.TemporaryDirectory() as cache:
                for kept in ("cold", "kept"):
                    for stage, seconds in first_steps(backend, size, cache).items():
                        runs[f"{backend}, {kept}"][stage].append(seconds)
    return runs


def main():
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    console = Console()
    with console.status("Starting processes"):
        runs = measure(options.size)
    table = Table(f"seconds, {options.size}", "import, or all of it", *STAGES[1:])
    for name, stages in runs.items():
        texts = [
            f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
            for values in stages.values()
        ]
        table.add_row(name, *texts)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"size": options.size, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
