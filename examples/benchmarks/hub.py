"""KerasHub's door beside ours: AudioClassifier.predict and load_classifier, the same clips; LoRA.

python examples/benchmarks/hub.py RUN [--clips 600] [--json PATH]

Both classify clips of 0.5 to 4 s of noise in turn, each after a first time that compiles. Then one
training step of an AST of the base size, all weights or LoRA of rank 8, each in a process of
its own: trainable weights, seconds, and the largest memory.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

REPEATS, RANK = 5, 8
STEP = """
import json, resource, sys, time
import keras, numpy as np
from keras_flexast.hub import ASTBackbone, AudioClassifier
backbone = ASTBackbone(dim=768, depth=12, num_heads=12, prefix_tokens=1, table="joint")
classifier = AudioClassifier(backbone, 50, pooling="cls", segments=8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "lora":
    backbone.enable_lora(int(sys.argv[2]))
trained = sum(int(np.prod(w.shape)) for w in backbone.trainable_variables)
rng = np.random.default_rng(0)
inputs = {
    "tokens": rng.normal(size=(1, 1024, 256)).astype("float32"),
    "positions": np.ones((1, 1024, 4), "float32"),
    "segment_ids": np.repeat(np.arange(1, 9, dtype="int32"), 128)[None],
}
for _ in range(2):
    start = time.perf_counter()
    loss = classifier.train_on_batch(inputs, np.zeros((1, 8), "int32"), np.ones((1, 8), "float32"))
    float(loss[0])
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({
    "trained": trained, "weights": backbone.count_params(), "seconds": time.perf_counter() - start,
    "step_mib": (most - before) / 1024,
}))
"""


def seconds_of(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def predict(run, count):
    """Difference of the scores, and seconds of both doors in turn."""
    from keras_flexast import load_classifier
    from keras_flexast.hub import AudioClassifier

    ours, theirs = load_classifier(run), AudioClassifier.from_preset(run)
    rng = np.random.default_rng(0)
    samples = (ours.sample_rate * rng.uniform(0.5, 4, count)).astype(int)
    clips = [rng.normal(0, 0.1, size).astype("float32") for size in samples]
    difference = np.abs(ours.predict(clips) - theirs.predict(clips)).max()
    pairs = [
        (seconds_of(lambda: theirs.predict(clips)), seconds_of(lambda: ours.predict(clips)))
        for _ in range(REPEATS)
    ]
    ratios = [hub / own for hub, own in pairs]
    return {
        "clips": count,
        "difference": float(difference),
        "hub_seconds": statistics.median(hub for hub, _ in pairs),
        "ratio": statistics.median(ratios),
        "ratios": [round(one, 2) for one in ratios],
    }


def step(kind):
    """Trainable weights, seconds and memory of a training step of the base size."""
    done = subprocess.run(
        [sys.executable, "-c", STEP, kind, str(RANK)],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    found = {"predict": predict(given.run, given.clips)}
    found.update({kind: step(kind) for kind in ("all", "lora")})
    share = found["lora"]["trained"] / found["lora"]["weights"]
    found["lora"]["share"] = share
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
