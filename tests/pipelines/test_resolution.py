"""Frame shifts from a range, and pooled frames: the same sound at another time resolution."""

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines.fbank import features
from tf_data_pipelines.lengths import check_lengths, clip_tokens
from tf_data_pipelines.patches import patch_tokens
from tf_data_pipelines.pipeline import evaluation_batches, training_clips
from tf_data_pipelines.settings import AugmentSettings, FbankSettings, PackSettings, PatchSettings
from tf_data_pipelines.sources import WaveformSource
from tf_data_pipelines.stages import extract_features, make_tokens

FBANK = FbankSettings(mel_bins=32, mean=-7.0, std=3.0)
RANGE = AugmentSettings(frame_shift_range_ms=(10, 25))
PACKING = PackSettings(rows=1, row_length=96, segments=8)


@pytest.fixture(scope="module")
def waveforms():
    rng = np.random.default_rng(2)
    return [rng.normal(0, 0.1, size).astype("float32") for size in rng.integers(2000, 9000, 12)]


def clips_of(waveforms, epochs=1):
    data = tf.ragged.constant(waveforms, ragged_rank=1)
    count = len(waveforms)

    def clip(place):
        waveform = data[place % count]
        return {"waveform": waveform, "clip_id": place % count, "epoch": place // count}

    return tf.data.Dataset.range(epochs * count).map(clip)


@pytest.mark.parametrize("clip_ms", [None, 300.0])
def test_a_drawn_frame_shift_is_that_frame_shift(waveforms, clip_ms):
    """Features are those of a filterbank with this frame shift, and the scale tells it."""
    fbank = FbankSettings(mel_bins=32, mean=-7.0, std=3.0, clip_ms=clip_ms)
    clips = extract_features(clips_of(waveforms, 4), fbank, frame_shift_range_ms=(10, 25), seed=3)
    shifts = []
    for clip in clips.as_numpy_iterator():
        shift = 10 * float(clip["frame_shift_scale"])
        expected = features(waveforms[clip["clip_id"]], fbank.with_frame_shift(shift))
        np.testing.assert_allclose(clip["features"], expected, atol=2e-4)
        shifts.append(shift)
    assert 10 <= min(shifts) < 12 and 23 < max(shifts) <= 25
    assert abs(np.mean(shifts) - 17.5) < 2 and len(set(shifts)) > 15
    np.testing.assert_array_equal(np.mod(np.multiply(16, shifts).round(4), 8), 0)


def test_a_range_counts_and_excludes_a_list(waveforms):
    data, patches = WaveformSource(waveforms), PatchSettings((8,), grid=(2, 8))
    fine = AugmentSettings(frame_shift_range_ms=(5, 25))
    half = clip_tokens(data, FBANK.with_frame_shift(5.0), patches)
    np.testing.assert_array_equal(clip_tokens(data, FBANK, patches, fine), half)
    packing = PackSettings(1, int(half.max()) - 1, 4)
    check_lengths(data, FBANK, patches, packing, augment=RANGE)
    with pytest.raises(ValueError, match=f"has {half.max()} tokens at patch 8x8"):
        check_lengths(data, FBANK, patches, packing, augment=fine)
    crop = AugmentSettings(frame_shift_range_ms=(5, 25), crop_ms=100)
    check_lengths(data, FBANK, patches, packing, augment=crop)
    both = PatchSettings((8,), (10, 20), grid=(2, 8))
    with pytest.raises(ValueError, match=r"frame_shift_range_ms=\(10.0, 25.0\) must be \(\) where"):
        training_clips(data, FBANK, patches=both, augment=RANGE)
    with pytest.raises(ValueError, match=r"crop_ms=9 must be at least window_ms=25\.0"):
        training_clips(data, FBANK, patches=patches, augment=AugmentSettings(crop_ms=9))


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_pooled_frames_by_hand(pooling):
    """Of 7 frames two windows of 3, then cut into patches at three times the frame shift."""
    mel = np.random.default_rng(0).normal(size=(40, 32)).astype("float32")
    patches = PatchSettings((8,), grid=(2, 8), pool_frames=(3,), pooling=pooling)
    clip = {"features": mel, "frame_shift_scale": np.float32(2), "clip_id": np.int64(0)}
    clips = tf.data.Dataset.from_tensors(clip)
    (found,) = make_tokens(clips, patches).as_numpy_iterator()
    windows = mel[:39].reshape(13, 3, 32)
    pooled = windows.max(1) if pooling == "max" else windows.mean(1)
    plain = PatchSettings((8,), grid=(2, 8))
    tokens, positions = patch_tokens(pooled, plain, frame_shift_scale=6.0)
    np.testing.assert_allclose(found["tokens"], tokens, atol=1e-6)
    np.testing.assert_array_equal(found["positions"], positions)


def test_evaluation_pools_by_a_fixed_factor_and_training_draws_one(waveforms):
    data = WaveformSource(waveforms)
    patches = PatchSettings((8,), grid=(2, 8), pool_frames=(1, 2, 4))
    clips = training_clips(data, FBANK, patches=patches, packing=PACKING).take(36)
    extents = [clip["positions"][0, 3] for clip in clips.as_numpy_iterator()]
    assert set(extents) == {0.5, 1.0, 2.0}
    fixed = patches.at((8,), pool_frames=2)
    tokens = clip_tokens(data, FBANK, fixed)[0]
    assert tokens.sum() < 0.7 * clip_tokens(data, FBANK, patches)[0].sum()
    seen = {}
    batches = evaluation_batches(data, FBANK, patches=fixed, packing=PACKING)
    for inputs, _, _, clip_ids in batches.as_numpy_iterator():
        for row, slot in np.argwhere(clip_ids >= 0):
            here = inputs["segment_ids"][row] == slot + 1
            assert (inputs["positions"][row][here][:, 3] == 1).all()
            seen[int(clip_ids[row, slot])] = here.sum()
    assert [seen[clip_id] for clip_id in range(12)] == tokens.tolist()
