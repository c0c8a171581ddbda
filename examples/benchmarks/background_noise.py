"""Accuracy of a run on test clips with background noise, told their length or in a whole buffer.

python examples/benchmarks/background_noise.py flexast-demo

RUN holds its data in speech/, as `flexast demo` writes it. 2026-11-29, the demo's run, 600 clips:

patch size                        8      16      24      32      48
as recorded                    97.0    98.7    99.0    98.0    96.7
silent buffer                  95.7    98.3    98.8    96.5    93.5
-60 dBFS under the clip        96.5    98.5    98.8    97.8    96.3
-60 dBFS in the whole buffer   95.7    98.0    98.7    96.5    93.5
-40 dBFS under the clip        86.3    90.8    94.3    91.3    89.0
-40 dBFS in the whole buffer   75.2    87.2    87.7    88.5    82.3
"""

import argparse
import pathlib

import numpy as np

from keras_flexast import load_classifier
from keras_flexast.metrics import accuracy
from keras_flexast.runs import load_run
from tf_data_pipelines import read_data

SIZES, LEVELS = (8, 16, 24, 32, 48), (-60, -40)  # decibels of the noise's power over full scale


def backgrounds(waveforms, samples):
    """{name: list of waveforms}, the clips in each background; longer ones keep their length."""
    rng = np.random.default_rng(0)
    noises = [rng.normal(size=max(samples, len(one))).astype("float32") for one in waveforms]
    pairs = list(zip(waveforms, noises, strict=True))
    buffers = [np.pad(one, (0, len(noise) - len(one))) for one, noise in pairs]
    found = {"as recorded": waveforms, "silent buffer": buffers}
    for level in LEVELS:
        scale = np.float32(10 ** (level / 20))
        under = [one + scale * noise[: len(one)] for one, noise in pairs]
        whole = [one + scale * noise for one, noise in zip(buffers, noises, strict=True)]
        found |= {f"{level} dBFS under the clip": under, f"{level} dBFS in the whole buffer": whole}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=pathlib.Path)
    folder = parser.parse_args().run
    run = load_run(folder)
    test = read_data(folder / "speech", run.fbank, classes=run.classes, split="test")
    rate = run.fbank.sample_rate
    waveforms = [clip.read(rate) for clip in test.source.clips]
    heard = backgrounds(waveforms, round(run.clip_seconds * rate))
    print(f"{'patch size':<28}", *(f"{size:>7}" for size in SIZES), sep="")
    for name, clips in heard.items():
        scores = [load_classifier(run, size).predict(clips) for size in SIZES]
        values = [100 * accuracy(test.source.targets(), one) for one in scores]
        print(f"{name:<28}", *(f"{value:7.1f}" for value in values), sep="")


if __name__ == "__main__":
    main()
