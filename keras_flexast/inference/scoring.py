"""Outputs of a model in memory: packed batches of any clips, and equally long waveforms."""

import threading

import keras
import numpy as np
from rich.markup import escape
from rich.progress import Progress

from keras_flexast.distribution import batch_devices
from keras_flexast.models import fixed_model
from tf_data_pipelines.settings import patch_name, patch_pair


class PackedPredictor:
    """The outputs of a model on packed batches; the model itself stays as it is.

    Each row length is predicted by a Keras model of its own over the same layers. So every row
    length is traced with its own static shape and gets its fastest attention, and neither the
    model's traces nor its `compile` are touched.

    Args:
        model: keras.Model on packed batches with one output vector per segment slot.
    """

    def __init__(self, model):
        self.model = model
        self.width = model.output_shape[-1]
        self._by_length = {}

    def __call__(self, inputs):
        """Packed inputs (NumPy or tensors) to NumPy float (rows, segments, width)."""
        inputs = {name: np.asarray(value) for name, value in inputs.items()}
        length = inputs["segment_ids"].shape[1]
        if length not in self._by_length:
            self._by_length[length] = keras.Model(self.model.input, self.model.output)
        return predict_rows(self._by_length[length], inputs)


class ClipPredictor:
    """Outputs of clips in memory, of any lengths, at one patch size.

    Each shape of the rows has one dataset, traced once, so that later clips are served at once.

    Args:
        fbank: FbankSettings.
        patches: PatchSettings of one patch size.
        packing: PackSettings; rows get longer where a clip needs it.
    """

    def __init__(self, fbank, patches, packing):
        self.fbank = fbank
        self.patches = patches
        self.packing = packing
        self._lock, self._waveforms, self._batches = threading.Lock(), (), {}

    def __call__(self, predictor, waveforms):
        """float32 (clips, width) from a PackedPredictor and a list of float32 (samples,)."""
        from tf_data_pipelines.lengths import packing_for
        from tf_data_pipelines.pipeline import prediction_batches
        from tf_data_pipelines.sources import WaveformSource

        data = WaveformSource(waveforms, self.fbank.sample_rate)
        packing = packing_for(data, self.fbank, self.patches, self.packing)
        with self._lock:
            self._waveforms = data.waveforms
            if packing not in self._batches:
                self._batches[packing] = prediction_batches(
                    lambda: self._waveforms, self.fbank, patches=self.patches, packing=packing
                )
            return packed_outputs(predictor, self._batches[packing], len(data.waveforms))[0]


def predict_rows(model, inputs):
    """`model.predict_on_batch` on one device or several: NumPy (rows, ...) in, NumPy out.

    Where devices share a batch on JAX, it is filled up with empty rows to a multiple of them.
    Every device of a tf.distribute strategy predicts the whole batch.

    Args:
        model: keras.Model with one output.
        inputs: array, or dictionary of arrays, with the same number of rows.
    """
    rows = len(keras.tree.flatten(inputs)[0])
    missing = -rows % batch_devices()
    if missing:
        inputs = keras.tree.map_structure(
            lambda value: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)), inputs
        )
    return keras.ops.convert_to_numpy(model.predict_on_batch(inputs))[:rows]


def packed_outputs(predictor, batches, clips, description=None):
    """The output of every clip of a data set, in the order of its source.

    Args:
        predictor: PackedPredictor.
        batches: batches of `tf_data_pipelines.evaluation_batches`.
        clips: number of clips.
        description: text beside a progress bar; None shows no bar.

    Returns:
        outputs float32 (clips, width), and a dictionary: `rows` that held a clip, `tokens`
        in them, and `fill`, the share of their places that held a token.

    Raises:
        ValueError: a clip came back never or twice, or the model gives NaN.
    """
    outputs, seen = np.zeros((clips, predictor.width), "float32"), np.zeros(clips, "int64")
    rows = tokens = places = 0
    with Progress(disable=description is None) as progress:
        task = progress.add_task(escape(description or ""), total=clips)
        for inputs, *_, clip_ids in batches:
            output, clip_ids = predictor(inputs), np.asarray(clip_ids)
            real = clip_ids >= 0
            output = output[:, : real.shape[1]]  # rows may be packed with fewer slots
            ids = clip_ids[real]
            outputs[ids] = output[real]
            np.add.at(seen, ids, 1)
            used = np.asarray(inputs["segment_ids"]) > 0
            rows += int(used.any(1).sum())
            tokens += int(used.sum())
            places += int(used.any(1).sum()) * used.shape[1]
            progress.advance(task, len(ids))
    if not (seen == 1).all():
        raise ValueError(
            f"{(seen != 1).sum()} of {clips} clips came back not exactly once; the batches do "
            f"not belong to this source."
        )
    check_finite(outputs)
    return outputs, {"rows": rows, "tokens": tokens, "fill": tokens / places}


