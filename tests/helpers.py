"""What several tests share: packed rows, Python in a process of its own, tiny classifiers."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
import zipfile

import keras
import numpy as np
import pytest
import soundfile

# A test that starts a process of its own, where the backend of this one makes no difference.
ONCE = pytest.mark.skipif(keras.backend.backend() != "jax", reason="the same on every backend")
# The same, where TensorFlow does the work in a process of its own if it is not in this one.
IN_PLACE = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's work")
ROOT = pathlib.Path(__file__).parents[1]
SAMPLES, CLASSES = 1000, ("low", "middle", "high")  # of the tiny classifiers
MODEL = {  # what a model card says of its model
    "name": "tones", "classes": list(CLASSES), "multi_label": False, "parameters": 3000,
    "pooling": "mean", "sample_rate": 16000, "mel_bins": 128, "frame_shift_ms": 10.0,
    "window_ms": 25.0, "mean": -8.5, "std": 4.25, "data": "the test tones", "command": "flexast x",
}  # fmt: skip


def pack_rows(layout, length, segments=0):
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


def write_tones(root, clips=8):
    """Sound files of two classes, low and high tones of 0.4 s and more; returns the folder."""
    rng = np.random.default_rng(0)
    for number in range(clips):
        times = np.arange(6000 + 500 * number) / 16000
        tone = 0.3 * np.sin(2 * np.pi * (300, 2000)[number % 2] * times)
        path = root / ("low", "high")[number % 2] / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, tone + rng.normal(0, 0.01, len(times)), 16000)
    return root


def randomize(model, seed=0, scale=0.3):
    """Give every weight a random value, so that none is neutral; returns the model."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.normal(size=w.shape) * scale for w in model.get_weights()])
    return model


# === Classifiers of a few kilobytes, as artifacts: softmax of a product with the waveform ===


def weights(seed):
    return np.random.default_rng(seed).normal(size=(SAMPLES, len(CLASSES))).astype("float32")


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def tiny_tflite(path, seeds, labels=CLASSES, card=None):
    """A `.tflite` with a signature for each {name: seed}; labels and card in a ZIP tail."""
    import tensorflow as tf

    module, signatures = tf.Module(), {}
    spec = tf.TensorSpec([1, SAMPLES], tf.float32, name="waveform")
    for name, seed in seeds.items():
        signatures[name] = _scores(seed, spec)
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=list(seeds))
        pathlib.Path(path).write_bytes(converter.convert())
    with zipfile.ZipFile(path, "a") as archive:
        if labels:
            archive.writestr("labels.txt", "".join(f"{name}\n" for name in labels))
        archive.writestr("artifact.json", json.dumps(card or {}))
    return path


def _scores(seed, spec):
    import tensorflow as tf

    matrix = tf.constant(weights(seed))

    def scores(waveform):
        return {"scores": tf.nn.softmax(waveform @ matrix)}

    return tf.function(scores, [spec]).get_concrete_function()


def tiny_saved_model(path, seed):
    """A SavedModel of clips of any length up to SAMPLES, with `length` and `error`."""
    import tensorflow as tf

    matrix = tf.constant(weights(seed))

    def scores(waveform, length):
        mask = tf.sequence_mask(length, SAMPLES, tf.float32)
        missing = tf.maximum(0, SAMPLES - tf.shape(waveform)[1])
        waveform = tf.pad(waveform, [[0, 0], [0, missing]])[:, :SAMPLES]
        good = length <= SAMPLES
        given = tf.where(good[:, None], tf.nn.softmax((waveform * mask) @ matrix), 0.0)
        return {"scores": given, "error": tf.where(good, "", f"more than {SAMPLES} samples.")}

    function = tf.function(
        scores,
        [
            tf.TensorSpec([None, None], tf.float32, name="waveform"),
            tf.TensorSpec([None], tf.int32, name="length"),
        ],
    )
    tf.saved_model.save(
        tf.Module(), str(path), {"serving_default": function.get_concrete_function()}
    )
    (path / "assets").mkdir(exist_ok=True)
    (path / "assets" / "labels.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return path


def card_point(name, value, milliseconds, megabytes=1.0, **more):
    """An operating point made by hand."""
    return {
        "name": name, "path": f"{name}.tflite", "signature": "serving_default",
        "format": "tflite", "patch_size": "16", "precision": "float32", "metric": "accuracy",
        "value": value, "standard_error": 0.01, "clips": 600, "seconds": 1.0,
        "megabytes": megabytes, "latency_ms": {"1": milliseconds, "2": milliseconds / 2}, **more,
    }  # fmt: skip
