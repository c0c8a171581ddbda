"""Each augmentation changes what it should, within its limits, and repeats exactly."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines import pipeline, stages
from tf_data_pipelines.augment import augment_features, augment_waveforms
from tf_data_pipelines.fbank import features, log_mel
from tf_data_pipelines.pipeline import extract_features, load_waveforms, training_batches
from tf_data_pipelines.settings import AugmentSettings, FbankSettings, PackSettings, PatchSettings
from tf_data_pipelines.sources import WaveformSource

FBANK = FbankSettings(mel_bins=37, mean=-7.0, std=3.0)
GAIN = AugmentSettings(gain_db=6.0)
MASKS = AugmentSettings(freq_mask=11, time_mask_ms=230.0)
FILL = AugmentSettings(fill_ms=300.0)
NOISE = AugmentSettings(noise_snr_db=(10, 40))
PHONE = AugmentSettings(fill_ms=300.0, noise_snr_db=(10, 40))
DROPS = AugmentSettings(time_mask_share=0.2, token_dropout=0.5)
CHANGES = AugmentSettings(crop_ms=400.0, roll=0.5, frame_shift_range_ms=(10, 20))
CLIPS = 43


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    lengths = rng.integers(4000, 9000, CLIPS)
    return WaveformSource([rng.normal(0, 0.1, length).astype("float32") for length in lengths])


def items(clips):
    return list(clips.as_numpy_iterator())


def same(one, other):
    """Whether two lists of dictionaries of arrays are equal."""
    return all(
        np.array_equal(left[name], right[name])
        for left, right in zip(one, other, strict=True)
        for name in left
    )


def full_spectrograms(frames=101, mel_bins=37, scale=1.0, clips=300):
    """Spectrograms of ones, so that a 0 is a mask."""
    clip = {"features": tf.ones([frames, mel_bins]), "frame_shift_scale": tf.constant(scale)}
    return tf.data.Dataset.range(clips).map(lambda number: {**clip, "clip_id": number})


def epochs_of(clips, count):
    """The clips so many times, with their epoch."""
    epochs = tf.data.Dataset.range(count)
    return epochs.flat_map(lambda epoch: clips.map(lambda clip: {**clip, "epoch": epoch}))


def masks(clips):
    """(frames, mel bins) that are hidden in each clip; they are one band each."""
    sizes = []
    for clip in items(clips):
        hidden = clip["features"] == 0
        assert np.isin(clip["features"], (0, 1)).all()
        in_time, in_freq = hidden.all(1), hidden.all(0)
        np.testing.assert_array_equal(hidden, in_time[:, None] | in_freq)
        for band in (in_time, in_freq):
            places = np.flatnonzero(band)
            np.testing.assert_array_equal(np.diff(places), 1)
        sizes.append((in_time.sum(), in_freq.sum()))
    return np.array(sizes)


def test_the_gain_scales_each_clip_by_its_own_draw(data):
    clips = load_waveforms(data, 16000)
    decibels = []
    for clip in items(augment_waveforms(clips, GAIN, seed=5)):
        original = data.waveforms[clip["clip_id"]]
        ratio = clip["waveform"] / original
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
        decibels.append(20 * np.log10(ratio[0]))
    assert -6 <= min(decibels) < -4 and 4 < max(decibels) <= 6
    assert len(np.unique(np.round(decibels, 4))) == CLIPS


def test_a_gain_moves_every_log_mel_value_equally(data):
    settings = FbankSettings(mel_bins=37)
    clips = augment_waveforms(load_waveforms(data, 16000), GAIN, seed=5)
    for clip in items(extract_features(clips.take(5), settings)):
        difference = clip["features"] - features(data.waveforms[clip["clip_id"]], settings)
        np.testing.assert_allclose(difference, difference[0, 0], atol=1e-4)
        assert abs(difference[0, 0]) > 1e-3


def decibels(waveform):
    return 10 * np.log10(np.mean(np.square(waveform, dtype="float64")))


def test_noise_is_as_far_below_each_other_clip_as_drawn(data):
    levels = []
    for clip in items(augment_waveforms(epochs_of(load_waveforms(data, 16000), 5), NOISE, seed=5)):
        original = data.waveforms[clip["clip_id"]]
        added = clip["waveform"] - original
        if added.any():
            assert abs(np.mean(added)) < 0.1 * np.std(added)
            low, high = np.array_split(np.abs(np.fft.rfft(added)) ** 2, 2)
            assert 0.8 < low.sum() / high.sum() < 1.25  # white
            levels.append(decibels(original) - decibels(added))
    assert 0.4 < len(levels) / (5 * CLIPS) < 0.6
    assert 9.5 < min(levels) < 12 and 38 < max(levels) < 40.5
    assert len(np.unique(np.round(levels, 3))) == len(levels)


@pytest.mark.parametrize("longest", [None, 9000])
def test_silence_is_put_around_each_other_clip(data, longest):
    before, after = [], []
    clips = epochs_of(load_waveforms(data, 16000), 3)
    for clip in items(augment_waveforms(clips, FILL, seed=5, longest=longest)):
        original, waveform = data.waveforms[clip["clip_id"]], clip["waveform"]
        sound = np.flatnonzero(waveform)
        np.testing.assert_array_equal(waveform[sound[0] : sound[-1] + 1], original)
        before.append(sound[0])
        after.append(len(waveform) - 1 - sound[-1])
        assert longest is None or len(waveform) <= longest
    total = np.add(before, after)
    assert 0.4 < np.mean(total == 0) < 0.62 and total.max() <= 4800
    assert max(before) > 1500 and max(after) > 1500
    assert longest or total.max() > 4500


def test_noise_is_in_the_silence_too(data):
    filled = 0
    for clip in items(augment_waveforms(load_waveforms(data, 16000), PHONE, seed=5)):
        loud = np.abs(clip["waveform"]) > 0
        extra = len(loud) - len(data.waveforms[clip["clip_id"]])
        noisy = loud.all()
        assert noisy or not extra or len(loud) - loud.sum() >= extra
        filled += noisy and extra > 0
    assert filled > 5


def test_no_clip_gets_longer_than_the_longest(data, monkeypatch):
    given = {}

    def augment(clips, settings, seed, **limits):
        given.update(limits)
        return augment_waveforms(clips, settings, seed, **limits)

    monkeypatch.setattr(pipeline, "augment_waveforms", augment)
    packing = PackSettings(rows=4, row_length=128, segments=4)
    patches = PatchSettings((16,), remainder="crop")
    training_batches(data, FBANK, patches=patches, packing=packing, augment=FILL)
    assert given == {"sample_rate": 16000, "longest": max(map(len, data.waveforms))}


def test_masks_are_one_band_up_to_their_width():
    sizes = masks(augment_features(full_spectrograms(), MASKS, FBANK, seed=5))
    assert set(sizes[:, 0]) == set(range(24)) and set(sizes[:, 1]) == set(range(12))
    assert abs(np.corrcoef(sizes.T)[0, 1]) < 0.2


def test_masks_are_everywhere():
    clips = items(augment_features(full_spectrograms(), MASKS, FBANK, seed=5))
    hidden = np.mean([clip["features"] == 0 for clip in clips], 0)
    assert hidden.min() > 0 and hidden[20:80, 10:27].std() < hidden.mean()


@pytest.mark.parametrize(
    ("settings", "column"), [(AugmentSettings(freq_mask=5), 0), (AugmentSettings(0, 0, 90.0), 1)]
)
def test_each_mask_works_alone(settings, column):
    sizes = masks(augment_features(full_spectrograms(), settings, FBANK, seed=5))
    assert not sizes[:, column].any() and sizes[:, 1 - column].any()


def test_a_time_mask_is_as_long_at_every_frame_shift():
    coarse = full_spectrograms(scale=2.0)
    assert masks(augment_features(coarse, MASKS, FBANK, seed=5))[:, 0].max() == 11
    other = FBANK.with_frame_shift(5.0)
    assert masks(augment_features(full_spectrograms(), MASKS, other, seed=5))[:, 0].max() == 46


@pytest.mark.parametrize(("time_mask_ms", "longest"), [(0, (20, 10)), (150.0, (15, 10))])
def test_a_time_mask_is_a_share_of_the_clip_and_no_longer_than_in_milliseconds(
    time_mask_ms, longest
):
    settings = AugmentSettings(time_mask_share=0.2, time_mask_ms=time_mask_ms)
    for frames, most in zip((101, 50), longest, strict=True):
        spectrograms = full_spectrograms(frames=frames)
        assert masks(augment_features(spectrograms, settings, FBANK, seed=5))[:, 0].max() == most
    coarse = full_spectrograms(scale=3.0)  # a share is one at every frame shift
    settings = AugmentSettings(time_mask_share=0.2)
    assert masks(augment_features(coarse, settings, FBANK, seed=5))[:, 0].max() == 20


def test_a_mask_hides_at_most_half_of_a_short_clip():
    short = full_spectrograms(frames=9, mel_bins=7)
    sizes = masks(augment_features(short, MASKS, FBANK, seed=5))
    assert set(sizes[:, 0]) == {0, 1, 2, 3, 4} and set(sizes[:, 1]) == {0, 1, 2, 3}
    empty = full_spectrograms(frames=0)
    assert all(
        not clip["features"].size for clip in items(augment_features(empty, MASKS, FBANK, 1))
    )


def test_the_same_seed_draws_the_same_and_every_epoch_differs(data):
    waves = epochs_of(load_waveforms(data, 16000), 2)
    spectrograms = epochs_of(full_spectrograms(clips=CLIPS), 2)
    for stage in (
        lambda seed: augment_waveforms(waves, GAIN, seed),
        lambda seed: augment_waveforms(waves, FILL, seed),
        lambda seed: augment_waveforms(waves, NOISE, seed),
        lambda seed: augment_features(spectrograms, MASKS, FBANK, seed),
    ):
        first = items(stage(5))
        assert same(first, items(stage(5))) and not same(first, items(stage(6)))
        assert [clip.pop("epoch") for clip in first] == [0] * CLIPS + [1] * CLIPS
        assert not same(first[:CLIPS], first[CLIPS:])


def test_off_is_the_dataset_itself():
    clips = full_spectrograms()
    assert augment_waveforms(clips, MASKS, seed=1) is clips
    assert augment_features(clips, GAIN, FBANK, seed=1) is clips


def epochs(data, count, **options):
    """Tokens of each clip in each epoch, [{clip: tokens}], of clips all of the same length."""
    packing = PackSettings(rows=len(data.waveforms), row_length=64, segments=1)
    patches = PatchSettings((16,), remainder="crop")
    batches = training_batches(data, FBANK, patches=patches, packing=packing, **options)
    return [inputs["tokens"] for inputs, _, _ in batches.take(count).as_numpy_iterator()]


ONE_CLIP = WaveformSource([np.random.default_rng(1).normal(0, 0.1, 8009)])


@functools.cache
def plain_epochs(cache_seconds):
    """Epochs of a clip without augmentation, all the same, with so many seconds cached."""
    plain = epochs(ONE_CLIP, 3)
    np.testing.assert_array_equal(plain[0], plain[2])
    np.testing.assert_array_equal(plain, epochs(ONE_CLIP, 3, augment=AugmentSettings()))
    return plain


@pytest.mark.parametrize("cache_seconds", [0, 3600])
@pytest.mark.parametrize(
    "settings", [GAIN, MASKS, DROPS, CHANGES], ids=["gain", "masks", "drops", "changes"]
)
def test_training_clips_change_in_every_epoch(monkeypatch, settings, cache_seconds):
    """One clip, so that a batch is an epoch and only the augmentation can change it."""
    monkeypatch.setattr(pipeline, "CACHE_SECONDS", cache_seconds)
    data, plain = ONE_CLIP, plain_epochs(cache_seconds)
    augmented = epochs(data, 3, augment=settings)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not np.array_equal(augmented[one], augmented[other])
    assert not np.array_equal(augmented, plain)
    np.testing.assert_array_equal(augmented, epochs(data, 3, augment=settings))


@pytest.mark.parametrize("settings", [FILL, NOISE], ids=["fill", "noise"])
def test_some_epochs_of_a_clip_are_as_on_a_phone(settings):
    rng = np.random.default_rng(1)
    data = WaveformSource([rng.normal(0, 0.1, length) for length in (8009, 16000)])
    plain, augmented = epochs(data, 8), epochs(data, 8, augment=settings)
    same = [np.array_equal(one, other) for one, other in zip(plain, augmented, strict=True)]
    assert not all(same)
    np.testing.assert_array_equal(augmented, epochs(data, 8, augment=settings))


@pytest.mark.parametrize(
    ("settings", "shifts", "each_epoch"),
    [
        (None, (), False),
        (MASKS, (), False),
        (DROPS, (), False),
        (CHANGES, (), True),
        (GAIN, (), True),
        (FILL, (), True),
        (NOISE, (), True),
        (MASKS, (10, 20), True),
    ],
)
def test_features_are_computed_again_only_if_the_waveforms_change(
    monkeypatch, data, *, settings, shifts, each_epoch
):
    made = []

    def counted(function):
        def count(waveform, *arguments):
            waveform = tf.numpy_function(
                lambda w: made.append(1) or w, [waveform], tf.float32, stateful=True
            )
            return function(tf.ensure_shape(waveform, [None]), *arguments)

        return count

    monkeypatch.setattr(stages, "features", counted(stages.features))
    monkeypatch.setattr(stages, "log_mel_at", counted(stages.log_mel_at))
    monkeypatch.setattr(stages, "log_mel_every", counted(stages.log_mel_every))
    packing = PackSettings(rows=4, row_length=128, segments=4)
    patches = PatchSettings((16,), shifts, remainder="crop")
    batches = training_batches(data, FBANK, patches=patches, packing=packing, augment=settings)
    used = sum(weights.sum() for _, _, weights in batches.take(20).as_numpy_iterator())
    assert used > 3 * CLIPS
    assert len(made) >= used if each_epoch else len(made) == CLIPS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gain_db": -3.0}, r"gain_db=-3\.0 must be a number from 0 to 100"),
        ({"freq_mask": 5000}, r"freq_mask=5000 must be a whole number from 0 to 1,024"),
        (
            {"time_mask_ms": 1e9},
            r"time_mask_ms=1000000000\.0 must be a number from 0 to 86,400,000",
        ),
        ({"freq_mask": 2.5}, r"freq_mask=2\.5 must be"),
        ({"gain_db": False}, "gain_db=False must be a number"),
        ({"time_mask_ms": float("nan")}, "time_mask_ms=nan must be"),
        ({"fill_ms": -1}, "fill_ms=-1 must be a number from 0"),
        ({"noise_snr_db": 30}, "noise_snr_db=30 must be two numbers"),
        ({"noise_snr_db": (40, 20)}, r"noise_snr_db=\(40, 20\) must be two numbers"),
        ({"noise_snr_db": (20, float("nan"))}, "must be two numbers"),
        ({"time_mask_share": 1.5}, r"time_mask_share=1\.5 must be a number from 0 to 1"),
        ({"crop_ms": -1}, "crop_ms=-1 must be a number from 0"),
        ({"roll": True}, "roll=True must be a number from 0 to 1"),
        ({"mixup": 2}, "mixup=2 must be a number from 0 to 1"),
        ({"mixup_alpha": 0}, "mixup_alpha=0 must be a positive number"),
        ({"frame_shift_range_ms": (20, 10)}, r"frame_shift_range_ms=\(20, 10\) must be two"),
        ({"frame_shift_range_ms": (0, 10)}, r"frame_shift_range_ms=\(0, 10\) must be two"),
        ({"token_dropout": 1}, r"token_dropout=1 must be a number from 0 to 0\.95"),
        ({"drop_freq": -0.1}, r"drop_freq=-0\.1 must be"),
        ({"drop_time": "no"}, "drop_time='no' must be"),
        ({"balanced": 1}, "balanced=1 must be True or False"),
    ],
)
def test_settings_mistakes(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentSettings(**values)
    for settings in (MASKS, PHONE, DROPS, CHANGES):
        assert AugmentSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_hidden_values_are_the_mean_of_the_log_mel(data):
    clips = extract_features(load_waveforms(data, 16000), FBANK).take(9)
    for clip in items(augment_features(clips, MASKS, FBANK, seed=2)):
        mel = clip["features"] * 2 * FBANK.std + FBANK.mean
        kept = clip["features"] != 0
        expected = log_mel(data.waveforms[clip["clip_id"]], FBANK).numpy()
        np.testing.assert_allclose(mel[kept], expected[kept], atol=1e-4)
        np.testing.assert_array_equal(mel[~kept], np.float32(FBANK.mean))


ON = {
    "gain_db": 6.0, "freq_mask": 11, "time_mask_ms": 230.0, "fill_ms": 300.0,
    "noise_snr_db": (10, 40), "time_mask_share": 0.4, "crop_ms": 200.0, "roll": 0.5, "mixup": 1.0,
    "mixup_alpha": 0.2, "frame_shift_range_ms": (12, 20), "token_dropout": 0.5, "drop_freq": 0.5,
    "drop_time": 0.5, "balanced": True,
}  # fmt: skip


def test_every_setting_is_known_to_the_test_of_its_effect():
    assert {field.name for field in dataclasses.fields(AugmentSettings)} == {*ON}


@pytest.mark.parametrize("name", ON)
def test_every_setting_changes_the_training_batches(data, name):
    labels = np.eye(3, dtype="float32")[[0] * 30 + [1] * 8 + [2] * 5]
    clips = WaveformSource(data.waveforms, labels=labels)
    packing = PackSettings(rows=4, row_length=128, segments=4)
    patches = PatchSettings((16,), remainder="crop")

    def batches(**settings):
        augment = AugmentSettings(**settings)
        found = training_batches(clips, FBANK, patches=patches, packing=packing, augment=augment)
        return [
            {**inputs, "labels": labels} for inputs, labels, _ in found.take(3).as_numpy_iterator()
        ]

    others = {"mixup": 1.0} if name == "mixup_alpha" else {}
    assert not same(batches(**others), batches(**others, **{name: ON[name]}))