def check_finite(outputs):
    """Raise a ValueError where a model's outputs, float (clips, width), are not finite."""
    lost = ~np.isfinite(outputs).all(1)
    if lost.any():
        raise ValueError(
            f"the model gives NaN or infinity for {lost.sum()} of {len(lost)} clips: its training "
            f"diverged. Train again with a lower learning rate."
        )


def fixed_scores(run, patch_size, waveforms, frame_shift_ms=None):
    """Scores of equally long clips by the fixed face, on whatever backend Keras runs.

    Args:
        run: Run.
        patch_size: int or (frequency, time).
        waveforms: float32 (clips, samples).
        frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.

    Returns:
        float32 (clips, classes).
    """
    return fixed_scorer(run, patch_size, waveforms.shape[1], frame_shift_ms)(waveforms)


def fixed_scorer(run, patch_size, samples, frame_shift_ms=None):
    """`fixed_scores` as a function of waveforms float32 (clips, samples), to call often.

    Clips shorter than one patch are filled up with zeros to one, as in packed rows.
    """
    from tf_data_pipelines.fbank import features

    fbank, scale = run.front_end(frame_shift_ms)
    frames = max(int(fbank.frames(samples)), patch_pair(patch_size)[1])
    model = _fixed(run, patch_size, frames, scale)
    # TensorFlow's own graph is ready at once; XLA takes seconds to compile for a CPU.
    model.compile(jit_compile=keras.backend.backend() != "tensorflow")

    def score(waveforms):
        log_mel = features(waveforms, fbank).numpy()
        missing = frames - log_mel.shape[1]
        logits = predict_rows(model, np.pad(log_mel, [(0, 0), (0, missing), (0, 0)]))
        check_finite(logits)
        return run.scores(logits)

    return score


def scoring_model(run, patch_size, *, seconds, frame_shift_ms=None):
    """TensorFlow function from waveforms to scores, and the samples it takes.

    Args:
        run: Run.
        patch_size: int or (frequency, time).
        seconds: length of the clips.
        frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.

    Returns:
        (tf.Module with `__call__(waveform float32 (batch, samples))`, its `model` from
        normalized log-mel to logits, and its `activation`; samples).

    Raises:
        ValueError: the patch is larger than the clip's spectrogram.
    """
    import tensorflow as tf

    from tf_data_pipelines.fbank import features

    fbank, scale = run.front_end(frame_shift_ms)
    samples = round(seconds * fbank.sample_rate)
    frames = check_patch_fits(fbank, patch_size, seconds)

    class Scoring(tf.Module):
        def __init__(self):
            super().__init__()
            self.model = _fixed(run, patch_size, frames, scale)
            self.activation = tf.nn.sigmoid if run.multi_label else tf.nn.softmax

        def __call__(self, waveform):
            return {"scores": self.activation(self.model(features(waveform, fbank)))}

    return Scoring(), samples


def check_patch_fits(fbank, patch_size, seconds):
    """Number of frames of clips of one length.

    Raises:
        ValueError: the patch is larger than the clips' spectrogram.
    """
    frames = int(fbank.frames(round(seconds * fbank.sample_rate)))
    patch_f, patch_t = patch_pair(patch_size)
    if frames < patch_t or fbank.mel_bins < patch_f:
        raise ValueError(
            f"patch_size={patch_name((patch_f, patch_t))} is larger than the spectrogram of "
            f"{seconds} s: {fbank.mel_bins} mel bins, {frames} frames. Choose a smaller patch, "
            f"or more --seconds."
        )
    return frames


def _fixed(run, patch_size, frames, frame_shift_scale):
    return fixed_model(
        run.model,
        patch_size,
        frames,
        remainder=run.patches.remainder,
        position=run.patches.position,
        resize=run.patches.resize,
        frame_shift_scale=frame_shift_scale,
    )
