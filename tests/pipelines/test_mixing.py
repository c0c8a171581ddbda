"""Crop, roll and mixup of waveforms: sample for sample what they say."""

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines.augment import augment_waveforms, drawn_length
from tf_data_pipelines.pipeline import training_batches
from tf_data_pipelines.settings import AugmentSettings, FbankSettings, PackSettings, PatchSettings
from tf_data_pipelines.sources import WaveformSource

CLIPS = 96
CROP = AugmentSettings(crop_ms=30.0)
ROLL = AugmentSettings(roll=0.2)
MIXUP = AugmentSettings(mixup=0.6)
CLASSES = 5


def ramp(size, start=0):
    """A waveform whose numbers tell their places."""
    return start + tf.cast(tf.range(size), tf.float32)


def ramps(sizes):
    """Two epochs of clips of these lengths in turn."""
    sizes = tf.constant(sizes)

    def clip(number):
        waveform = ramp(sizes[number % len(sizes)])
        return {"waveform": waveform, "clip_id": number % CLIPS, "epoch": number // CLIPS}

    return tf.data.Dataset.range(2 * CLIPS).map(clip)


def items(clips):
    return list(clips.as_numpy_iterator())


def test_a_crop_is_another_stretch_of_a_long_clip_in_each_epoch():
    firsts = []
    for clip in items(augment_waveforms(ramps((1000, 100, 480, 0)), CROP, 5)):
        size = (1000, 100, 480, 0)[clip["clip_id"] % 4]
        waveform = clip["waveform"]
        np.testing.assert_array_equal(np.diff(waveform), np.ones(max(0, len(waveform) - 1)))
        assert len(waveform) == min(size, 480) == drawn_length(clip, size, CROP, seed=5)
        if size == 1000:
            firsts.append(waveform[0])
        assert size == 1000 or not size or waveform[0] == 0
    assert min(firsts) < 40 and max(firsts) > 480 and max(firsts) <= 520
    assert abs(np.mean(firsts) - 260) < 80 and len(set(firsts)) > 35


@pytest.mark.parametrize(("settings", "most"), [(ROLL, 0.2), (AugmentSettings(roll=1.0), 0.5)])
def test_a_roll_shifts_a_clip_along_itself(settings, most):
    shifts = []
    for clip in items(augment_waveforms(ramps((200, 331, 0)), settings, 5)):
        size = (200, 331, 0)[clip["clip_id"] % 3]
        waveform = clip["waveform"]
        if size:
            np.testing.assert_array_equal(waveform, np.roll(np.arange(size), -int(waveform[0])))
            shifts.append(((waveform[0] + size / 2) % size - size / 2) / size)
    assert len(waveform) == size
    assert -most <= min(shifts) < -0.8 * most and 0.8 * most < max(shifts) <= most
    assert len(np.unique(np.round(shifts, 6))) > 60


def with_partners(partner_size, size=100):
    """Sines, each with a partner of another class; where several labels are, of two."""

    def clip(number):
        one = tf.sin(0.1 * ramp(size)) + 1  # with a mean
        label = tf.one_hot(number % CLASSES, CLASSES)
        return {
            "waveform": one,
            "label": label,
            "clip_id": number,
            "partner_waveform": tf.cos(0.37 * ramp(partner_size)) - 2,
            "partner_label": tf.roll(label, 1, 0) + tf.roll(label, 2, 0),
        }

    return tf.data.Dataset.range(200).map(clip)


def centered(waveform):
    return waveform - np.mean(waveform)


@pytest.mark.parametrize("partner_size", [100, 70, 170])
def test_a_mixture_is_that_of_waveforms_without_their_means(partner_size):
    partner = centered(np.cos(0.37 * np.arange(partner_size)))
    places = max(1, partner_size - 99)
    stretches = [np.resize(partner[place : place + 100], 100) for place in range(places)]
    for stretch in stretches:
        stretch[partner_size:] = 0
    shares, found = [], set()
    for clip in items(augment_waveforms(with_partners(partner_size), MIXUP, 5)):
        assert set(clip) == {"waveform", "label", "clip_id"}
        own = int(clip["clip_id"] % CLASSES)
        share = clip["label"][own]
        expected = share * np.eye(CLASSES)[own]
        expected[[(own + 1) % CLASSES, (own + 2) % CLASSES]] += 1 - share
        np.testing.assert_allclose(clip["label"], expected, rtol=1e-5)
        one = np.sin(0.1 * np.arange(100)) + 1
        if share == 1:
            np.testing.assert_allclose(clip["waveform"], one, atol=1e-5)
            continue
        mixtures = [centered(share * centered(one) + (1 - share) * other) for other in stretches]
        errors = [np.abs(clip["waveform"] - mixture).max() for mixture in mixtures]
        assert min(errors) < 1e-4
        found.add(int(np.argmin(errors)))
        shares.append(share)
    assert 0.5 < len(shares) / 200 < 0.7 and len(found) > places / 2
    assert abs(np.mean(shares) - 0.5) < 0.04  # Beta(10, 10): 0.5, deviation 0.109
    assert 0.09 < np.std(shares) < 0.13 and len(np.unique(shares)) == len(shares)


def test_alpha_spreads_the_shares():
    def shares(alpha):
        mixed = augment_waveforms(
            with_partners(100), AugmentSettings(mixup=1, mixup_alpha=alpha), 5
        )
        return [clip["label"][clip["clip_id"] % CLASSES] for clip in items(mixed)]

    assert np.std(shares(0.3)) > 0.3 and np.std(shares(200)) < 0.03


def test_mixed_labels_are_floats_also_of_clips_in_memory():
    data = WaveformSource([np.sin(0.1 * np.arange(2000 + 300 * n)) for n in range(5)])
    how = {
        "patches": PatchSettings((8,), grid=(2, 8)), "packing": PackSettings(1, 64, 3)
    }  # fmt: skip
    fbank = FbankSettings(mel_bins=16)

    def batches(settings):
        return training_batches(data, fbank, augment=settings, **how)

    assert batches(MIXUP).element_spec[1] == tf.TensorSpec([1, 3, 1], tf.float32)
    assert batches(CROP).element_spec[1] == tf.TensorSpec([1, 3], tf.int32)
    plain, mixed = (
        [inputs["tokens"] for inputs, _, _ in batches(settings).take(4).as_numpy_iterator()]
        for settings in (None, AugmentSettings(mixup=1))
    )
    assert all(not np.array_equal(one, other) for one, other in zip(plain, mixed, strict=True))
