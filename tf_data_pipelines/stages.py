"""Waveforms to features to tokens, clip by clip; and how many tokens a length will give."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_data_pipelines.augment import drawn_length
from tf_data_pipelines.draws import GROUP, PATCH, POOL, SHIFT, choice, uniform
from tf_data_pipelines.dropout import drop_tokens, kept_counts
from tf_data_pipelines.fbank import (
    features,
    frame_shift_step,
    frames_every,
    log_mel_at,
    log_mel_every,
    normalize,
)
from tf_data_pipelines.patches import check_patches, patch_tokens, token_counts
from tf_data_pipelines.resize import band_count
from tf_data_pipelines.settings import (
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
)


def extract_features(
    clips: tf.data.Dataset,
    fbank: FbankSettings,
    *,
    frame_shifts_ms: Sequence[float] = (),
    frame_shift_range_ms: Sequence[float] = (),
    seed: int = 0,
) -> tf.data.Dataset:
    """Replace `waveform` by `features`, the normalized log-mel filterbank.

    Args:
        clips: Dataset of dictionaries with `waveform` float32 (samples,).
        fbank: FbankSettings.
        frame_shifts_ms: frame shifts in milliseconds from which each clip draws one. An
            empty tuple uses the filterbank's own frame shift.
        frame_shift_range_ms: (lowest, highest) frame shift in milliseconds, from which each clip
            draws one; instead of a list.
        seed: random seed of the draws.

    Returns:
        Dataset of dictionaries with `features` float32 (frames, mel_bins) and
        `frame_shift_scale` float32 (), the clip's frame shift over the filterbank's own.
    """

    def extract(clip):
        waveform = clip.pop("waveform")
        if frame_shift_range_ms:
            shift = _drawn_shift(clip, fbank, frame_shift_range_ms, seed)
            mel = normalize(log_mel_every(waveform, fbank, shift), fbank)
            scale = tf.cast(shift, tf.float32) / fbank.shift
        elif frame_shifts_ms:
            drawn = choice(len(frame_shifts_ms), clip, seed, SHIFT)
            mel = normalize(log_mel_at(waveform, fbank, drawn, frame_shifts_ms), fbank)
            shift = tf.gather(tf.constant(frame_shifts_ms, tf.float32), drawn)
            scale = shift / fbank.frame_shift_ms
        else:
            mel, scale = features(waveform, fbank), tf.constant(1.0)
        mel = tf.ensure_shape(mel, [None, fbank.mel_bins])
        return {**clip, "features": mel, "frame_shift_scale": scale}

    return clips.map(extract, tf.data.AUTOTUNE)


def _drawn_shift(clip, fbank, range_ms, seed):
    """Frame shift that a clip draws from a range, in samples, int32 ()."""
    step = frame_shift_step(fbank)
    lowest, highest = (ms * fbank.sample_rate / 1000 / step for ms in range_ms)
    lowest = max(1, math.ceil(lowest - 1e-6))  # row lengths count on it: never below the range
    choices = max(0, math.floor(highest + 1e-6) - lowest) + 1
    return step * (lowest + choice(choices, clip, seed, SHIFT))


def make_tokens(
    clips: tf.data.Dataset,
    patches: PatchSettings,
    *,
    seed: int = 0,
    packing: PackSettings | None = None,
    augment: AugmentSettings | None = None,
) -> tf.data.Dataset:
    """Replace `features` and `frame_shift_scale` by `tokens` and `positions`.

    Args:
        clips: Dataset of dictionaries with `features` float32 (frames, mel_bins), mel_bins
            static, and `frame_shift_scale` float32 (); in training also `epoch` and `place`,
            see `training_order`, which end here.
        patches: PatchSettings; each clip draws one of its patch sizes.
        seed: random seed of the draws.
        packing: PackSettings of the rows to come. A clip draws only from the patch sizes at
            which it fits a row; where there are none it draws from all of them, and with
            overlong="crop" it loses its last patches. None lets clips have any length.
        augment: AugmentSettings; this stage uses those that leave tokens out, after a clip was
            found to fit. None leaves none out.

    Returns:
        Dataset of dictionaries with `tokens` float32 (tokens, 256) and `positions` float32
        (tokens, 4), see `patch_tokens`.
    """
    mel_bins = clips.element_spec["features"].shape[1]
    check_patches(patches, mel_bins)  # inside it, TensorFlow wraps it
    bands = band_counts(patches, mel_bins)

    def tokenize(clip):
        factor = _drawn_factor(clip, patches, seed)
        features = _pooled(clip.pop("features"), factor, patches)
        frames = tf.shape(features)[0]
        drawn = _drawn_size(clip, frames, mel_bins, patches, packing=packing, seed=seed)
        tokens, positions = patch_tokens(
            features,
            patches,
            choice=drawn,
            frame_shift_scale=clip.pop("frame_shift_scale") * tf.cast(factor, tf.float32),
            max_tokens=_max_tokens(packing),
        )
        if augment is not None and augment.drops_tokens:
            tokens, positions = drop_tokens(
                tokens, positions, clip, bands=tf.gather(bands, drawn),
                prefix_tokens=patches.prefix_tokens, settings=augment, seed=seed,
            )  # fmt: skip
        kept = {name: clip[name] for name in clip if name not in ("epoch", "place")}
        return {**kept, "tokens": tokens, "positions": positions}

    return clips.map(tokenize, tf.data.AUTOTUNE)


def band_counts(patches, mel_bins):
    """Number of patches along the frequency axis at each patch size, int32 (patch sizes,)."""
    counts = [band_count(mel_bins, size, patches) for size in patches.patch_sizes]
    return np.array(counts, "int32")


def _drawn_factor(clip, patches, seed):
    """Number of frames that a clip pools to one, int32 ()."""
    factors = patches.pool_frames
    return tf.gather(factors, choice(len(factors), clip, seed, POOL))


def _pooled(features, factor, patches):
    """float32 (frames, mel_bins) -> (frames // factor, mel_bins)."""
    if patches.pool_frames == (1,):
        return features
    count = tf.shape(features)[0] // factor
    windows = tf.reshape(features[: count * factor], [count, factor, features.shape[1]])
    reduce = tf.reduce_max if patches.pooling == "max" else tf.reduce_mean
    return reduce(windows, 1)


def _drawn_size(clip, frames, mel_bins, patches, *, packing, seed):
    """Index of the patch size that a clip of so many frames draws, int32 ()."""
    sizes = np.arange(len(patches.patch_sizes))
    fits = tf.ones(len(sizes), tf.bool)
    if packing is not None and len(sizes) > 1:
        fits = token_counts(frames, mel_bins, patches) <= packing.row_length
        fits |= ~tf.reduce_any(fits)
    if patches.patch_weights:
        own = _weighted(fits, clip, patches, seed=seed, stream=PATCH)
    else:
        fitting = tf.boolean_mask(sizes, fits)
        own = tf.gather(fitting, choice(tf.size(fitting), clip, seed, PATCH))
    if patches.clips_per_draw == 1 or "place" not in clip:
        return own
    group = {"clip_id": clip["place"] // patches.clips_per_draw}
    shared = _weighted(tf.ones_like(fits), group, patches, seed=seed, stream=GROUP)
    return tf.where(tf.gather(fits, shared), tf.cast(shared, own.dtype), own)


def _weighted(fits, clip, patches, *, seed, stream):
    """Index of one of the patch sizes that fit, drawn by their weights, int64 ()."""
    shares = tf.where(fits, tf.constant(patches.patch_shares), 0)
    ends = tf.cumsum(shares)
    (draw,) = uniform(1, clip, seed, stream)
    # Below the sum, so below the last end of a size that fits.
    drawn = tf.cast(draw, tf.float64) * ends[-1]
    return tf.searchsorted(ends, [drawn], side="right", out_type=tf.int64)[0]


def _max_tokens(packing):
    """Number of tokens to which clips are cut; None where none is cut."""
    return packing.row_length if packing and packing.overlong == "crop" else None


def drawn_tokens(clip, samples, fbank, *, patches, packing, augment, seed, longest):
    """Number of tokens of a training clip, from its length alone, int32 ().

    Args:
        clip: dictionary with `clip_id`, `epoch` and `place`.
        samples: length of the clip, int32 ().
        fbank, patches, packing, augment, seed: as in `training_batches`.
        longest: number of samples that silence fills a clip up to at most.
    """
    how = {"patches": patches, "augment": augment, "seed": seed}
    frames = drawn_frames(clip, samples, fbank, longest=longest, **how)
    frames //= _drawn_factor(clip, patches, seed)
    drawn = _drawn_size(clip, frames, fbank.mel_bins, patches, packing=packing, seed=seed)
    tokens = token_counts(frames, fbank.mel_bins, patches, _max_tokens(packing))[drawn]
    if not augment.drops_tokens:
        return tokens
    bands = tf.gather(band_counts(patches, fbank.mel_bins), drawn)
    *_, kept = kept_counts(bands, (tokens - patches.prefix_tokens) // bands, augment)
    return kept + patches.prefix_tokens


def drawn_frames(clip, samples, fbank, *, patches, augment, seed, longest):
    """Number of frames of the features of a training clip, from its length alone, int32 ().

    Args:
        clip, samples, fbank, patches, augment, seed, longest: as in `drawn_tokens`.
    """
    samples = drawn_length(
        clip, samples, augment, seed=seed, sample_rate=fbank.sample_rate, longest=longest
    )
    if augment.frame_shift_range_ms:
        shift = _drawn_shift(clip, fbank, augment.frame_shift_range_ms, seed)
        frames = frames_every(fbank, shift, samples)
    else:
        fbanks = [fbank.with_frame_shift(ms) for ms in patches.frame_shifts_ms] or [fbank]
        frames = tf.stack(
            [one.clip_frames or 1 + (samples - one.window) // one.shift for one in fbanks]
        )
        frames = frames[choice(len(fbanks), clip, seed, SHIFT)]
    return tf.maximum(0, frames)
