"""Packed rows built by hand, and Python in a process of its own."""

import os
import pathlib
import subprocess
import sys
import textwrap

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the time goes into compiling programs that run once.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


def rows_of(layout, length, segments=0):
    """A packed batch without the pipeline's packer.

    layout lists the clips of each row, (tokens, positions) pairs; the rest is padding.
    """
    width = layout[0][0][0].shape[1]
    batch = {
        "tokens": np.zeros((len(layout), length, width), "float32"),
        "positions": np.zeros((len(layout), length, 4), "float32"),
        "segment_ids": np.zeros((len(layout), length), "int32"),
    }
    for row, clips in enumerate(layout):
        assert segments == 0 or len(clips) <= segments
        start = 0
        for segment, (tokens, positions) in enumerate(clips, 1):
            place = (row, slice(start, start + len(tokens)))
            batch["tokens"][place] = tokens
            batch["positions"][place] = positions
            batch["segment_ids"][place] = segment
            start += len(tokens)
    return batch


def run_python(code, *arguments, backend, blocked=()):
    """Run code in a new process on a backend and return what it printed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({tuple(blocked)}))\n"
    done = subprocess.run(
        [sys.executable, "-c", block + textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def pack_rows():
    """`rows_of`."""
    return rows_of


@pytest.fixture(scope="session")
def python():
    """`run_python`."""
    return run_python


@pytest.fixture(scope="session")
def randomise():
    """Function that gives every weight a random value, so that none is neutral."""

    def set_weights(model, seed=0, scale=0.3):
        rng = np.random.default_rng(seed)
        model.set_weights([rng.normal(size=w.shape) * scale for w in model.get_weights()])
        return model

    return set_weights
