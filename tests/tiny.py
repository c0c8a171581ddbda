"""Classifiers of a few kilobytes, as artefacts: softmax of a product with the waveform."""

import json
import pathlib
import tempfile
import zipfile

import numpy as np

SAMPLES, CLASSES = 1000, ("low", "middle", "high")


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
        archive.writestr("card.json", json.dumps(card or {}))
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
