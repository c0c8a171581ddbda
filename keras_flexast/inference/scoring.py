"""Waveforms of one length to scores: the front end, the fixed face and the activation."""

import dataclasses

import keras

from keras_flexast.models import fixed_model
from tf_data_pipelines.settings import patch_name, patch_pair


def scoring_model(run, patch_size, seconds, frame_shift_ms=None):
    """TensorFlow function from waveforms to scores, and the samples it takes.

    Returns:
        (tf.Module with `__call__(waveform float32 (batch, samples))`, its `model` from
        normalized log-mel to logits, and its `activation`; samples).

    Raises:
        ValueError: the patch is larger than the clip's spectrogram.
    """
    import tensorflow as tf

    from tf_data_pipelines.fbank import log_mel, normalize

    fbank, scale = front_end(run, frame_shift_ms)
    samples = round(seconds * fbank.sample_rate)
    frames = int(fbank.frames(samples))
    patch_f, patch_t = patch_pair(patch_size)
    if frames < patch_t or fbank.mel_bins < patch_f:
        raise ValueError(
            f"patch_size={patch_name((patch_f, patch_t))} is larger than the spectrogram of "
            f"{seconds} s: {fbank.mel_bins} mel bins, {frames} frames. Choose a smaller patch, "
            f"or more --seconds."
        )

    class Scoring(tf.Module):
        def __init__(self):
            super().__init__()
            self.model = _fixed(run, patch_size, frames, scale)
            self.activation = tf.nn.sigmoid if run.multi_label else tf.nn.softmax

        def __call__(self, waveform):
            features = normalize(log_mel(waveform, fbank), fbank)
            return {"scores": self.activation(self.model(features))}

    return Scoring(), samples


def fixed_scores(run, patch_size, waveforms, frame_shift_ms=None):
    """Scores of equally long clips by the fixed face, on whatever backend Keras runs.

    Args:
        run: Run.
        patch_size: int or (frequency, time).
        waveforms: float32 (clips, samples).
        frame_shift_ms: milliseconds; None for that of training.

    Returns:
        float32 (clips, classes).
    """
    return fixed_scorer(run, patch_size, waveforms.shape[1], frame_shift_ms)(waveforms)


def fixed_scorer(run, patch_size, samples, frame_shift_ms=None):
    """`fixed_scores` as a function of waveforms float32 (clips, samples), to call often."""
    from tf_data_pipelines.fbank import log_mel, normalize

    fbank, scale = front_end(run, frame_shift_ms)
    model = _fixed(run, patch_size, int(fbank.frames(samples)), scale)
    # TensorFlow's own graph is ready at once; XLA takes seconds to compile for a CPU.
    model.compile(jit_compile=keras.backend.backend() != "tensorflow")

    def scores(waveforms):
        features = normalize(log_mel(waveforms, fbank), fbank).numpy()
        return run.scores(model.predict_on_batch(features))

    return scores


def front_end(run, frame_shift_ms=None):
    """(FbankSettings at a frame shift, that shift over the run's own)."""
    if frame_shift_ms is None:
        return run.fbank, 1.0
    fbank = dataclasses.replace(run.fbank, frame_shift_ms=frame_shift_ms)
    return fbank, frame_shift_ms / run.fbank.frame_shift_ms


def artifact_card(run, fbank, patch_sizes, precision="float32", input="waveform"):
    """What an artifact says of itself, as JSON: how it hears, and its signatures.

    Args:
        run: Run.
        fbank: FbankSettings at the artifact's frame shift.
        patch_sizes: {signature: (frequency, time)}.
        precision, input: as `write_tflite`.
    """
    from keras_flexast import __version__

    return {
        "input": input,
        "precision": precision,
        "patch_sizes": patch_sizes,
        "multi_label": run.multi_label,
        "fbank": fbank.to_dict(),
        "keras_flexast": __version__,
    }


def _fixed(run, patch_size, frames, frame_shift_scale):
    policies = run.patches.remainder, run.patches.position, run.patches.resize
    return fixed_model(run.model, patch_size, frames, *policies, frame_shift_scale)
