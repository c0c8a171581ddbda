"""What the exports share: the backend that they need, and the options of clips of one length."""

import dataclasses
from collections.abc import Iterable

import keras

from keras_flexast.settings import INPUTS, LONGEST_CLIP, PRECISIONS
from tf_data_pipelines.settings import check_choice, check_positive


@dataclasses.dataclass(frozen=True)
class FixedOptions:
    """Options of an artifact that takes clips of one length.

    Args:
        seconds: length of every clip; None for the length of the longest training clip, or
            for the length to which a converted checkpoint brings its clips.
        frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.
        input: "waveform", samples at the run's sample rate; or "features", the normalized
            log-mel spectrogram.
        precision: "float32"; "float16", weights of half the size; "dynamic", 8-bit weights;
            "int8", 8-bit weights and 8-bit inputs of every dense layer. Normalization,
            softmax, attention and front end stay float. On a CPU "dynamic" is as small and
            as fast as "int8", and closer to float32.
        calibration: waveforms float32 (clips, samples) of this length, or an iterable of
            them, on which int8 measures its scales. A hundred training clips are enough.
            Zeros at the end of one are taken for filling.
        with_length: whether a `.tflite` also has the signature that takes the number of
            samples that count. MediaPipe takes only files without it.

    Raises:
        ValueError: seconds is not a positive number, or the input or precision is unknown.
    """

    seconds: float | None = None
    frame_shift_ms: float | None = None
    _: dataclasses.KW_ONLY
    input: str = "waveform"
    precision: str = "float32"
    calibration: Iterable | None = dataclasses.field(default=None, repr=False, compare=False)
    with_length: bool = True

    def __post_init__(self):
        check_choice("input", self.input, INPUTS)
        check_choice("precision", self.precision, PRECISIONS)
        for name, most in (("seconds", LONGEST_CLIP), ("frame_shift_ms", None)):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name), most=most)


def check_backend():
    """Raise RuntimeError unless Keras runs on TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"This export needs the TensorFlow backend, and Keras runs on "
            f"{keras.backend.backend()}. Save the run and use `export_run` or `flexast export`, "
            f"which start a TensorFlow process."
        )


def at_length(run, seconds):
    """The run that scores clips of one length, and this length.

    Args:
        run: Run.
        seconds: length of the clips; None for the run's own.

    Returns:
        (Run, seconds).
    """
    return (run, run.clip_seconds) if seconds is None else (run.full_length(), seconds)


def scores_of_features(scoring):
    """The function of a `scoring_model` from normalized log-mel to {"scores": scores}."""
    return lambda features: {"scores": scoring.activation(scoring.model(features))}
