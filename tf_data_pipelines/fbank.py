"""Kaldi's log-mel filterbank in TensorFlow operations, eager or in a graph."""

import dataclasses
import functools
import math
from typing import TypeVar

import numpy as np
import tensorflow as tf

from tf_data_pipelines.banded import band_product, split_bands
from tf_data_pipelines.settings import FbankSettings

Spectrogram = TypeVar("Spectrogram", tf.Tensor, np.ndarray)

LOG_FLOOR = 1.1920928955078125e-07  # float32 epsilon, Kaldi's floor before the logarithm
FRAME_SHIFT_STEP = 8  # samples; frame shifts to the sample would cost half as much time again


def features(waveform: tf.Tensor | np.ndarray, settings: FbankSettings) -> tf.Tensor:
    """Normalized log-mel filterbank of a clip: what every model here hears.

    Args:
        waveform: float32 (samples,) or (batch, samples) in [-1, 1], at
            settings.sample_rate Hz.
        settings: FbankSettings.

    Returns:
        float32 (frames, mel_bins) or (batch, frames, mel_bins): `log_mel`, then `normalize`.
    """
    return normalize(log_mel(waveform, settings), settings)


def padded_features(waveform, length, settings):
    """`features` of clips in waveforms of one length; what follows a clip is not heard.

    Args:
        waveform: float32 (batch, samples), samples static, at settings.sample_rate Hz.
        length: int32 (batch,), number of samples that belong to the clip, from the first on;
            at most all of them.
        settings: FbankSettings.

    Returns:
        float32 (batch, frames, mel_bins), frames as for the whole waveform: first those of the
        clip alone, whose windows lie within it, then zeros; and int32 (batch,), the number of
        the clip's frames. With settings.clip_ms they are the same for every clip.
    """
    length = tf.clip_by_value(length, 0, waveform.shape[1])
    waveform = tf.where(_before(length, waveform.shape[1]), waveform, 0.0)
    if settings.remove_clip_mean:
        samples = tf.cast(tf.maximum(1, length), waveform.dtype)
        waveform -= (tf.reduce_sum(waveform, -1) / samples)[:, None]
    bare = dataclasses.replace(settings, remove_clip_mean=False, clip_ms=None)
    mel = log_mel(waveform, bare)
    frames = tf.maximum(0, 1 + (length - settings.window) // settings.shift)
    inside = (tf.range(mel.shape[1]) < frames[:, None])[..., None]
    if settings.clip_ms is None:
        return tf.where(inside, normalize(mel, settings), 0.0), frames
    mel = _fit(tf.where(inside, mel, 0.0), settings.clip_frames)
    return normalize(mel, settings), tf.zeros_like(frames) + settings.clip_frames


def _before(length, size):
    """bool (batch, size), True up to each length; without a constant of that size in the graph."""
    block = math.isqrt(size) + 1
    starts = np.arange(0, size, block)
    inside = np.arange(block) < (length[:, None] - starts)[..., None]
    return tf.reshape(inside, [-1, len(starts) * block])[:, :size]


def log_mel(waveform: tf.Tensor | np.ndarray, settings: FbankSettings) -> tf.Tensor:
    """Log-mel filterbank of a clip, as Kaldi computes it (without dither).

    Args:
        waveform: float32 (samples,) or (batch, samples) in [-1, 1], at
            settings.sample_rate Hz. With settings.remove_clip_mean its mean is removed here.
        settings: FbankSettings.

    Returns:
        float32 (frames, mel_bins) or (batch, frames, mel_bins), natural log of power,
        not normalized; frames = 1 + (samples - window) // shift, and 0 for a clip shorter
        than one window. With settings.clip_ms it is cut or filled up with zeros to
        settings.clip_frames.

    Raises:
        ValueError: waveform is not floating point, or its rank is not 1 or 2.

    Source: Kaldi feature-fbank.cc, snip_edges=true, with AST's symmetric Hann window.
    """
    block = math.gcd(settings.window, settings.shift)
    return _fit(_log_mel(waveform, settings, settings.shift, block), settings.clip_frames)


def log_mel_at(waveform, settings, choice, frame_shifts_ms):
    """`log_mel` at a frame shift drawn from a list.

    Args:
        waveform: float32 (samples,) or (batch, samples).
        settings: FbankSettings; its own frame shift is not used.
        choice: int32 scalar tensor, index of the frame shift in the list.
        frame_shifts_ms: list of frame shifts in milliseconds.
    """
    shifts = [round(settings.sample_rate * ms / 1000) for ms in frame_shifts_ms]
    block = math.gcd(settings.window, *shifts)
    mel = _log_mel(waveform, settings, tf.gather(shifts, choice), block)
    if settings.clip_ms is None:
        return mel
    frames = [max(1, round(settings.clip_ms / ms)) for ms in frame_shifts_ms]
    return _fit(mel, tf.gather(frames, choice))


def log_mel_every(waveform, settings, shift):
    """`log_mel` at any frame shift that is a multiple of `frame_shift_step`.

    Args:
        waveform: float32 (samples,) or (batch, samples).
        settings: FbankSettings; its own frame shift is not used.
        shift: int32 (), samples from one frame to the next.
    """
    mel = _log_mel(waveform, settings, shift, frame_shift_step(settings))
    return mel if settings.clip_ms is None else _fit(mel, frames_every(settings, shift))


def frame_shift_step(settings):
    """Samples from one frame shift that `log_mel_every` knows to the next."""
    return math.gcd(settings.window, FRAME_SHIFT_STEP)


def frames_every(settings, shift, samples=None):
    """Number of frames that `log_mel_every` gives, int32 ().

    Args:
        settings: FbankSettings.
        shift: int32 (), samples from one frame to the next.
        samples: int32 (), number of samples; it is needed without settings.clip_ms.
    """
    if settings.clip_ms is None:
        return tf.maximum(0, 1 + (samples - settings.window) // shift)
    whole = settings.clip_ms * settings.sample_rate / 1000
    return tf.maximum(1, tf.cast(tf.round(whole / tf.cast(shift, tf.float32)), tf.int32))


def _fit(mel, frames):
    """(..., any, mel_bins) -> (..., frames, mel_bins): cut, or filled up with zeros."""
    if frames is None:
        return mel
    missing = frames - (mel.shape[-2] or tf.shape(mel)[-2])
    missing = max(0, missing) if isinstance(missing, int) else tf.maximum(0, missing)
    padding = [[0, 0]] * (mel.shape.rank - 2) + [[0, missing], [0, 0]]
    return tf.pad(mel, padding)[..., :frames, :]


def normalize(spectrogram: Spectrogram, settings: FbankSettings) -> Spectrogram:
    """(x - mean) / (2 std), as AST does; the result has a standard deviation near 0.5."""
    return (spectrogram - settings.mean) / (2 * settings.std)


def _log_mel(waveform, settings, shift, block):
    waveform = tf.convert_to_tensor(waveform)
    if not waveform.dtype.is_floating or waveform.shape.rank not in (1, 2):
        raise ValueError(
            f"waveform has dtype {waveform.dtype.name} and shape {waveform.shape}; expected "
            f"floats in [-1, 1] of shape (samples,) or (batch, samples), one channel."
        )
    if settings.remove_clip_mean:
        waveform -= tf.reduce_mean(waveform, -1, keepdims=True)
    frames = _frame(waveform, settings.window, shift, block)
    frames -= tf.reduce_mean(frames, -1, keepdims=True)
    previous = tf.concat([frames[..., :1], frames[..., :-1]], -1)
    frames = (frames - settings.preemphasis * previous) * _hann(settings.window)
    # Padded here: tf.signal.rfft refuses no frames at all when it has to pad them itself.
    padding = [[0, 0]] * (frames.shape.rank - 1) + [[0, settings.fft_length - settings.window]]
    spectrum = tf.signal.rfft(tf.pad(frames, padding), [settings.fft_length])
    power = tf.math.real(spectrum) ** 2 + tf.math.imag(spectrum) ** 2
    mel = band_product(power, _mel_bands(settings))
    if settings.noise_floor_dbfs is not None:
        mel += _noise_floor(settings)
    return tf.math.log(tf.maximum(mel, LOG_FLOOR))


def _frame(waveform, window, shift, block):
    """(..., samples) -> (..., frames, window); `block` is a divisor of window and shift.

    It gathers whole blocks, not samples: 400 / 80 = 5 indices for each frame.
    """
    samples = waveform.shape[-1] or tf.shape(waveform)[-1]
    known = isinstance(samples, int) and isinstance(shift, int)  # static shapes for exports
    count = (max if known else tf.maximum)(0, 1 + (samples - window) // shift)
    batch = [waveform.shape[0] or tf.shape(waveform)[0]] if waveform.shape.rank == 2 else []
    if batch and known and count:
        batch = [-1]
    whole = samples // block
    blocks = tf.reshape(waveform[..., : whole * block], [*batch, whole, block])
    first = tf.range(count) * (shift // block)
    frames = tf.gather(blocks, first[:, None] + np.arange(window // block), axis=-2)
    return tf.reshape(frames, [*batch, count, window])


@functools.cache
def _hann(window):
    """Symmetric Hann window, float32 (window,)."""
    return np.hanning(window).astype("float32")


@functools.cache
def _noise_floor(settings):
    """Mean power of white noise in each band, float32 (mel_bins,)."""
    variance = 10 ** (settings.noise_floor_dbfs / 10)
    window = np.square(_hann(settings.window), dtype="float64").sum()
    angles = np.linspace(0, np.pi, settings.fft_length // 2 + 1)
    emphasis = np.abs(1 - settings.preemphasis * np.exp(-1j * angles)) ** 2
    return (variance * window * emphasis @ _triangles(settings)).astype("float32")


@functools.cache
def _mel_bands(settings):
    return split_bands(_triangles(settings), 4)  # needs a quarter of the products


@functools.cache
def _triangles(settings):
    """Kaldi's triangles, float32 (fft_length / 2 + 1, mel_bins), with corners even in mel."""

    def mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    corners = np.linspace(
        mel(settings.low_freq), mel(settings.sample_rate / 2), settings.mel_bins + 2
    )
    bins = np.arange(settings.fft_length // 2 + 1) * settings.sample_rate / settings.fft_length
    position = mel(bins)[:, None]
    left, center, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (position - left) / (center - left)
    falling = (right - position) / (right - center)
    return np.maximum(0.0, np.minimum(rising, falling)).astype("float32")


def log_mel_sums(settings):
    """A function that measures clips, for `mean_and_std`.

    Args:
        settings: FbankSettings; its mean and std are not used.

    Returns:
        function of a waveform, float32 (samples,), to float64 (3,): number, sum and sum of squares
        of its log-mel values. It is traced once, and threads may share it.
    """
    signature = [tf.TensorSpec([None], tf.float32)]
    filterbank = tf.function(lambda waveform: log_mel(waveform, settings), signature)

    def sums(waveform):
        values = filterbank(waveform).numpy().astype("float64")
        return np.array([values.size, values.sum(), np.square(values).sum()])

    return sums


def mean_and_std(sums):
    """Mean and standard deviation of all log-mel values, from the sums of each clip."""
    count, total, squares = np.sum(list(sums), 0)
    mean = total / count
    return float(mean), float(np.sqrt(max(0.0, squares / count - mean**2)))
