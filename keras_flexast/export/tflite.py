"""A run for phones: quantized `.tflite` files of one or several patch sizes.

The front end and the transformer are converted apart and joined in the file. So a quantized file
keeps a float front end: power and logarithm span a wider range than 8 bits can hold.
"""

import hashlib
import pathlib
import tempfile
import warnings

import keras
import numpy as np

from keras_flexast.export.common import (
    FixedOptions,
    at_length,
    check_backend,
    scores_of_features,
)
from keras_flexast.export.tflite_metadata import (
    attach_metadata,
    pack_model,
    set_entry,
    unpack_model,
)
from keras_flexast.files import atomic_write, refuse_overwrite
from keras_flexast.inference.artifacts import describe_artifact
from keras_flexast.inference.scoring import scoring_model
from tf_data_pipelines.settings import patch_name, patch_pair

# int8 quantizes dense layers only: other operations gain little on a CPU and lose accuracy.
KEPT_FLOAT = [
    "ADD", "BATCH_MATMUL", "CONCATENATION", "GELU", "MEAN", "MUL", "NEG", "PAD", "PADV2",
    "RESHAPE", "RSQRT", "SLICE", "SOFTMAX", "SQUARED_DIFFERENCE", "STRIDED_SLICE", "SUB", "SUM",
    "TRANSPOSE",
]  # fmt: skip


def write_tflite(run, path, *, patch_size, options=None, overwrite=False):
    """Write a run at one patch size as a `.tflite` of built-in operations, one clip at a time.

    The file has one input, "waveform" float32 (1, samples) or "features" float32 (1, frames,
    mel_bins), and one output, "scores" float32 (1, classes). It carries TFLite Metadata, see
    `read_metadata`, and at its end a ZIP of `labels.txt` and `artifact.json`.

    Args:
        run: Run.
        path: path of the file.
        patch_size: int or (frequency, time).
        options: FixedOptions; None for the defaults.
        overwrite: whether to replace an existing file.

    Returns:
        pathlib.Path of the file.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
        ValueError: the patch is larger than the clip's spectrogram, or int8 has no usable
            calibration.
        FileExistsError: the file exists.
    """
    sizes = {"serving_default": patch_size}
    return _write(run, path, sizes=sizes, options=options, overwrite=overwrite)


def write_multi_tflite(run, path, *, patch_sizes, options=None, overwrite=False):
    """Write a run at several patch sizes as one `.tflite`, which holds equal weights once.

    Each patch size is a signature, `patch_16` or `patch_16x24`:
    `interpreter.get_signature_runner("patch_16")(waveform=...)`. An interpreter that does not
    know signatures runs the first one; MediaPipe's AudioClassifier refuses several.

    Args:
        run, path, options, overwrite: as for `write_tflite`.
        patch_sizes: list of ints or (frequency, time) pairs.

    Returns:
        pathlib.Path of the file.

    Raises:
        RuntimeError, ValueError, FileExistsError: as for `write_tflite`; ValueError also where
            patch_sizes is empty.
    """
    sizes = {f"patch_{patch_name(patch_pair(size))}": size for size in patch_sizes}
    if not sizes:
        raise ValueError("patch_sizes is empty; give at least one size, such as [16].")
    return _write(run, path, sizes=sizes, options=options, overwrite=overwrite)


def _write(run, path, *, sizes, options, overwrite):
    """Write a `.tflite` with the signatures of `sizes`, {signature: patch size}."""
    check_backend()
    options = options or FixedOptions()
    path = pathlib.Path(path)
    refuse_overwrite(path, overwrite)
    run, seconds = at_length(run, options.seconds)
    shift = options.frame_shift_ms
    fbank, _ = run.front_end(shift)
    samples = round(seconds * fbank.sample_rate)
    scorings = {
        name: scoring_model(run, size, seconds=seconds, frame_shift_ms=shift)[0]
        for name, size in sizes.items()
    }
    features = None
    if options.precision == "int8":
        features = _calibration_features(options.calibration, samples, fbank)
    front = [_front_tflite(samples, fbank)] if options.input == "waveform" else []
    chains = {
        name: [*front, _scoring_tflite(scoring, options.precision, features)]
        for name, scoring in scorings.items()
    }
    pairs = {name: patch_pair(size) for name, size in sizes.items()}
    description = describe_artifact(
        run,
        fbank,
        patch_sizes=pairs,
        samples=samples,
        input=options.input,
        precision=options.precision,
    )
    named = ", ".join(patch_name(pair) for pair in pairs.values())
    content = attach_metadata(
        _join(chains, options.input),
        run.classes,
        artifact=description,
        sample_rate=fbank.sample_rate,
        input=options.input,
        description=f"Audio spectrogram transformer, patch {named}, clips of {seconds:g} s.",
    )
    atomic_write(path, content)
    return path


def _calibration_features(calibration, samples, fbank):
    """Normalized log-mel float32 (1, frames, mel bins) of each waveform."""
    from tf_data_pipelines.fbank import features

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
    return [features(clip[None], fbank).numpy() for clip in clips]


