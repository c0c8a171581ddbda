"""How fast log-mel features are, against kaldi-native-fbank and Hugging Face's AST extractor.

taskset -c 1 python examples/benchmarks/features.py [--json PATH]

2026-11-21, one core of an AMD EPYC whose other core was at work (load 1.7), TensorFlow 2.21,
kaldi-native-fbank 1.22.5, transformers 5.23 without torchaudio: 29 s. Processor time of 10 s of
sound, median (least to most) of 9; the difference is the largest, in natural log of power.

                           ms a clip                times as long          difference
log_mel in dataset.map      1.51 (1.40 to 1.79)
kaldi-native-fbank         15.91 (15.40 to 23.47)   10.4 (9.3 to 14.0)     9.5e-04
ASTFeatureExtractor        20.37 (19.07 to 29.20)   13.4 (10.9 to 19.3)    5.0e-04
"""

import argparse
import json
import os
import platform
import statistics
import time

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tf_data_pipelines import FbankSettings, log_mel

SECONDS = 10  # AudioSet's clips
CALLS = 20  # of the others, a repeat: 0.3 s
CLIPS = 200  # of the dataset, a repeat: 0.3 s
REPEATS = 9  # in turn, so that every way meets the same neighbors on the machine
FLOOR = -15.0  # where float32 rounding does not yet show; the features' own floor is -15.9


def waveform(settings):
    """A sweep in noise, so that every mel bin has something well above the floor."""
    times = np.arange(SECONDS * settings.sample_rate) / settings.sample_rate
    sweep = 0.3 * np.sin(2 * np.pi * (100 + 350 * times) * times)
    return (sweep + np.random.default_rng(0).normal(0, 0.1, times.size)).astype("float32")


def kaldi(settings):
    """kaldi-native-fbank: its online class, frame by frame, as its documentation does."""
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.samp_freq = settings.sample_rate
    options.frame_opts.frame_shift_ms = settings.frame_shift_ms
    options.frame_opts.window_type = "hanning"
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = settings.mel_bins

    def features(wave):
        fbank = knf.OnlineFbank(options)
        fbank.accept_waveform(settings.sample_rate, wave)
        fbank.input_finished()
        return np.stack([fbank.get_frame(k) for k in range(fbank.num_frames_ready)])

    return features


def hugging_face(settings):
    """ASTFeatureExtractor without its normalization and without padding to 1,024 frames."""
    import torch
    from transformers import ASTFeatureExtractor

    torch.set_num_threads(1)
    frames = int(settings.frames(SECONDS * settings.sample_rate))
    extractor = ASTFeatureExtractor(max_length=frames, do_normalize=False)
    rate = settings.sample_rate
    return lambda wave: extractor(wave, rate, return_tensors="np")["input_values"][0]


def ours(wave, settings):
    """Log-mel of the clip, and an endless iterator whose steps make CLIPS of them each."""
    waves = tf.constant(wave)

    def one(number):  # of another length each time, as sound files are, and as many frames
        return log_mel(waves[: wave.size - number % (settings.shift // 2)], settings)

    sizes = tf.data.Dataset.counter().map(one, tf.data.AUTOTUNE).map(tf.size).batch(CLIPS)
    return log_mel(wave, settings).numpy(), iter(sizes)


def milliseconds(function):
    """Processor time of all threads, also of those that refill buffers afterwards."""
    start = settled()
    function()
    return 1000 * (settled() - start)


def settled():
    """Processor time so far, as soon as no thread is at work."""
    last = time.process_time()
    while True:
        time.sleep(0.05)
        now = time.process_time()
        if now - last < 0.001:
            return now
        last = now


def measure(settings):
    wave = waveform(settings)
    expected, steps = ours(wave, settings)
    methods = {"log_mel in dataset.map": (lambda: next(steps), CLIPS)}
    differences = {}
    for name, make in (("kaldi-native-fbank", kaldi), ("ASTFeatureExtractor", hugging_face)):
        try:
            other = make(settings)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        above = expected > FLOOR
        differences[name] = float(np.abs(other(wave) - expected)[above].max())
        methods[name] = (lambda other=other: [other(wave) for _ in range(CALLS)], CALLS)
    spent = {name: [] for name in methods}
    for repeat in range(REPEATS + 1):
        for name, (function, clips) in methods.items():
            time_of_clip = milliseconds(function) / clips
            if repeat:  # the first warms up
                spent[name].append(time_of_clip)
    own = next(iter(spent.values()))
    return [
        {
            "method": name,
            "milliseconds": values,
            "ratio": [value / unit for value, unit in zip(values, own, strict=True)],
            "difference": differences.get(name),
        }
        for name, values in spent.items()
    ]


def make_table(results):
    title = f"{SECONDS} s of sound to log-mel, one core: median of {REPEATS} (least to most)"
    table = Table("", title=title)
    for name in ("ms a clip", "times as long", "largest difference"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            result["method"],
            spread(result["milliseconds"], 2),
            spread(result["ratio"], 1),
            f"{result['difference']:.1e}" if result["difference"] else "",
        )
    return table


def spread(values, digits):
    least, most = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="also write the numbers here")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) != 1:
        parser.error("run it on one core: taskset -c 1 python examples/benchmarks/features.py")
    results = measure(FbankSettings())
    Console(width=110).print(make_table(results))
    if arguments.json:
        machine = f"one core of {platform.machine()}, TensorFlow {tf.__version__}"
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "seconds": SECONDS, "results": results}, file, indent=2)
