"""Random changes of the training clips, as stages from Dataset to Dataset.

Each stage draws from its seed, the clip and the epoch, so a run repeats exactly and every epoch
differs. A stage that is off returns the dataset that it was given.
"""

import tensorflow as tf

from tf_data_pipelines.draws import FILL, GAIN, LEVEL, MASKS, NOISE, key, uniform


def augment_waveforms(clips, settings, seed, *, sample_rate=16000, longest=None):
    """Scale each waveform by a random gain, put silence around it, and noise over both.

    Args:
        clips: Dataset of dictionaries with `waveform` float32 (samples,), `clip_id` and perhaps
            `epoch`, both int64 (); other columns pass.
        settings: AugmentSettings; this stage uses gain_db, fill_ms and noise_snr_db.
        seed: random seed of gains, lengths and noise.
        sample_rate: sample rate of the waveforms in Hz.
        longest: number of samples that silence fills a clip up to at most; None for any.

    Returns:
        Dataset of the same dictionaries.
    """
    if not settings.changes_waveforms:
        return clips

    def augment(clip):
        waveform = clip["waveform"]
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


def drawn_silence(clip, samples, settings, *, seed, sample_rate=16000, longest=None):
    """Zeros before and after a clip, int32 (2,), none for every other clip.

    Args:
        clip: dictionary with `clip_id` and perhaps `epoch`.
        samples: length of the clip, int32 ().
        settings: AugmentSettings; this uses fill_ms.
        seed, sample_rate, longest: as in `augment_waveforms`.
    """
    most = round(settings.fill_ms * sample_rate / 1000)
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
    if not settings.fill_ms:
        return samples
    silence = drawn_silence(
        clip, samples, settings, seed=seed, sample_rate=sample_rate, longest=longest
    )
    return samples + tf.reduce_sum(silence)


def augment_features(clips, settings, fbank, seed):
    """Set one band of mel bins and one stretch of time of each spectrogram to 0, the mean.

    The width of each mask is uniform from 0 to its largest width, and never more than half of
    the spectrogram; then its place is uniform.

    Args:
        clips: Dataset of dictionaries with `features` float32 (frames, mel_bins), normalized,
            `frame_shift_scale` float32 (), `clip_id` and perhaps `epoch`, both int64 (); other
            columns pass.
        settings: AugmentSettings; this stage uses freq_mask and time_mask_ms.
        fbank: FbankSettings, for the frame shift.
        seed: random seed of the widths and places.

    Returns:
        Dataset of the same dictionaries.

    Source: SpecAugment, Park et al. 2019, without time warping.
    """
    if not settings.freq_mask and not settings.time_mask_ms:
        return clips

    def mask(clip):
        features = clip["features"]
        width_f, place_f, width_t, place_t = uniform(4, clip, seed, MASKS)
        most_t = settings.time_mask_ms / (fbank.frame_shift_ms * clip["frame_shift_scale"])
        in_time = _band(tf.shape(features)[0], most_t, width_t, place_t)
        in_freq = _band(features.shape[1], settings.freq_mask, width_f, place_f)
        hidden = in_time[:, None] | in_freq
        return {**clip, "features": tf.where(hidden, 0.0, features)}

    return clips.map(mask, tf.data.AUTOTUNE)


def _band(size, most, width, place):
    """bool (size,), True in a band of up to `most` places; width and place are in [0, 1)."""
    most = tf.minimum(tf.cast(most, tf.int32), size // 2)
    width = tf.cast(width * tf.cast(most + 1, tf.float32), tf.int32)
    start = tf.cast(place * tf.cast(size - width + 1, tf.float32), tf.int32)
    index = tf.range(size)
    return (index >= start) & (index < start + width)
