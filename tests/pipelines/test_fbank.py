"""Log-mel equals Kaldi's at every frame shift, eagerly, in tf.data and in a batch."""

import dataclasses
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines.fbank import (
    LOG_FLOOR,
    features,
    log_mel,
    log_mel_at,
    normalize,
    padded_features,
)
from tf_data_pipelines.settings import FbankSettings

REFERENCE = np.load(pathlib.Path(__file__).parents[1] / "data" / "fbank.npz")
CLIPS = ("speech", "chirp_noise", "quiet")
SHIFTS_MS = (10, 12, 16, 20, 40)
KALDI = 1e-3  # Kaldi's own float32 rounding, in natural log
FLOAT32 = 2e-5  # the same operations in another order


def noise(*shape, seed=7):
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype("float32")


def through_data(waveforms, function):
    """`function` of each waveform inside tf.data, where the length is unknown."""
    signature = tf.TensorSpec([None], tf.float32)
    dataset = tf.data.Dataset.from_generator(lambda: waveforms, output_signature=signature)
    dataset = dataset.map(function, tf.data.AUTOTUNE)
    return list(dataset.as_numpy_iterator())


def assert_kaldi(found, clip, shift_ms):
    expected = REFERENCE[f"{clip}/fbank_shift_{shift_ms}ms"]
    assert found.shape == expected.shape
    above = expected > np.log(LOG_FLOOR) + KALDI
    assert above.mean() > 0.5
    np.testing.assert_allclose(found[above], expected[above], rtol=0, atol=KALDI)
    assert (found[~above] < np.log(LOG_FLOOR) + 2 * KALDI).all()


@pytest.mark.parametrize("shift_ms", SHIFTS_MS)
def test_is_kaldi(shift_ms):
    settings = FbankSettings(frame_shift_ms=shift_ms)
    waveforms = [REFERENCE[f"{clip}/waveform"] for clip in CLIPS]
    mapped = through_data(waveforms, lambda waveform: log_mel(waveform, settings))
    for clip, waveform, inside in zip(CLIPS, waveforms, mapped, strict=True):
        found = log_mel(waveform, settings)
        assert found.dtype == tf.float32
        assert_kaldi(found.numpy(), clip, shift_ms)
        assert_kaldi(inside, clip, shift_ms)


def test_a_drawn_shift_is_kaldi():
    settings = FbankSettings(frame_shift_ms=17)  # not used
    waveform = REFERENCE["speech/waveform"]
    draws = tf.data.Dataset.range(len(SHIFTS_MS), output_type=tf.int32)
    mapped = draws.map(lambda choice: log_mel_at(waveform, settings, choice, SHIFTS_MS))
    unknown = through_data(
        [REFERENCE["quiet/waveform"]], lambda w: log_mel_at(w, settings, tf.constant(3), SHIFTS_MS)
    )
    for choice, (shift_ms, inside) in enumerate(zip(SHIFTS_MS, mapped, strict=True)):
        eager = log_mel_at(waveform, settings, tf.constant(choice), SHIFTS_MS)
        assert_kaldi(eager.numpy(), "speech", shift_ms)
        assert_kaldi(inside.numpy(), "speech", shift_ms)
    assert_kaldi(unknown[0], "quiet", SHIFTS_MS[3])


def test_batch_is_the_clips_one_by_one():
    waveforms = np.stack([REFERENCE[f"{clip}/waveform"][:8999] for clip in CLIPS])
    settings = FbankSettings(frame_shift_ms=12)
    alone = [log_mel(waveform, settings) for waveform in waveforms]
    dynamic = tf.function(
        lambda batch: log_mel(batch, settings), [tf.TensorSpec([None, None], tf.float32)]
    )
    for batch in (log_mel(waveforms, settings), dynamic(waveforms)):
        assert batch.shape == (3, 45, 128)
        np.testing.assert_allclose(batch, alone, rtol=0, atol=KALDI)
    drawn = log_mel_at(waveforms, settings, tf.constant(1), SHIFTS_MS)
    np.testing.assert_allclose(drawn, alone, rtol=0, atol=KALDI)


def test_batch_mates_do_not_matter():
    waveform, settings = noise(2003), FbankSettings()
    among_loud = log_mel(np.stack([0.9 + noise(2003, seed=1), waveform]), settings)
    among_silent = log_mel(np.stack([np.zeros_like(waveform), waveform]), settings)
    np.testing.assert_allclose(among_loud[1], among_silent[1], rtol=0, atol=FLOAT32)
    np.testing.assert_allclose(among_silent[0], np.log(LOG_FLOOR), rtol=1e-6)


