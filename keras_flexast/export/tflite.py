"""A run for phones: quantized `.tflite` files of one or several patch sizes.

Each patch size has two signatures over one set of weights: one hears the whole waveform, the other
is told how many of its samples count. The front end and the transformer are converted apart and
joined in the file. So a quantized file keeps a float front end: power and logarithm span a wider
range than 8 bits can hold.
"""

import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Callable

import keras
import numpy as np

from keras_flexast.export.common import (
    FixedOptions,
    at_length,
    check_backend,
    scores_of_features,
)
from keras_flexast.export.tflite_join import join_parts
from keras_flexast.export.tflite_metadata import attach_metadata
from keras_flexast.files import refuse_overwrite
from keras_flexast.inference.artifacts import describe_artifact
from keras_flexast.inference.padded import PaddedScoring
from keras_flexast.inference.runtimes import length_signature
from keras_flexast.inference.scoring import scoring_model
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.settings import patch_name, patch_pair

# int8 quantizes dense layers only: other operations gain little on a CPU and lose accuracy.
KEPT_FLOAT = [
    "ADD", "BATCH_MATMUL", "CONCATENATION", "GELU", "MEAN", "MUL", "NEG", "PAD", "PADV2",
    "RESHAPE", "RSQRT", "SLICE", "SOFTMAX", "SQUARED_DIFFERENCE", "STRIDED_SLICE", "SUB", "SUM",
    "TRANSPOSE",
]  # fmt: skip


