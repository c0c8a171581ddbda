"""Ctrl-C ends a real process within seconds, with one line, wherever it is."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import keras
import numpy as np
import pytest
import soundfile
from helpers import ROOT

# A real process must not ignore SIGINT, as those that a shell starts in the background do.
START = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv[0] = "flexast"
"""
DROPPED = """
    from keras_flexast.interrupts import end_on_interrupt
    leave = end_on_interrupt(lambda: "Stopped. Here.")
    class Slow:
        def __del__(self):
            print("ready", flush=True)
            time.sleep(30)  # KeyboardInterrupt ends this, and goes no further
    try:
        if sys.argv[1] == "in a __del__":
            Slow()
        print("ready", flush=True)
        time.sleep(30)
    except KeyboardInterrupt:
        leave()
"""
TRAIN = """
    from keras_flexast import cli
    cli.main()
"""


def start(code, *arguments):
    """A process that runs the code, to be read from and interrupted."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(START) + textwrap.dedent(code), *arguments],
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def interrupted(process):
    """(exit code, standard error, seconds) of a process that gets SIGINT now."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    return process.returncode, message, time.monotonic() - begin


@pytest.mark.parametrize("where", ["in plain code", "in a __del__"])
def test_a_process_ends_within_seconds(where):
    process = start(DROPPED, where)
    assert process.stdout.readline() == "ready\n"
    code, message, seconds = interrupted(process)
    assert (code, message) == (130, "Stopped. Here.\n") and seconds < 5


def test_a_training_ends_in_its_first_step_and_names_the_partial_run(tmp_path):
    rng, partial = np.random.default_rng(0), tmp_path / "run.partial"
    for number in range(6):
        path = tmp_path / "sounds" / ("low", "high")[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, 8000), 16000)
    process = start(
        TRAIN, "train", tmp_path / "sounds", "--out", tmp_path / "run", "--batch-tokens", "256"
    )
    while not (partial / "settings.json").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)  # now the first step is traced and compiled
    code, message, seconds = interrupted(process)
    assert code == 130 and seconds < 10, message
    goes_on = "The same command with --resume goes on."
    last = message.splitlines()[-1]  # after a warning of the few validation clips
    assert last == f"Stopped. The best weights so far are in {partial}. {goes_on}"
