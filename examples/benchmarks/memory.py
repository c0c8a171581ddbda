"""Peak memory and seconds of a training step: float32, mixed precision, recomputed, accumulated.

KERAS_BACKEND=tensorflow python examples/benchmarks/memory.py [--size tiny] [--json PATH]

Each case is a process of its own. All learn from 8,192 tokens a step of the optimizer: in one
batch, or in four where gradients are accumulated.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

TOKENS, ROW_LENGTH, CLIP, SEGMENTS = 8192, 2048, 256, 8
STEPS = 3
CASES = {  # dtype, remat, accumulate
    "float32": ("float32", False, 1),
    "mixed_bfloat16": ("mixed_bfloat16", False, 1),
    "remat": ("float32", True, 1),
    "accumulate 4": ("float32", False, 4),
    "all three": ("mixed_bfloat16", True, 4),
}


def measure(name, size):
    """Print the bytes before the first step and at the peak, and the seconds of each step."""
    from keras_flexast import ElasticAST
    from keras_flexast.training import compile_packed

    dtype, remat, accumulate = CASES[name]
    rng, rows = np.random.default_rng(0), TOKENS // ROW_LENGTH // accumulate
    ids = np.repeat(np.arange(1, ROW_LENGTH // CLIP + 1, dtype="int32"), CLIP)
    inputs = {
        "tokens": rng.normal(size=(rows, ROW_LENGTH, 256)).astype("float32"),
        "positions": np.ones((rows, ROW_LENGTH, 4), "float32"),
        "segment_ids": np.repeat(ids[None], rows, 0),
    }
    labels = rng.integers(0, 10, (rows, SEGMENTS))
    weights = np.ones((rows, SEGMENTS), "float32")
    model = ElasticAST(10, size=size, segments=SEGMENTS, dtype=dtype, remat=remat)
    compile_packed(model, 1e-4, row_length=ROW_LENGTH, accumulate=accumulate)
    before, seconds = peak(), []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        for _ in range(accumulate):
            loss = model.train_on_batch(inputs, labels, sample_weight=weights)[0]
        float(loss)
        seconds.append(time.perf_counter() - start)
    result = {"before": before, "peak": peak(), "first": seconds[0], "seconds": seconds[1:]}
    print("RESULT", json.dumps(result))


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.only, options.size)
        return
    from rich.console import Console
    from rich.table import Table

    console, results = Console(), {}
    for name in CASES:
        with console.status(f"Measuring {name}"):
            command = [sys.executable, __file__, "--size", options.size, "--only", name]
            done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        results[name] = json.loads(lines[0].removeprefix("RESULT "))
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    title = f"{options.size} on {backend}, {TOKENS:,} tokens"
    table = Table(title, "GiB before", "GiB at the peak", "seconds a step", "spread", "first")
    for name, one in results.items():
        table.add_row(
            name,
            f"{one['before']:.2f}",
            f"{one['peak']:.2f}",
            f"{statistics.median(one['seconds']):.2f}",
            f"{min(one['seconds']):.2f}-{max(one['seconds']):.2f}",
            f"{one['first']:.1f}",
        )
    console.print(table)
    if options.json:
        report = {"backend": backend, "size": options.size, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
