"""How the time of a training step grows: tokens, clips in a row, model size, row length.

KERAS_BACKEND=tensorflow python examples/benchmarks/growth.py [--figure PATH] [--json PATH]

One thing grows in each panel, the others stay. A line through the first point shows linear
growth, or none where only the layout of the same tokens changes.
The model is nano but in the panel of sizes.
"""

import argparse
import gc
import json
import pathlib
import statistics
import time

import numpy as np

REPEATS = 3
BASE = {"size": "nano", "rows": 2, "row_length": 2048, "clips": 8}
PANELS = {  # what grows: (settings, the value on the axis)
    "tokens in a batch": [
        ({**BASE, "rows": rows, "row_length": 1024, "clips": 4}, 1024 * rows)
        for rows in (1, 2, 4, 8)
    ],
    "clips in a row of 2,048": [({**BASE, "clips": clips}, clips) for clips in (1, 2, 4, 8, 16)],
    "weights, millions": [
        ({**BASE, "rows": 1, "row_length": 1024, "clips": 4, "size": size}, weights)
        for size, weights in (("nano", 0.5), ("tiny", 5.6), ("small", 22.1))
    ],
    "tokens in a row, of 4,096": [
        ({**BASE, "rows": 4096 // length, "row_length": length, "clips": length // 256}, length)
        for length in (512, 1024, 2048, 4096)
    ],
}


def step_seconds(size, rows, row_length, clips):
    """Seconds of each of REPEATS steps, after one that compiles."""
    from keras_flexast import ElasticAST
    from keras_flexast.training import compile_packed

    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(1, clips + 1, dtype="int32"), row_length // clips)
    inputs = {
        "tokens": rng.normal(size=(rows, row_length, 256)).astype("float32"),
        "positions": np.ones((rows, row_length, 4), "float32"),
        "segment_ids": np.repeat(ids[None], rows, 0),
    }
    labels = rng.integers(0, 10, (rows, 16))
    weights = np.repeat(np.float32(np.arange(16) < clips)[None], rows, 0)
    model = ElasticAST(10, size=size)
    compile_packed(model, 1e-4, row_length=row_length)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        float(model.train_on_batch(inputs, labels, sample_weight=weights)[0])
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure():
    import keras
    from rich.progress import track

    points = [(panel, *point) for panel, listed in PANELS.items() for point in listed]
    results = {panel: [] for panel in PANELS}
    for panel, settings, value in track(points, "Timing steps"):
        results[panel].append({"value": value, "seconds": step_seconds(**settings), **settings})
        keras.utils.clear_session()
        gc.collect()
    return results


def draw(results, path, backend):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    figure, axes = pyplot.subplots(2, 2, figsize=(8, 6), layout="constrained")
    for axis, (panel, points) in zip(axes.flat, results.items(), strict=True):
        values = [point["value"] for point in points]
        middle = np.array([statistics.median(point["seconds"]) for point in points])
        least, most = (np.array([f(point["seconds"]) for point in points]) for f in (min, max))
        axis.errorbar(values, middle, (middle - least, most - middle), marker="o", capsize=3)
        if "of 4,096" in panel or "clips" in panel:  # the tokens stay
            line, name = np.full(len(values), middle[0]), "constant"
        else:
            line, name = middle[0] * np.array(values) / values[0], "linear"
        axis.plot(values, line, "--", color="gray", label=name)
        axis.set(xscale="log", yscale="log", xlabel=panel, ylabel="seconds a step")
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticklabels([f"{value:,}" for value in values])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylim(least.min() / 2, max(most.max(), line.max()) * 2)
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    figure.suptitle(f"Time of a training step, {backend}; median, least and most of {REPEATS}")
    figure.savefig(path, dpi=120)


def main():
    import keras
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    backend = keras.backend.backend()
    beside = pathlib.Path(__file__).with_name(f"growth_{backend}.png")
    parser.add_argument("--figure", type=pathlib.Path, default=beside)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    results = measure()
    table = Table(backend, "value", "seconds a step", "spread", "against the first")
    for panel, points in results.items():
        first = statistics.median(points[0]["seconds"])
        for point in points:
            seconds = point["seconds"]
            middle = statistics.median(seconds)
            table.add_row(
                panel,
                f"{point['value']:,}",
                f"{middle:.3f}",
                f"{min(seconds):.3f}-{max(seconds):.3f}",
                f"{middle / first:.2f}",
            )
    Console().print(table)
    draw(results, options.figure, backend)
    if options.json:
        report = {"backend": backend, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