def _front_tflite(samples, fbank):
    """TFLite bytes from a waveform to its normalized log-mel."""
    import tensorflow as tf

    from tf_data_pipelines.fbank import features

    waveform = tf.TensorSpec([1, samples], tf.float32)
    function = tf.function(lambda waveform: features(waveform, fbank), input_signature=[waveform])
    return tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()], tf.Module()
    ).convert()


def _scoring_tflite(scoring, precision, features):
    """TFLite bytes from normalized log-mel to scores; int8 measures its scales on `features`."""
    import tensorflow as tf

    shape = [1, *scoring.model.input_shape[1:]]
    # The converter freezes only variables that an ExportArchive tracks; without one it writes a
    # file that answers nan.
    archive = keras.export.ExportArchive()
    archive.track(scoring.model)
    archive.add_endpoint(
        "serving_default",
        scores_of_features(scoring),
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
    with warnings.catch_warnings():  # the debugger warns of an interpreter that is not used here
        warnings.simplefilter("ignore")
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=representative, debug_options=options
        )
    return debugger.get_nondebug_quantized_model()


def _join(chains, input):
    """One model of several: the parts of each signature in a row, equal constants held once.

    Args:
        chains: {signature: [TFLite bytes, ...]}. Every part has one subgraph with one input
            and one output, which is the input of the next part.
        input: name of the input of all signatures; the output is `scores`.

    Returns:
        TFLite bytes with a subgraph and a signature for each chain.
    """
    joined = _JoinedModel()
    for name, parts in chains.items():
        joined.add_chain(name, [unpack_model(part) for part in parts], input)
    return pack_model(joined.finished())


class _JoinedModel:
    """A TFLite model that grows by subgraphs and holds equal constants once."""

    def __init__(self):
        from tensorflow.lite.python import schema_py_generated as schema

        self.schema = schema
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, "keras_flexast"
        self.model.subgraphs, self.model.signatureDefs = [], []
        self.model.buffers = [schema.BufferT()]  # of tensors without constants
        self.model.operatorCodes = []
        self.buffers, self.codes = {}, {}  # places in model.buffers and model.operatorCodes
        self.runtimes = []  # oldest runtime of each part, as b"1.5.0"

    def add_chain(self, name, parts, input):
        """Add a subgraph and a signature of ModelT parts, each of which feeds the next one."""
        graph = self.schema.SubGraphT()
        graph.name, graph.tensors, graph.operators, graph.outputs = name, [], [], []
        for part in parts:
            self._append(graph, part)
        graph.tensors[graph.inputs[0]].name = input
        graph.tensors[graph.outputs[0]].name = "scores"
        signature = self.schema.SignatureDefT()
        signature.signatureKey = name
        signature.subgraphIndex = len(self.model.subgraphs)
        signature.inputs = [self._entry(input, graph.inputs[0])]
        signature.outputs = [self._entry("scores", graph.outputs[0])]
        self.model.subgraphs.append(graph)
        self.model.signatureDefs.append(signature)

    def finished(self):
        """ModelT, with the newest of the runtimes that its parts need."""
        newest = max(
            self.runtimes,
            key=lambda text: [int(number) for number in text.rstrip(b"\0").split(b".")],
        )
        set_entry(self.model, "min_runtime_version", newest)
        return self.model

    def _append(self, graph, part):
        """Append the only subgraph of a part to a graph, whose outputs become its inputs."""
        (piece,) = part.subgraphs
        # -1 stands for an input that is left out.
        moved = {-1: -1, **dict(zip(piece.inputs, graph.outputs, strict=False))}
        for index, tensor in enumerate(piece.tensors):
            if index not in moved:
                moved[index] = len(graph.tensors)
                tensor.buffer = self._place_of(part.buffers[tensor.buffer])
                graph.tensors.append(tensor)
        for operator in piece.operators:
            operator.opcodeIndex = self._code_of(part.operatorCodes[operator.opcodeIndex])
            operator.inputs = [moved[index] for index in operator.inputs]
            operator.outputs = [moved[index] for index in operator.outputs]
            graph.operators.append(operator)
        if not graph.outputs:
            graph.inputs = [moved[index] for index in piece.inputs]
        graph.outputs = [moved[index] for index in piece.outputs]
        for entry in part.metadata:
            if entry.name == b"min_runtime_version":
                self.runtimes.append(bytes(part.buffers[entry.buffer].data))

    def _place_of(self, buffer):
        """Index of a buffer in the model, where an equal one may be already."""
        if buffer.data is None or not len(buffer.data):
            return 0
        content = hashlib.sha256(buffer.data).digest()
        if content not in self.buffers:
            self.buffers[content] = len(self.model.buffers)
            self.model.buffers.append(buffer)
        return self.buffers[content]

    def _code_of(self, code):
        """Index of an operator code in the model, where an equal one may be already."""
        key = (code.builtinCode, code.customCode, code.version)
        if key not in self.codes:
            self.codes[key] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(code)
        return self.codes[key]

    def _entry(self, name, tensor):
        """TensorMapT from a name in a signature to the index of a tensor."""
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, tensor
        return entry