def write_tflite(run, path, *, patch_size, options=None, overwrite=False):
    """Write a run at one patch size as a `.tflite` of built-in operations, one clip at a time.

    Its signatures, each with the output `scores` float32 (1, classes):

        serving_default   waveform float32 (1, samples), all of which is heard; or, with
                          options.input="features", features float32 (1, frames, mel_bins)
        with_length       waveform, and length int32 (1,), the number of samples that count:
                          the run's scores of these samples alone, whatever follows them.
                          Files of features, or with options.with_length=False, do not have it.

    An interpreter that does not know signatures runs the first one. The file carries TFLite
    Metadata, see `read_metadata`, and at its end a ZIP of `labels.txt` and `artifact.json`.

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

    Each patch size has the signatures of `write_tflite` under names of its own, `patch_16` and
    `patch_16_with_length`, or `patch_16x24`:
    `interpreter.get_signature_runner("patch_16_with_length")(waveform=..., length=...)`.

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
    fbank, _ = run.front_end(options.frame_shift_ms)
    samples = round(seconds * fbank.sample_rate)
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
        join_parts(_chains(run, sizes, options, seconds=seconds)),
        run.classes,
        artifact=description,
        sample_rate=fbank.sample_rate,
        input=options.input,
        description=f"Audio spectrogram transformer, patch {named}, clips of {seconds:g} s.",
    )
    atomic_write(path, content)
    return path


def _chains(run, sizes, options, *, seconds):
    """{signature: (input names, parts)} of the patch sizes, as `join_parts` takes it."""
    shift = options.frame_shift_ms
    scorings = {
        name: scoring_model(run, size, seconds=seconds, frame_shift_ms=shift)
        for name, size in sizes.items()
    }
    maker = _ChainMaker(run, options, samples=next(iter(scorings.values()))[1])
    whole = {
        name: _Stage(scores_of_features(scoring), scoring.model)
        for name, (scoring, _) in scorings.items()
    }
    chains = {name: maker.whole(stage) for name, stage in whole.items()}
    if options.with_length and options.input == "waveform":
        for name, size in sizes.items():
            chains[length_signature(name)] = maker.padded(size, whole[name])
    return chains


class _ChainMaker:
    """Chains of `join_parts` for one run; a part that several of them share is converted once."""

    def __init__(self, run, options, *, samples):
        self.run, self.options, self.samples = run, options, samples
        self.fbank, _ = run.front_end(options.frame_shift_ms)
        int8 = options.precision == "int8"
        self.clips = _checked_calibration(options.calibration, samples) if int8 else []
        self.hear, self.hear_clip = _Stage(self._hear), _Stage(self._hear_clip)
        self.converted = {}  # {stage: TFLite bytes}

    def whole(self, scores):
        """The chain that hears a whole waveform, of the stage from features to scores."""
        stages = [self.hear, scores]
        examples = [{"waveform": clip[None]} for clip in self.clips]
        start = {"waveform": np.zeros((1, self.samples), "float32")}
        if self.options.input == "features":
            stages, start = stages[1:], self._hear(**start)
            examples = [self._hear(**example) for example in examples]
        return list(start), self._parts(stages, start, examples)

    def padded(self, patch_size, scores):
        """The chain that is told how many samples count, of that size and that of `whole`."""
        stages = [self.hear_clip, scores]
        if self.fbank.clip_ms is None:  # otherwise every clip is brought to as many frames
            padded = PaddedScoring(self.run, patch_size, self.options.frame_shift_ms)
            table = padded.model.backbone.position_embed
            stages[1:] = [_Stage(padded.cut, table), _Stage(padded.score, padded.model)]
        examples = [
            {"waveform": clip[None], "length": np.array([length], "int32")}
            for clip in self.clips
            for length in {_length(clip), len(clip)}  # silence in its end may count, too
        ]
        start = {
            "waveform": np.zeros((1, self.samples), "float32"),
            "length": np.array([self.samples], "int32"),
        }
        return list(start), self._parts(stages, start, examples)

    def _hear(self, waveform):
        from tf_data_pipelines.fbank import features

        return {"features": features(waveform, self.fbank)}

    def _hear_clip(self, waveform, length):
        from tf_data_pipelines.fbank import padded_features

        features, frames = padded_features(waveform, length, self.fbank)
        if self.fbank.clip_ms is not None:
            return {"features": features}
        return {"features": features, "frames": frames}

    def _parts(self, stages, start, examples):
        """TFLite bytes of stages, each of which takes what the one before gives.

        Args:
            stages: list of _Stage. The last one, the transformer, has the precision; the
                others are float32.
            start: {name: array} that the first stage takes, for the shapes.
            examples: list of more of them, on which int8 measures its scales.
        """
        for stage in stages:
            last = stage is stages[-1]
            if stage not in self.converted:
                precision = self.options.precision if last else "float32"
                self.converted[stage] = _convert(stage, start, precision, examples)
            if not last:
                start = stage.function(**start)
                examples = [stage.function(**example) for example in examples]
        return [self.converted[stage] for stage in stages]


def _length(clip):
    """Samples of a clip up to its last one that is not zero."""
    heard = np.flatnonzero(clip)
    return int(heard[-1]) + 1 if len(heard) else len(clip)


def _checked_calibration(calibration, samples):
    """The waveforms of `FixedOptions.calibration` as a list of float32 (samples,)."""
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
    return clips


@dataclasses.dataclass(frozen=True, eq=False)
class _Stage:
    """What becomes one part of a file.

    Args:
        function: function from tensors by name, the batch first, to {name: tensor}.
        layer: keras.Layer (or Model) whose weights it uses; None for none.
    """

    function: Callable
    layer: keras.Layer | None = None


def _convert(stage, start, precision, examples):
    """TFLite bytes of a stage that takes such tensors, {name: array}."""
    import tensorflow as tf

    # The converter freezes only variables that an ExportArchive tracks; without one it writes a
    # file that answers nan.
    archive = keras.export.ExportArchive()
    if stage.layer is not None:
        archive.track(stage.layer)
    specs = [tf.TensorSpec(one.shape, one.dtype, name) for name, one in start.items()]
    archive.add_endpoint("serving_default", stage.function, input_signature=specs)
    with tempfile.TemporaryDirectory() as folder:
        archive.write_out(folder, verbose=False)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if precision != "int8":
            return converter.convert()
        return _int8_tflite(converter, examples)


def _int8_tflite(converter, examples):
    import tensorflow as tf

    def representative():
        for example in examples:
            yield {name: np.asarray(one) for name, one in example.items()}

    converter.representative_dataset = representative
    options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=KEPT_FLOAT)
    with warnings.catch_warnings():  # the debugger warns of an interpreter that is not used here
        warnings.simplefilter("ignore")
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=representative, debug_options=options
        )
    return debugger.get_nondebug_quantized_model()
