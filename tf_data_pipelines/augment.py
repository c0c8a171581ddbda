"""Random changes of the training clips, as stages from Dataset to Dataset.

Each stage draws from its seed, the clip and the epoch, so a run repeats exactly and every epoch
differs. A stage that is off returns the dataset that it was given.
"""

import tensorflow as tf

from tf_data_pipelines.draws import (
    CROP,
    FILL,
    GAIN,
    LEVEL,
    MASKS,
    MIXED,
    MIXTURE,
    NOISE,
    ROLL,
    STRETCH,
    key,
    uniform,
)
from tf_data_pipelines.settings import AugmentSettings, FbankSettings


def augment_waveforms(
    clips: tf.data.Dataset,
    settings: AugmentSettings,
    seed: int,
    *,
    sample_rate: int = 16000,
    longest: int | None = None,
) -> tf.data.Dataset:
    """Change each waveform: crop, mixup, roll, gain, silence around it, noise over all of it.

    Args:
        clips: Dataset of dictionaries with `waveform` float32 (samples,), `clip_id` and perhaps
            `epoch`, both int64 (); for mixup also `label` float32 (classes,) and the clip to mix
            it with, `partner_waveform` float32 (samples,) and `partner_label` float32 (classes,).
            Other columns pass.
        settings: AugmentSettings; this stage uses those that act on waveforms.
        seed: random seed of all draws.
        sample_rate: sample rate of the waveforms in Hz.
        longest: number of samples that silence fills a clip up to at most; None for any.

    Returns:
        Dataset of the same dictionaries, without the partners.
    """
    if not settings.changes_waveforms:
        return clips

    def augment(clip):
        waveform = clip["waveform"]
        if settings.crop_ms:
            most = _samples(settings.crop_ms, sample_rate)
            (place,) = uniform(1, clip, seed, CROP)
            waveform = _stretch(waveform, tf.minimum(tf.size(waveform), most), place)
        if settings.mixup:
            waveform, clip = _mixed({**clip, "waveform": waveform}, settings, seed)
        if settings.roll:
            waveform = _rolled(waveform, clip, settings, seed)
        if settings.gain_db:
            (draw,) = uniform(1, clip, seed, GAIN)
            waveform *= _ratio(settings.gain_db * (2 * draw - 1))
        power = tf.reduce_mean(waveform**2)
        if settings.fill_ms:
            silence = drawn_silence(
                clip,
                tf.size(waveform),
                settings,
                seed=seed,
                sample_rate=sample_rate,
                longest=longest,
            )
            waveform = tf.pad(waveform, [silence])
        if settings.noise_snr_db:
            used, level = uniform(2, clip, seed, LEVEL)
            lowest, highest = settings.noise_snr_db
            scale = tf.sqrt(power) * _ratio(-(lowest + (highest - lowest) * level))
            noise = tf.random.stateless_normal(tf.shape(waveform), key(clip, seed, NOISE))
            waveform += tf.where(used < 0.5, scale, 0.0) * noise
        return {**clip, "waveform": waveform}

    return clips.map(augment, tf.data.AUTOTUNE)


def _ratio(decibels):
    return 10 ** (decibels / 20)


def _samples(milliseconds, sample_rate):
    return round(milliseconds * sample_rate / 1000)


def _stretch(waveform, size, place):
    """`size` samples of a waveform, which has as many; place in [0, 1) says where."""
    gaps = tf.size(waveform) - size + 1
    # A float32 times a length of over 2**24 may be rounded up to that length.
    first = tf.minimum(tf.cast(place * tf.cast(gaps, tf.float32), tf.int32), gaps - 1)
    return waveform[first : first + size]


def _rolled(waveform, clip, settings, seed):
    """A waveform that begins elsewhere and goes on from its end at its beginning."""
    (draw,) = uniform(1, clip, seed, ROLL)
    samples = tf.cast(tf.size(waveform), tf.float32)
    shift = tf.cast((2 * draw - 1) * settings.roll * samples, tf.int32)
    return tf.concat([waveform[shift:], waveform[:shift]], 0)


def drawn_share(clip, settings, seed):
    """Share of a clip in its mixture with another, float32 (); 1 where it is not mixed.

    Args:
        clip: dictionary with `clip_id` and perhaps `epoch`.
        settings: AugmentSettings; this uses mixup and mixup_alpha.
        seed: random seed.
    """
    (used,) = uniform(1, clip, seed, MIXED)
    one, other = tf.unstack(
        tf.random.stateless_gamma([2], key(clip, seed, MIXTURE), settings.mixup_alpha)
    )
    # Both can be 0 where alpha is small.
    share = tf.math.divide_no_nan(one, one + other)
    return tf.where(used < settings.mixup, share, 1.0)