def test_other_settings_against_the_formula():
    """One frame at 8 kHz, 37 bins and a window of 152 samples, in float64 and in Hz."""
    settings = FbankSettings(
        frame_shift_ms=7, window_ms=19, mel_bins=37, sample_rate=8000, low_freq=50, preemphasis=0.9
    )
    waveform = noise(1009)
    frame = waveform[3 * 56 : 3 * 56 + 152].astype("float64")
    frame -= frame.mean()
    frame = frame - 0.9 * np.concatenate([frame[:1], frame[:-1]])
    frame *= 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(152) / 151)
    power = np.abs(np.fft.rfft(frame, 256)) ** 2
    mels = 1127 * np.log(1 + np.arange(129) * 8000 / 256 / 700)
    ends = 1127 * np.log(1 + np.array([50, 4000]) / 700)
    step = (ends[1] - ends[0]) / 38
    centers = ends[0] + step * np.arange(1, 38)
    triangles = np.maximum(0, 1 - np.abs(mels[:, None] - centers) / step)
    expected = np.log(np.maximum(power @ triangles, LOG_FLOOR))
    found = log_mel(waveform, settings)
    assert found.shape == (16, 37)
    np.testing.assert_allclose(found[3], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16000, 98)]
)
def test_number_of_frames(samples, frames):
    settings = FbankSettings()
    assert settings.frames(samples) == frames
    waveform = noise(samples)
    mapped = through_data([waveform], lambda waveform: log_mel(waveform, settings))
    assert mapped[0].shape == log_mel(waveform, settings).shape == (frames, 128)
    assert log_mel(np.stack([waveform] * 3), settings).shape == (3, frames, 128)


@pytest.mark.parametrize("samples", [100, 8000, 20000])
def test_clips_of_one_length_are_cut_or_filled_up(samples):
    """AST's own way: zeros in log-mel, before normalization."""
    free, settings = FbankSettings(), FbankSettings(clip_ms=600.0)
    waveform = noise(samples)
    whole = log_mel(waveform, free).numpy()
    expected = np.pad(whole[:60], [[0, max(0, 60 - len(whole))], [0, 0]])
    assert settings.frames(samples) == settings.clip_frames == 60
    np.testing.assert_array_equal(log_mel(waveform, settings), expected)
    np.testing.assert_array_equal(log_mel(waveform[None], settings)[0], expected)
    (mapped,) = through_data([waveform], lambda waveform: log_mel(waveform, settings))
    np.testing.assert_allclose(mapped, expected, atol=1e-5)
    for choice, frames in enumerate((60, 30)):  # a coarser frame shift has fewer
        assert log_mel_at(waveform, settings, choice, (10, 20)).shape[0] == frames
    with pytest.raises(ValueError, match="clip_ms=0 must be a positive number"):
        FbankSettings(clip_ms=0)


@pytest.mark.parametrize("clip_ms", [None, 300.0])
@pytest.mark.parametrize("remove_clip_mean", [True, False])
def test_what_follows_a_clip_is_not_heard(clip_ms, remove_clip_mean):
    settings = FbankSettings(
        20.0, mel_bins=37, mean=-7.0, clip_ms=clip_ms, remove_clip_mean=remove_clip_mean
    )
    lengths = [9000, 5001, 720, 719, 399, 10]
    loud = 0.5 + 3 * noise(len(lengths), 9000)
    loud[1, 7000] = np.nan
    found, frames = padded_features(loud, tf.constant(lengths), settings)
    longest = int(settings.frames(9000))
    assert found.shape == (len(lengths), longest, 37)
    for clip, length in enumerate(lengths):
        expected = features(loud[clip, :length], settings).numpy()
        assert frames[clip] == len(expected) == settings.frames(length)
        np.testing.assert_allclose(found[clip, : len(expected)], expected, rtol=0, atol=FLOAT32)
        assert not found[clip, len(expected) :].numpy().any()
    for length, most in ((2**31 - 1, 9000), (-5, 0)):  # no length is beyond the waveform
        _, frames = padded_features(loud, tf.fill([len(lengths)], length), settings)
        assert frames[0] == settings.frames(most)


def test_shapes_are_static_where_the_length_is():
    for spec, shape in (
        (tf.TensorSpec([None, 9000]), [None, 54, 128]),
        (tf.TensorSpec([None]), [None, 128]),
    ):
        graph = tf.function(lambda x: features(x, FbankSettings())).get_concrete_function(spec)
        assert graph.structured_outputs.shape.as_list() == shape


@pytest.mark.parametrize(("rate", "preemphasis"), [(16000, 0.97), (8000, 0.0)])
def test_silence_with_a_noise_floor_is_the_mean_of_such_noise(rate, preemphasis):
    bare = FbankSettings(sample_rate=rate, preemphasis=preemphasis, mel_bins=40)
    floor = dataclasses.replace(bare, noise_floor_dbfs=-50.0)
    white = 10 ** (-50 / 20) * np.random.default_rng(0).normal(size=60 * rate)
    mean = np.exp(log_mel(white.astype("float32"), bare).numpy().astype("float64")).mean(0)
    silence = log_mel(np.zeros(rate, "float32"), floor).numpy()
    np.testing.assert_array_equal(silence, np.broadcast_to(silence[0], silence.shape))
    np.testing.assert_allclose(np.exp(silence[0])[1:], mean[1:], rtol=0.06)
    # 10 dB below the floor noise adds a tenth; without a floor it is most of what is heard.
    moved = log_mel((white[:rate] * 10**-0.5).astype("float32"), floor) - silence[0]
    assert 0.05 < np.mean(moved) < 0.13
    assert np.mean(log_mel(white[:rate].astype("float32"), bare)) > np.log(LOG_FLOOR) + 5


