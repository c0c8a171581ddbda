"""A run for phones and other runtimes: quantized TFLite of one or several patch sizes, and ONNX.

The front end and the transformer are converted apart and joined in the file. So a quantized
file hears with the float front end: power and logarithm span more than 8 bits tell apart.
"""

import hashlib
import pathlib
import tempfile
import warnings

import keras
import numpy as np

from keras_flexast.export.tflite_metadata import (
    attach_metadata,
    pack_model,
    set_entry,
    unpack_model,
)
from keras_flexast.files import atomic_write, refuse_overwrite
from keras_flexast.inference.scoring import artifact_card, front_end, scoring_model
from tf_data_pipelines.settings import check_choice, check_positive, patch_name, patch_pair

PRECISIONS = ("float32", "float16", "dynamic", "int8")
INPUTS = ("waveform", "features")
ONNX_OPSET = 17  # the first with DFT
# In int8 only dense layers are: the others gain little on a CPU, and lose accuracy.
KEPT_FLOAT = [
    "ADD", "BATCH_MATMUL", "CONCATENATION", "GELU", "MEAN", "MUL", "NEG", "PAD", "PADV2",
    "RESHAPE", "RSQRT", "SLICE", "SOFTMAX", "SQUARED_DIFFERENCE", "STRIDED_SLICE", "SUB", "SUM",
    "TRANSPOSE",
]  # fmt: skip


def write_tflite(
    run, path, patch_size, precision="float32", seconds=None, frame_shift_ms=None,
    input="waveform", calibration=None, overwrite=False,
):  # fmt: skip
    """Write a run at one patch size as a `.tflite` of built-in operations, one clip at a time.

    Args:
        run: Run.
        path: of the file. It carries TFLite Metadata, labels and a card: `read_metadata`.
        patch_size: int or (frequency, time).
        precision: "float32"; "float16", weights of half the size; "dynamic", 8-bit weights;
            "int8", 8-bit weights and inputs of every dense layer, by scales measured on
            `calibration`. Normalization, softmax, attention and front end stay float. On a
            CPU "dynamic" is as small and as fast, and nearer to float32.
        seconds: length of every clip; None for the longest training clip, or what a
            converted checkpoint cuts its clips to.
        frame_shift_ms: milliseconds; None for that of training.
        input: "waveform", float32 (1, samples) at the run's sample rate; or "features", the
            normalized log-mel (1, frames, mel bins). The output is `scores`, float32 (1,
            classes).
        calibration: waveforms float32 (clips, samples) of that length, or an iterable of
            them; used by int8 only. A hundred training clips will do.
        overwrite: replace what is there.

    Returns:
        pathlib.Path of the file.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
        ValueError: unknown precision or input, a patch larger than the clip's spectrogram, or
            int8 without usable calibration.
        FileExistsError: `path` exists.
    """
    return _write(
        run, path, {"serving_default": patch_size}, precision, seconds, frame_shift_ms, input,
        calibration, overwrite,
    )  # fmt: skip


def write_multi_tflite(
    run, path, patch_sizes, precision="float32", seconds=None, frame_shift_ms=None,
    input="waveform", calibration=None, overwrite=False,
):  # fmt: skip
    """Write a run at several patch sizes as one `.tflite`, which holds equal weights once.

    Args:
        patch_sizes: ints or (frequency, time) pairs. Each is a signature, `patch_16` or
            `patch_16x24`: `interpreter.get_signature_runner("patch_16")(waveform=...)`. An
            interpreter that knows no signatures runs the first; MediaPipe's AudioClassifier
            takes files of one signature only.
        run, path, precision, seconds, frame_shift_ms, input, calibration, overwrite: as
            `write_tflite`.

    Returns:
        pathlib.Path of the file.

    Raises:
        as `write_tflite`.
    """
    sizes = {f"patch_{patch_name(patch_pair(size))}": size for size in patch_sizes}
    return _write(
        run, path, sizes, precision, seconds, frame_shift_ms, input, calibration, overwrite
    )


def write_onnx(
    run, path, patch_size, seconds=None, frame_shift_ms=None, input="waveform", overwrite=False
):
    """Write a run at one patch size as ONNX, opset 17, float32; needs the extra `onnx`.

    Args:
        run, path, patch_size, seconds, frame_shift_ms, overwrite: as `write_tflite`.
        input: "waveform", float32 (clips, samples); or "features", (clips, frames, mel bins).
            The output is `scores`, float32 (clips, classes).

    Returns:
        pathlib.Path of the file; NAME.labels.txt lies beside it.

    Raises:
        ImportError: tf2onnx is not installed. Else as `write_tflite`.
    """
    check_choice("input", input, INPUTS)
    try:
        import tf2onnx
    except ImportError as error:
        raise ImportError('ONNX needs tf2onnx: pip install "keras-flexast[onnx]".') from error
    import tensorflow as tf

    path = pathlib.Path(path)
    refuse_overwrite(path, overwrite)
    run, seconds = _at_length(run, seconds)
    scoring, samples = scoring_model(run, patch_size, seconds, frame_shift_ms)
    if input == "waveform":
        function, shape = scoring.__call__, (samples,)
    else:
        function, shape = _from_features(scoring), scoring.model.input_shape[1:]
    signature = [tf.TensorSpec([None, *shape], tf.float32, name=input)]
    model, _ = tf2onnx.convert.from_function(
        tf.function(function, input_signature=signature),
        input_signature=signature,
        opset=ONNX_OPSET,
        custom_op_handlers={
            "RFFT": (_onnx_rfft, []),
            "Real": (_onnx_part, []),
            "Imag": (_onnx_part, []),
            "Erfc": (_onnx_erfc, []),
        },
    )
    atomic_write(path, model.SerializeToString())
    atomic_write(path.with_suffix(".labels.txt"), "".join(f"{name}\n" for name in run.classes))
    return path


