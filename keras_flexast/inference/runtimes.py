"""The runtimes of exported artifacts: TensorFlow, LiteRT and onnxruntime, all called alike.

An opener takes the path of an artifact and a number of threads. It gives {name: Signature} and the
texts inside the artifact, {file name: text}, or raises a ValueError where the artifact is damaged.
"""

import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LABELS, DESCRIPTION = "labels.txt", "artifact.json"  # texts that an artifact holds


class Signature(NamedTuple):
    """A signature from waveforms to scores, or to embeddings where its name is "embed".

    Args:
        samples: number of samples of every clip; None where clips have any length.
        width: number of scores, or width of the embeddings.
        run: function from padded waveforms float32 (batch, samples) and lengths int32
            (batch,) to outputs float32 (batch, width) and a list of error texts, one per clip.
    """

    samples: int | None
    width: int
    run: Callable


def open_saved_model(path, threads):
    """Opener of a SavedModel folder; TensorFlow takes all cores, whatever `threads` says."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signatures = {}
    for name, serve in loaded.signatures.items():
        output = "embedding" if name == "embed" else "scores"
        given = serve.structured_input_signature[1]
        if "waveform" in given and output in serve.structured_outputs:
            width = serve.structured_outputs[output].shape[-1]
            run = _saved_model_run(loaded, serve, output)
            signatures[name] = Signature(given["waveform"].shape[1], width, run)
    files = [path / "assets" / name for name in (LABELS, DESCRIPTION)]
    return signatures, {
        file.name: file.read_text(encoding="utf-8") for file in files if file.exists()
    }


def _saved_model_run(loaded, serve, output):
    import tensorflow as tf

    given = serve.structured_input_signature[1]

    def run(batch, lengths, loaded=loaded):  # the signature does not keep its model alive
        inputs = {"waveform": tf.constant(batch)}
        if "length" in given:
            inputs["length"] = tf.constant(lengths)
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

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from None
    signatures = {
        name: _tflite_signature(interpreter.get_signature_runner(name))
        for name, sides in interpreter.get_signature_list().items()
        if sides["inputs"] == ["waveform"] and "scores" in sides["outputs"]
    }
    texts = {}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in {LABELS, DESCRIPTION} & set(archive.namelist()):
                texts[name] = archive.read(name).decode()
    return signatures, texts


def _tflite_signature(runner):
    def run(batch, lengths):
        rows = [runner(waveform=waveform[None])["scores"][0] for waveform in batch]
        return np.stack(rows), [""] * len(batch)

    samples = runner.get_input_details()["waveform"]["shape"][-1]
    return Signature(int(samples), int(runner.get_output_details()["scores"]["shape"][-1]), run)


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
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # the errors of onnxruntime have no base class of their own
        raise ValueError(f"{path} cannot be loaded: {error}") from None
    inputs = {one.name: one.shape for one in session.get_inputs()}
    outputs = {one.name: one.shape for one in session.get_outputs()}
    texts = session.get_modelmeta().custom_metadata_map
    if list(inputs) != ["waveform"] or "scores" not in outputs:
        return {}, texts

    def run(batch, lengths):
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
