"""Random changes of the training clips, as stages from Dataset to Dataset.

Each stage draws from its seed and from the number of clips before, so a run repeats exactly
and every epoch differs. A stage that is off returns the dataset that it was given.
"""

import tensorflow as tf

GAIN, MASKS, FILL, LEVEL, NOISE = range(1, 6)  # streams of random numbers


def augment_waveforms(clips, settings, seed, *, sample_rate=16000, longest=None):
    """Scale each waveform by a random gain, put silence around it, and noise over both.

    Args:
        clips: Dataset of dictionaries with `waveform` float32 (samples,); other columns pass.
        settings: AugmentSettings; this stage uses gain_db, fill_ms and noise_snr_db.
        seed: random seed of gains, lengths and noise.
        sample_rate: sample rate of the waveforms in Hz.
        longest: number of samples that silence fills a clip up to at most; None for any.

    Returns:
        Dataset of the same dictionaries.
    """
    if not settings.changes_waveforms:
        return clips
    room = round(settings.fill_ms * sample_rate / 1000)

    def augment(count, clip):
        waveform = clip["waveform"]
        if settings.gain_db:
            (draw,) = _draws(1, seed, count, GAIN)
            waveform *= _ratio(settings.gain_db * (2 * draw - 1))
        power = tf.reduce_mean(waveform**2)
        if settings.fill_ms:
            most = room if longest is None else tf.minimum(room, longest - tf.size(waveform))
            waveform = _fill(waveform, tf.maximum(0, most), _draws(3, seed, count, FILL))
        if settings.noise_snr_db:
            used, level = _draws(2, seed, count, LEVEL)
            lowest, highest = settings.noise_snr_db
            scale = tf.sqrt(power) * _ratio(-(lowest + (highest - lowest) * level))
            noise = tf.random.stateless_normal(tf.shape(waveform), _key(seed, count, NOISE))
            waveform += tf.where(used < 0.5, scale, 0.0) * noise
        return {**clip, "waveform": waveform}

    return clips.enumerate().map(augment, tf.data.AUTOTUNE)


def _ratio(decibels):
    return 10 ** (decibels / 20)


def _fill(waveform, most, draws):
    """Up to `most` zeros around a waveform, or none; three draws in [0, 1)."""
    used, share, before = draws
    share = tf.where(used < 0.5, share, 0.0)
    total = tf.cast(share * tf.cast(most + 1, tf.float32), tf.int32)
    first = tf.cast(before * tf.cast(total + 1, tf.float32), tf.int32)
    return tf.pad(waveform, [[first, total - first]])


def augment_features(clips, settings, fbank, seed):
    """Set one band of mel bins and one stretch of time of each spectrogram to 0, the mean.

    The width of each mask is uniform from 0 to its largest width, and never more than half of
    the spectrogram; then its place is uniform.

    Args:
        clips: Dataset of dictionaries with `features` float32 (frames, mel_bins), normalized,
            and `frame_shift_scale` float32 (); other columns pass.
        settings: AugmentSettings; this stage uses freq_mask and time_mask_ms.
        fbank: FbankSettings, for the frame shift.
        seed: random seed of the widths and places.

    Returns:
        Dataset of the same dictionaries.

    Source: SpecAugment, Park et al. 2019, without time warping.
    """
    if not settings.freq_mask and not settings.time_mask_ms:
        return clips

    def mask(count, clip):
        features = clip["features"]
        width_f, place_f, width_t, place_t = _draws(4, seed, count, MASKS)
        most_t = settings.time_mask_ms / (fbank.frame_shift_ms * clip["frame_shift_scale"])
        in_time = _band(tf.shape(features)[0], most_t, width_t, place_t)
        in_freq = _band(features.shape[1], settings.freq_mask, width_f, place_f)
        hidden = in_time[:, None] | in_freq
        return {**clip, "features": tf.where(hidden, 0.0, features)}

    return clips.enumerate().map(mask, tf.data.AUTOTUNE)


def _draws(number, seed, count, stream):
    """Numbers in [0, 1) that depend on the seed, the count of clips and the stream alone."""
    return tf.unstack(tf.random.stateless_uniform([number], _key(seed, count, stream)))


def _key(seed, count, stream):
    return tf.random.experimental.stateless_fold_in(
        tf.stack([tf.cast(seed, count.dtype), count]), stream
    )


def _band(size, most, width, place):
    """bool (size,), True in a band of up to `most` places; width and place are in [0, 1)."""
    most = tf.minimum(tf.cast(most, tf.int32), size // 2)
    width = tf.cast(width * tf.cast(most + 1, tf.float32), tf.int32)
    start = tf.cast(place * tf.cast(size - width + 1, tf.float32), tf.int32)
    index = tf.range(size)
    return (index >= start) & (index < start + width)