def _mixed(clip, settings, seed):
    """The waveform of a clip and its partner, and the clip without it, with both labels.

    As in AST the means are removed before and after, and the clip keeps its length: a shorter
    partner is followed by zeros, and of a longer one a stretch is heard (AST takes its beginning).
    """
    waveform, label = clip["waveform"], clip["label"]
    partner, partner_label = clip.pop("partner_waveform"), clip.pop("partner_label")
    share = drawn_share(clip, settings, seed)

    def mix():
        (place,) = uniform(1, clip, seed, STRETCH)
        size = tf.size(waveform)
        other = _centered(partner)
        other = _stretch(other, tf.minimum(size, tf.size(other)), place)
        other = tf.pad(other, [[0, size - tf.size(other)]])
        return _centered(share * _centered(waveform) + (1 - share) * other)

    mixture = tf.cond(share < 1, mix, lambda: waveform)
    return mixture, {**clip, "label": share * label + (1 - share) * partner_label}


def _centered(waveform):
    return waveform - tf.reduce_mean(waveform)


def drawn_silence(clip, samples, settings, *, seed, sample_rate=16000, longest=None):
    """Zeros before and after a clip, int32 (2,), none for every other clip.

    Args:
        clip: dictionary with `clip_id` and perhaps `epoch`.
        samples: length of the clip, int32 ().
        settings: AugmentSettings; this uses fill_ms.
        seed, sample_rate, longest: as in `augment_waveforms`.
    """
    most = _samples(settings.fill_ms, sample_rate)
    if longest is not None:
        most = tf.clip_by_value(longest - samples, 0, most)
    used, share, before = uniform(3, clip, seed, FILL)
    share = tf.where(used < 0.5, share, 0.0)
    total = tf.cast(share * tf.cast(most + 1, tf.float32), tf.int32)
    first = tf.cast(before * tf.cast(total + 1, tf.float32), tf.int32)
    return tf.stack([first, total - first])


def drawn_length(clip, samples, settings, *, seed, sample_rate=16000, longest=None):
    """Number of samples that `augment_waveforms` makes of a clip, int32 ().

    A new augmentation that changes lengths changes both.

    Args:
        clip, samples, settings, seed, sample_rate, longest: as in `drawn_silence`.
    """
    if settings.crop_ms:
        samples = tf.minimum(samples, _samples(settings.crop_ms, sample_rate))
    if not settings.fill_ms:
        return samples
    silence = drawn_silence(
        clip, samples, settings, seed=seed, sample_rate=sample_rate, longest=longest
    )
    return samples + tf.reduce_sum(silence)


def augment_features(
    clips: tf.data.Dataset, settings: AugmentSettings, fbank: FbankSettings, seed: int
) -> tf.data.Dataset:
    """Set one band of mel bins and one stretch of time of each spectrogram to 0, the mean.

    The width of each mask is uniform from 0 to its largest width, and never more than half of
    the spectrogram; then its place is uniform.

    Args:
        clips: Dataset of dictionaries with `features` float32 (frames, mel_bins), normalized,
            `frame_shift_scale` float32 (), `clip_id` and perhaps `epoch`, both int64 (); other
            columns pass.
        settings: AugmentSettings; this stage uses freq_mask, time_mask_ms and time_mask_share.
        fbank: FbankSettings, for the frame shift.
        seed: random seed of the widths and places.

    Returns:
        Dataset of the same dictionaries.

    Source: SpecAugment, Park et al. 2019, without time warping.
    """
    if not settings.changes_features:
        return clips

    def mask(clip):
        features = clip["features"]
        frames = tf.shape(features)[0]
        width_f, place_f, width_t, place_t = uniform(4, clip, seed, MASKS)
        most_t = _longest_mask(frames, clip["frame_shift_scale"], settings, fbank)
        in_time = _band(frames, most_t, width_t, place_t)
        in_freq = _band(features.shape[1], settings.freq_mask, width_f, place_f)
        hidden = in_time[:, None] | in_freq
        return {**clip, "features": tf.where(hidden, 0.0, features)}

    return clips.map(mask, tf.data.AUTOTUNE)


def _longest_mask(frames, frame_shift_scale, settings, fbank):
    """Largest number of frames in a time mask, float32 ()."""
    by_time = settings.time_mask_ms / (fbank.frame_shift_ms * frame_shift_scale)
    if not settings.time_mask_share:
        return by_time
    by_share = settings.time_mask_share * tf.cast(frames, tf.float32)
    return tf.minimum(by_time, by_share) if settings.time_mask_ms else by_share


def _band(size, most, width, place):
    """bool (size,), True in a band of up to `most` places; width and place are in [0, 1)."""
    most = tf.minimum(tf.cast(most, tf.int32), size // 2)
    width = tf.cast(width * tf.cast(most + 1, tf.float32), tf.int32)
    start = tf.cast(place * tf.cast(size - width + 1, tf.float32), tf.int32)
    index = tf.range(size)
    return (index >= start) & (index < start + width)