def _write(
    run, path, patch_sizes, precision, seconds, frame_shift_ms, input, calibration, overwrite
):
    """patch_sizes {signature: size}."""
    check_choice("precision", precision, PRECISIONS)
    check_choice("input", input, INPUTS)
    if not patch_sizes:
        raise ValueError("patch_sizes is empty; give at least one size, such as [16].")
    path = pathlib.Path(path)
    refuse_overwrite(path, overwrite)
    run, seconds = _at_length(run, seconds)
    fbank, _ = front_end(run, frame_shift_ms)
    scorings = {
        name: scoring_model(run, size, seconds, frame_shift_ms)
        for name, size in patch_sizes.items()
    }
    samples = round(seconds * fbank.sample_rate)
    features = None
    if precision == "int8":
        features = _calibration_features(calibration, samples, fbank)
    front = [_front_tflite(samples, fbank)] if input == "waveform" else []
    model = _join(
        {
            name: [*front, _scoring_tflite(scoring, precision, features)]
            for name, (scoring, _) in scorings.items()
        },
        input,
    )
    pairs = {name: patch_pair(size) for name, size in patch_sizes.items()}
    card = {**artifact_card(run, fbank, pairs, precision, input), "samples": samples}
    sizes = ", ".join(patch_name(pair) for pair in pairs.values())
    content = attach_metadata(
        model, run.classes, fbank.sample_rate, card, input,
        description=f"Audio spectrogram transformer, patch {sizes}, clips of {seconds:g} s.",
    )  # fmt: skip
    atomic_write(path, content)
    return path


