"""How much PI-resize amplifies at each patch size, and what a ridge does to the accuracy there.

python examples/experiments/conditioning.py RUN DATA [--json PATH]

The pseudo-inverse of the bilinear matrix turns a patch of data into one of the base size. Where it
is ill-conditioned, it amplifies what is fine in a patch: the largest absolute column sum tells how
much along one axis. A ridge bounds it; the run is evaluated with several, untrained for any.
"""

import argparse
import json

import numpy as np
from rich.console import Console
from rich.table import Table

from keras_flexast.evaluation import evaluate_run
from keras_flexast.runs import load_run
from tf_data_pipelines import patches, read_data
from tf_data_pipelines.resize import bilinear_matrix
from tf_data_pipelines.settings import BASE_PATCH

SIZES = (8, 12, 14, 16, 18, 20, 22, 24, 28, 32, 36, 40, 44, 48)
RIDGES = (0.0, 0.01, 0.03, 0.1)


def ridge_matrix(ridge):
    """kernel_matrix with a ridge: the pseudo-inverse where it is 0."""

    def matrix(patch, base=BASE_PATCH, resize="pi"):
        forward = bilinear_matrix(base, patch)
        if patch == base or ridge == 0:
            return np.linalg.pinv(forward).T
        return forward @ np.linalg.inv(forward.T @ forward + ridge * np.eye(base))

    return matrix


def amplification(patch):
    """Largest absolute sum of a column of the matrix that acts on one axis of a patch of data."""
    return float(np.abs(ridge_matrix(0.0)(patch)).sum(0).max())


def with_ridge(ridge, call):
    """What a function returns while tokens are made with a ridge."""
    own = patches.kernel_matrix
    try:
        patches.kernel_matrix = ridge_matrix(ridge)
        patches._plan.cache_clear()  # of the matrices before
        return call()
    finally:
        patches.kernel_matrix = own
        patches._plan.cache_clear()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--json", metavar="PATH", help="also write the numbers here")
    given = parser.parse_args()
    run = load_run(given.run)
    data = read_data(given.data, run.fbank, classes=run.classes, split="test", shares=run.shares)
    found = {}
    for ridge in RIDGES:
        results = with_ridge(ridge, lambda: evaluate_run(run, data, patch_sizes=SIZES))
        found[ridge] = {result["name"]: result["value"] for result in results}
    table = Table("patch size", "amplification", *(f"ridge {ridge:g}" for ridge in RIDGES))
    for size in SIZES:
        values = (f"{100 * found[ridge][str(size)]:.1f}" for ridge in RIDGES)
        table.add_row(str(size), f"{amplification(size):.2f}", *values)
    Console(width=100).print(table)
    if given.json:
        report = {"amplification": {size: amplification(size) for size in SIZES}, "accuracy": found}
        with open(given.json, "w") as file:
            json.dump(report, file, indent=1)
