"""The runtimes of exported artifacts: TensorFlow, LiteRT and onnxruntime, all called alike.

An opener takes the path of an artifact and a number of threads. It gives {name: Signature} and the
texts inside the artifact, {file name: text}, or raises a ValueError where the artifact is damaged.
"""

import contextlib
import threading
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LABELS, DESCRIPTION = "labels.txt", "artifact.json"  # texts that an artifact holds


def length_signature(name):
    """Name of the signature that also takes `length`, beside the one of this name."""
    return "with_length" if name == "serving_default" else f"{name}_with_length"


class Signature(NamedTuple):
    """A signature from waveforms to scores, or to embeddings where its name begins with "embed".

    Args:
        samples: number of samples of every clip; None where clips have any length.
        width: number of scores, or width of the embeddings.
        run: function from padded waveforms float32 (batch, samples) and lengths int32
            (batch,) to outputs float32 (batch, width) and a list of error texts, one per clip.
        takes_length: whether the lengths count; otherwise the filling is heard.
    """

    samples: int | None
    width: int
    run: Callable
    takes_length: bool = False


def open_saved_model(path, threads):
    """Opener of a SavedModel folder; TensorFlow takes all cores, whatever `threads` says."""
    import tensorflow as tf

    with _named(path, "loaded"):
        with contextlib.suppress(FileNotFoundError):  # older ones have no fingerprint
            tf.saved_model.experimental.read_fingerprint(str(path))  # or it is only logged
        loaded = tf.saved_model.load(str(path))
    signatures = {}
    for name, serve in loaded.signatures.items():
        output = "embedding" if name.startswith("embed") else "scores"
        given = serve.structured_input_signature[1]
        if "waveform" in given and output in serve.structured_outputs:
            width = serve.structured_outputs[output].shape[-1]
            run = _saved_model_run(path, loaded, serve, output)
            samples = given["waveform"].shape[1]
            signatures[name] = Signature(samples, width, run, "length" in given)
    files = [path / "assets" / name for name in (LABELS, DESCRIPTION)]
    return signatures, {
        file.name: file.read_text(encoding="utf-8") for file in files if file.exists()
    }


@contextlib.contextmanager
def _named(path, verb):
    """Errors of a runtime, which have no base class of their own, as a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} cannot be {verb}: {reason}. Copy or export it again.") from error


def _saved_model_run(path, loaded, serve, output):
    import tensorflow as tf

    given = serve.structured_input_signature[1]

    def run(batch, lengths, loaded=loaded):  # the signature does not keep its model alive
        inputs = {"waveform": tf.constant(batch)}
        if "length" in given:
            inputs["length"] = tf.constant(lengths)
        with _named(path, "run"):
            outputs = serve(**inputs)
        errors = outputs["error"].numpy() if "error" in outputs else [b""] * len(batch)
        return outputs[output].numpy(), [error.decode() for error in errors]

    return run


def open_tflite(path, threads):
    """Opener of a `.tflite`: LiteRT, or TensorFlow's interpreter where LiteRT is missing."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter  # noqa: N806, a class

    with _named(path, "loaded"):
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
    listed, signatures, lock = interpreter.get_signature_list(), {}, threading.Lock()
    for name, sides in listed.items():
        if sides["inputs"] == ["waveform"] and "scores" in sides["outputs"]:
            # The clip alone counts where the file can be told its length.
            told = length_signature(name)
            with _named(path, "loaded"):
                runner = interpreter.get_signature_runner(told if told in listed else name)
            signatures[name] = _tflite_signature(path, runner, lock)
    texts = {}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in {LABELS, DESCRIPTION} & set(archive.namelist()):
                texts[name] = archive.read(name).decode()
    return signatures, texts


def _tflite_signature(path, runner, lock):
    """A Signature; the lock is that of the interpreter, whose tensors all its runners share."""
    inputs = runner.get_input_details()

    def run(batch, lengths):
        rows = []
        for waveform, length in zip(batch, lengths, strict=True):
            given = {"waveform": waveform[None], "length": np.array([length], "int32")}
            with lock, _named(path, "run"):
                rows.append(runner(**{name: given[name] for name in inputs})["scores"][0])
        return np.stack(rows), [""] * len(batch)

    samples, outputs = inputs["waveform"]["shape"][-1], runner.get_output_details()
    return Signature(int(samples), int(outputs["scores"]["shape"][-1]), run, "length" in inputs)


def open_onnx(path, threads):
    """Opener of an `.onnx`; it raises ImportError where onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            f"{path} needs onnxruntime. Install it with `pip install onnxruntime`."
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with _named(path, "loaded"):
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    inputs = {one.name: one.shape for one in session.get_inputs()}
    outputs = {one.name: one.shape for one in session.get_outputs()}
    texts = session.get_modelmeta().custom_metadata_map
    if list(inputs) != ["waveform"] or "scores" not in outputs:
        return {}, texts

    def run(batch, lengths):
        with _named(path, "run"):
            rows = [session.run(["scores"], {"waveform": waveform[None]})[0] for waveform in batch]
        return np.concatenate(rows), [""] * len(batch)

    signature = Signature(inputs["waveform"][1], outputs["scores"][-1], run)
    return {"serving_default": signature}, texts


def model_folder(folder):
    """A SavedModel folder: this one, or its highest version; None if there is none."""
    if (folder / "saved_model.pb").exists():
        return folder
    versions = [
        child
        for child in folder.iterdir()
        if child.name.isdecimal() and (child / "saved_model.pb").exists()
    ]
    return max(versions, key=lambda child: int(child.name), default=None)


OPENERS = {"saved_model": open_saved_model, ".tflite": open_tflite, ".onnx": open_onnx}
