"""A run at one patch size as ONNX: the front end and the transformer in one float32 graph."""

import pathlib

import numpy as np

from keras_flexast.export.common import (
    FixedOptions,
    at_length,
    check_backend,
    scores_of_features,
)
from keras_flexast.files import refuse_overwrite
from keras_flexast.inference.artifacts import LABELS, artifact_texts, describe_artifact
from keras_flexast.inference.scoring import scoring_model
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.settings import patch_pair

OPSET = 17  # the first with DFT


def write_onnx(run, path, *, patch_size, options=None, overwrite=False):
    """Write a run at one patch size as ONNX, opset 17. It needs the extra `onnx`.

    The file has one input, "waveform" float32 (clips, samples) or "features" float32 (clips,
    frames, mel_bins), and one output, "scores" float32 (clips, classes). Its metadata_props
    hold `labels.txt` and `artifact.json`; NAME.labels.txt lies beside it, too.

    Args:
        run: Run.
        path: path of the file.
        patch_size: int or (frequency, time).
        options: FixedOptions of precision "float32"; None for the defaults.
        overwrite: whether to replace an existing file.

    Returns:
        pathlib.Path of the file.

    Raises:
        ImportError: tf2onnx is not installed.
        RuntimeError: Keras runs on another backend than TensorFlow.
        ValueError: the precision is not "float32", or the patch is larger than the clip's
            spectrogram.
        FileExistsError: the file exists.
    """
    options = options or FixedOptions()
    if options.precision != "float32":
        raise ValueError(f"precision={options.precision!r}: an .onnx is float32. Leave it out.")
    try:
        import tf2onnx
    except ImportError as error:
        raise ImportError('ONNX needs tf2onnx: pip install "keras-flexast[onnx]".') from error
    import tensorflow as tf
    from onnx import helper

    check_backend()
    path = pathlib.Path(path)
    refuse_overwrite(path, overwrite)
    run, seconds = at_length(run, options.seconds)
    shift = options.frame_shift_ms
    scoring, samples = scoring_model(run, patch_size, seconds=seconds, frame_shift_ms=shift)
    if options.input == "waveform":
        function, shape = scoring.__call__, (samples,)
    else:
        function, shape = scores_of_features(scoring), scoring.model.input_shape[1:]
    signature = [tf.TensorSpec([None, *shape], tf.float32, name=options.input)]
    model, _ = tf2onnx.convert.from_function(
        tf.function(function, input_signature=signature),
        input_signature=signature,
        opset=OPSET,
        custom_op_handlers={name: (handler, []) for name, handler in HANDLERS.items()},
    )
    fbank, _ = run.front_end(shift)
    description = describe_artifact(
        run,
        fbank,
        patch_sizes={"serving_default": patch_pair(patch_size)},
        input=options.input,
        samples=samples,
    )
    texts = artifact_texts(run.classes, description)
    helper.set_model_props(model, texts)
    atomic_write(path, model.SerializeToString())
    atomic_write(path.with_suffix(f".{LABELS}"), texts[LABELS])
    return path


# === Handlers of operations that tf2onnx does not know: (context, node, name, arguments) ===


def _rfft(context, node, name, arguments):
    """RFFT as DFT: a complex number becomes a pair of real ones, in a new last axis."""
    from onnx import TensorProto

    *outer, _ = context.get_shape(node.input[0])
    column = context.make_const(f"{name}_column", np.array([-1], "int64")).output[0]
    pairs = context.make_node("Unsqueeze", [node.input[0], column]).output[0]
    (output,) = node.output
    shape = [*outer, context.get_shape(output)[-1], 2]
    context.remove_node(name)
    found = context.make_node(
        "DFT",
        [pairs],
        attr={"axis": len(outer), "onesided": 1},
        shapes=[shape],
        dtypes=[TensorProto.FLOAT],
    ).output[0]
    # OpenVINO keeps the axis of single real numbers as well; a plain shape leaves no doubt.
    whole = context.make_const(f"{name}_shape", np.array([-1, *shape[1:]], "int64")).output[0]
    context.make_node(
        "Reshape",
        [found, whole],
        outputs=[output],
        name=name,
        shapes=[shape],
        dtypes=[TensorProto.FLOAT],
    )


def _part(context, node, name, arguments):
    """Real or Imag: one number of the pair."""
    which = np.array({"Real": 0, "Imag": 1}[node.type], "int64")
    part = context.make_const(f"{name}_part", which).output[0]
    context.replace_inputs(node, [node.input[0], part])
    node.type = "Gather"
    node.set_attr("axis", -1)


def _erfc(context, node, name, arguments):
    """Erfc(x) as 1 + Erf(-x)."""
    (output,) = node.output
    kind, shape = context.get_dtype(output), context.get_shape(output)
    one = context.make_const(f"{name}_one", np.array(1, "float32")).output[0]
    negative = context.make_node("Neg", list(node.input)).output[0]
    erf = context.make_node("Erf", [negative]).output[0]
    context.remove_node(name)
    context.make_node("Add", [erf, one], outputs=[output], name=name, shapes=[shape], dtypes=[kind])


HANDLERS = {"RFFT": _rfft, "Real": _part, "Imag": _part, "Erfc": _erfc}