def test_normalize():
    settings = FbankSettings(mean=-4.0, std=2.5)
    np.testing.assert_array_equal(normalize(np.float32([-4.0, 1.0, -14.0]), settings), [0, 1, -2])
    audioset = normalize(np.float32([-4.2677393, 4.8702555]), FbankSettings())
    np.testing.assert_allclose(audioset, [0, 1], atol=1e-6)


def test_features_are_the_normalized_log_mel():
    settings = FbankSettings(mel_bins=37, mean=-6.5, std=2.75)
    waveform = noise(2003)
    expected = (log_mel(waveform, settings).numpy() + 6.5) / 5.5
    np.testing.assert_allclose(features(waveform, settings), expected, rtol=1e-6)
    (mapped,) = through_data([waveform], lambda waveform: features(waveform, settings))
    np.testing.assert_allclose(mapped, expected, atol=FLOAT32)


def test_another_frame_shift_changes_nothing_else():
    settings = FbankSettings(12.5, mel_bins=37, mean=-6.5)
    assert settings.with_frame_shift(None) is settings
    coarse = settings.with_frame_shift(20)
    assert coarse.frame_shift_ms == 20 and coarse.frames(16000) == 1 + (16000 - 400) // 320
    assert coarse.with_frame_shift(12.5) == settings


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros([3, 500, 2], "float32"), r"shape \(3, 500, 2\); expected floats .*one channel"),
        (np.zeros(500, "int16"), r"waveform has dtype int16 and shape \(500,\)"),
        (np.float32(0.5), r"shape \(\)"),
    ],
)
def test_refuses_what_is_no_waveform(waveform, message):
    with pytest.raises(ValueError, match=message):
        log_mel(waveform, FbankSettings())
    with pytest.raises(ValueError, match=message):
        log_mel_at(waveform, FbankSettings(), tf.constant(0), SHIFTS_MS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frame_shift_ms": 0.01}, "frame_shift_ms=0.01 is under one sample"),
        ({"frame_shift_ms": -10}, "frame_shift_ms=-10 must be a positive number"),
        ({"std": 0.0}, "std=0.0 must be a positive number"),
        ({"mel_bins": 12.5}, "mel_bins=12.5 must be a positive number"),
        ({"window_ms": 0.01}, "window_ms=0.01 is under two samples"),
        ({"window_ms": 1e9}, r"window_ms=1000000000\.0 must be a positive number up to 10,000"),
        ({"frame_shift_ms": 1e9}, r"frame_shift_ms=1000000000\.0 must be .* up to 10,000"),
        ({"clip_ms": float("inf")}, "clip_ms=inf must be a positive number up to"),
        ({"mel_bins": 10**9}, "mel_bins=1000000000 must be a positive number up to 1,024"),
        ({"sample_rate": 16000.5}, r"sample_rate=16000\.5 must be a whole number from 1,000 to"),
        ({"sample_rate": 10}, "sample_rate=10 must be a whole number from 1,000 to 384,000"),
        ({"preemphasis": 1.5}, r"preemphasis=1\.5 must be a number from 0 to 1"),
        ({"remove_clip_mean": "no"}, "remove_clip_mean='no' must be True or False"),
        ({"mean": "x"}, "mean='x' must be a number from -1,000 to 1,000"),
        ({"mean": float("nan")}, "mean=nan must be a number from"),
        ({"std": 1e9}, r"std=1000000000\.0 must be a positive number up to 1,000"),
        ({"noise_floor_dbfs": 3.0}, r"noise_floor_dbfs=3\.0 must be a number from -120 to 0"),
        ({"low_freq": float("nan")}, "low_freq=nan must be a number from 0"),
        ({"low_freq": "x"}, "low_freq='x' must be a number from 0"),
        ({"low_freq": 8000}, "low_freq=8000 must lie between 0 and half of sample_rate=16000"),
    ],
)
def test_settings_mistakes(values, message):
    with pytest.raises(ValueError, match=message):
        FbankSettings(**values)


def test_settings_survive_a_dictionary():
    settings = FbankSettings(frame_shift_ms=12, mel_bins=37, mean=-3.25)
    assert FbankSettings.from_dict(settings.to_dict()) == settings
    assert dataclasses.replace(settings, mean=0.0) != settings
    with pytest.raises(ValueError, match="FbankSettings has no setting hop; it has frame_shift_ms"):
        FbankSettings.from_dict({"hop": 10})
