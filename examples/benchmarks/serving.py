"""A served batch of short clips and one long one, against the same clips in batches of their own.

KERAS_BACKEND=tensorflow python examples/benchmarks/serving.py [--size nano] [--json PATH]

A server merges strangers' requests, so a long clip must not make the short ones wait. The
SavedModel runs as TensorFlow Serving runs it, signature by signature; random weights. Its peak
memory is that of a process which answers one batch.
"""

import argparse
import io
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

RATE, CLASSES, SEED, REPEATS = 16000, 10, 0, 5
PATCHES = (8, 16, 32)
BATCHES = {  # (signature, number of short clips, their seconds, seconds of the long one)
    "waveforms": ("patch_{}", 31, 0.9, 40.9),
    "WAV files": ("classify_wav_{}", 7, 0.9, 20.0),
}
MEMORY_SECONDS, MEMORY_CLIPS = 20.0, (1, 8, 32)


def write(folder, size):
    """Write the served model; it needs Keras on TensorFlow."""
    import keras

    from keras_flexast import ElasticAST
    from keras_flexast.export import write_serving
    from keras_flexast.runs import Run
    from tf_data_pipelines import FbankSettings, PackSettings

    keras.utils.set_random_seed(SEED)
    model = ElasticAST(CLASSES, size)
    names = tuple(f"class {index}" for index in range(CLASSES))
    run = Run(
        model, FbankSettings(mean=-9.0, std=4.0), patches=model.patch_settings(),
        packing=PackSettings(), classes=names,
    )  # fmt: skip
    return write_serving(run, folder, patch_sizes=PATCHES, name="benchmark")


def wav(samples):
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="WAV", subtype="PCM_16")
    return stream.getvalue()


def inputs(signature, seconds):
    """The inputs of one request for noise of these lengths."""
    import tensorflow as tf

    rng = np.random.default_rng(SEED)
    clips = [rng.normal(0, 0.1, round(RATE * one)).astype("float32") for one in seconds]
    if "wav" in signature:
        return {"wav_bytes": tf.constant([wav(clip) for clip in clips])}
    waveform = np.zeros((len(clips), max(map(len, clips))), "float32")
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    length = np.array([len(clip) for clip in clips], "int32")
    return {"waveform": tf.constant(waveform), "length": tf.constant(length)}


def measure(version):
    """Seconds of the short clips, of the long one and of all together, in turns."""
    import tensorflow as tf

    served, results = tf.saved_model.load(str(version)), []
    for name, (signature, count, short, long) in BATCHES.items():
        for patch in PATCHES:
            function = served.signatures[signature.format(patch)]
            batches = {
                "short": inputs(signature, [short] * count),
                "long": inputs(signature, [long]),
                "together": inputs(signature, [*[short] * count, long]),
            }
            seconds = {kind: [] for kind in batches}
            for turn in range(1 + REPEATS):  # the first warms up
                for kind, batch in batches.items():
                    start = time.perf_counter()
                    answer = function(**batch)
                    assert not any(answer["error"].numpy())
                    if turn:
                        seconds[kind].append(time.perf_counter() - start)
            turns = zip(*seconds.values(), strict=True)
            ratios = [together / (alone + other) for alone, other, together in turns]
            results.append({"batch": name, "patch": patch, "seconds": seconds, "ratios": ratios})
    return results


def peak(version, patch, clips):
    """Answer one batch; MiB of memory that this took at most, beyond that of the loaded model."""
    import tensorflow as tf

    def status(name):
        text = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) / 1024

    function = tf.saved_model.load(str(version)).signatures[f"patch_{patch}"]
    function(**inputs("", [0.5]))
    batch = inputs("", [MEMORY_SECONDS] * clips)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    function(**batch)
    print(status("VmHWM") - before)


def peaks(version):
    found = []
    for patch in PATCHES:
        for clips in MEMORY_CLIPS:
            command = [sys.executable, __file__, "--peak", str(version), str(patch), str(clips)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append({"patch": patch, "clips": clips, "mib": float(done.stdout.split()[-1])})
    return found


def main():
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="nano")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak[0], *map(int, options.peak[1:]))
        return
    console = Console()
    with console.status("Writing and timing"), tempfile.TemporaryDirectory() as folder:
        version = write(pathlib.Path(folder, "served"), options.size)
        result = {"size": options.size, "times": measure(version), "memory": peaks(version)}
    table = Table(options.size, "patch", "short, ms", "long, ms", "together, ms", "over apart")
    for one in result["times"]:
        middle = [f"{1000 * statistics.median(times):.0f}" for times in one["seconds"].values()]
        least, most = min(one["ratios"]), max(one["ratios"])
        ratio = f"{statistics.median(one['ratios']):.2f} ({least:.2f}-{most:.2f})"
        table.add_row(one["batch"], str(one["patch"]), *middle, ratio)
    console.print(table)
    table = Table("patch", *map(str, MEMORY_CLIPS), title=f"MiB, clips of {MEMORY_SECONDS:g} s")
    for patch in PATCHES:
        mib = [f"{one['mib']:.0f}" for one in result["memory"] if one["patch"] == patch]
        table.add_row(str(patch), *mib)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