def _at_length(run, seconds):
    """The run that hears clips of so many seconds, and these."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"Export needs the TensorFlow backend, and Keras runs on {keras.backend.backend()}. "
            f"Save the run and use `flexast export`, which starts a TensorFlow process."
        )
    if seconds is None:
        return run, run.clip_seconds
    check_positive("seconds", seconds)
    return run.full_length(), seconds


def _calibration_features(calibration, samples, fbank):
    """Normalized log-mel float32 (1, frames, mel bins) of each waveform."""
    from tf_data_pipelines.fbank import log_mel, normalize

    clips = [] if calibration is None else [np.asarray(clip, "float32") for clip in calibration]
    if not clips:
        raise ValueError(
            f"calibration={calibration!r}: precision='int8' measures its scales on sound. Give "
            f"about a hundred training clips, float32 (clips, {samples}); or choose "
            f"precision='dynamic', which needs none."
        )
    for index, clip in enumerate(clips):
        if clip.shape != (samples,):
            raise ValueError(
                f"calibration[{index}] has the shape {clip.shape}; expected ({samples},), as "
                f"long as the model's clips. Cut it, or fill it up with zeros."
            )
        if not np.isfinite(clip).all():
            raise ValueError(
                f"calibration[{index}] holds {clip[~np.isfinite(clip)][0]}; expected finite "
                f"samples in [-1, 1]. Leave the clip out."
            )
    return [normalize(log_mel(clip[None], fbank), fbank).numpy() for clip in clips]


def _front_tflite(samples, fbank):
    """TFLite bytes from a waveform to its normalized log-mel."""
    import tensorflow as tf

    from tf_data_pipelines.fbank import log_mel, normalize

    waveform = tf.TensorSpec([1, samples], tf.float32)
    function = tf.function(
        lambda waveform: normalize(log_mel(waveform, fbank), fbank), input_signature=[waveform]
    )
    return tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()], tf.Module()
    ).convert()


def _from_features(scoring):
    return lambda features: {"scores": scoring.activation(scoring.model(features))}


def _scoring_tflite(scoring, precision, features):
    """TFLite bytes from normalized log-mel to scores."""
    import tensorflow as tf

    shape = [1, *scoring.model.input_shape[1:]]
    # By way of ExportArchive: the converter freezes the variables only where it tracks them,
    # and otherwise writes a file that answers nan.
    archive = keras.export.ExportArchive()
    archive.track(scoring.model)
    archive.add_endpoint(
        "serving_default",
        _from_features(scoring),
        input_signature=[tf.TensorSpec(shape, tf.float32, name="features")],
    )
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if precision != "int8":
            return converter.convert()
        return _int8_tflite(converter, features)


def _int8_tflite(converter, features):
    import tensorflow as tf

    def representative():
        for clip in features:
            yield [clip]

    converter.representative_dataset = representative
    options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=KEPT_FLOAT)
    with warnings.catch_warnings():  # of an interpreter that the debugger starts, unused here
        warnings.simplefilter("ignore")
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=representative, debug_options=options
        )
    return debugger.get_nondebug_quantized_model()


def _join(chains, input):
    """One model of several: each signature's parts end to end, equal constants held once.

    Args:
        chains: {signature: [TFLite bytes, ...]}, each of one subgraph with one input and one
            output, which is the next one's input.
        input: name of the signatures' input; the output is `scores`.

    Returns:
        TFLite bytes with a subgraph and a signature for each chain.
    """
    from tensorflow.lite.python import schema_py_generated as schema

    joined = schema.ModelT()
    joined.version, joined.description = 3, "keras_flexast"
    joined.subgraphs, joined.signatureDefs = [], []
    joined.buffers = [schema.BufferT()]  # the first is that of tensors without constants
    joined.operatorCodes, buffers, codes, runtimes = [], {}, {}, []

    def place(buffer):
        if buffer.data is None or not len(buffer.data):
            return 0
        content = hashlib.sha256(buffer.data).digest()
        if content not in buffers:
            buffers[content] = len(joined.buffers)
            joined.buffers.append(buffer)
        return buffers[content]

    def code_of(code):
        key = (code.builtinCode, code.customCode, code.version)
        if key not in codes:
            codes[key] = len(joined.operatorCodes)
            joined.operatorCodes.append(code)
        return codes[key]

    def signature_tensor(name, tensor):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        return entry

    for name, parts in chains.items():
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = name, [], []
        graph.outputs = []
        for part in map(unpack_model, parts):
            (piece,) = part.subgraphs
            # -1 is an input left out.
            moved = {-1: -1, **dict(zip(piece.inputs, graph.outputs, strict=False))}
            for index, tensor in enumerate(piece.tensors):
                if index not in moved:
                    moved[index] = len(graph.tensors)
                    tensor.buffer = place(part.buffers[tensor.buffer])
                    graph.tensors.append(tensor)
            for operator in piece.operators:
                operator.opcodeIndex = code_of(part.operatorCodes[operator.opcodeIndex])
                operator.inputs = [moved[index] for index in operator.inputs]
                operator.outputs = [moved[index] for index in operator.outputs]
                graph.operators.append(operator)
            if not graph.outputs:
                graph.inputs = [moved[index] for index in piece.inputs]
            graph.outputs = [moved[index] for index in piece.outputs]
            for entry in part.metadata:
                if entry.name == b"min_runtime_version":
                    runtimes.append(bytes(part.buffers[entry.buffer].data))
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = name, len(joined.subgraphs)
        signature.inputs = [signature_tensor(input, graph.inputs[0])]
        signature.outputs = [signature_tensor("scores", graph.outputs[0])]
        graph.tensors[graph.inputs[0]].name = input
        graph.tensors[graph.outputs[0]].name = "scores"
        joined.subgraphs.append(graph)
        joined.signatureDefs.append(signature)
    newest = max(
        runtimes, key=lambda text: [int(number) for number in text.rstrip(b"\0").split(b".")]
    )
    set_entry(joined, "min_runtime_version", newest)
    return pack_model(joined)


# === What tf2onnx does not know, as handlers (context, node, name, arguments) ===


def _onnx_rfft(context, node, name, arguments):
    """RFFT as DFT: complex numbers as pairs of real ones, in an axis behind the last."""
    from onnx import TensorProto

    rank = len(context.get_shape(node.input[0]))
    column = context.make_const(f"{name}_column", np.array([-1], "int64")).output[0]
    pairs = context.make_node("Unsqueeze", [node.input[0], column]).output[0]
    (output,) = node.output
    shape = [*context.get_shape(output), 2]
    context.remove_node(name)
    context.make_node(
        "DFT", [pairs], {"axis": rank - 1, "onesided": 1}, outputs=[output], name=name,
        shapes=[shape], dtypes=[TensorProto.FLOAT],
    )  # fmt: skip


def _onnx_part(context, node, name, arguments):
    """Real or Imag: one of the pair."""
    which = np.array({"Real": 0, "Imag": 1}[node.type], "int64")
    part = context.make_const(f"{name}_part", which).output[0]
    context.replace_inputs(node, [node.input[0], part])
    node.type = "Gather"
    node.set_attr("axis", -1)


def _onnx_erfc(context, node, name, arguments):
    """1 + erf(-x)."""
    (output,) = node.output
    kind, shape = context.get_dtype(output), context.get_shape(output)
    one = context.make_const(f"{name}_one", np.array(1, "float32")).output[0]
    negative = context.make_node("Neg", list(node.input)).output[0]
    erf = context.make_node("Erf", [negative]).output[0]
    context.remove_node(name)
    context.make_node("Add", [erf, one], outputs=[output], name=name, shapes=[shape], dtypes=[kind])
