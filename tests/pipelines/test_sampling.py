"""What is drawn how often: patch sizes by weight, for a clip or for several; rare classes."""

import dataclasses

import numpy as np
import pytest
import soundfile
import tensorflow as tf

from tf_data_pipelines import blocks
from tf_data_pipelines.blocks import training_blocks
from tf_data_pipelines.clips import sampling_weights
from tf_data_pipelines.draws import training_order
from tf_data_pipelines.pipeline import training_batches, training_clips
from tf_data_pipelines.prepare import prepare_data
from tf_data_pipelines.settings import (
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
    patch_sizes_along,
)
from tf_data_pipelines.sources import WaveformSource, read_data
from tf_data_pipelines.stages import make_tokens

FBANK = FbankSettings(mel_bins=32)
SIZES = PatchSettings((8, 16, (16, 12)), grid=(2, 8))
COUNTS = {"often": 24, "rare": 4, "seldom": 8}  # clips of each class
BALANCED = AugmentSettings(balanced=True)
PACKING = PackSettings(rows=2, row_length=64, segments=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise of 0.12 to 0.3 s in three classes, 16-bit WAV."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in COUNTS.items():
        (root / "sounds" / "train" / name).mkdir(parents=True)
        for number in range(count):
            noise = rng.normal(0, 0.1, rng.integers(2000, 5000))
            path = root / "sounds" / "train" / name / f"{number}.wav"
            soundfile.write(path, noise, 16000)
    prepare_data(root / "sounds", root / "shards", clips_per_shard=4)
    return root


@pytest.fixture(scope="module")
def sources(folder):
    return {
        "files": read_data(folder / "sounds", FBANK),
        "shards": read_data(folder / "shards", FBANK),
    }


def extents(clips):
    """Index of the patch size of each clip, which the extents tell."""
    index = {(0.5, 0.5): 0, (1.0, 1.0): 1, (1.0, 0.75): 2}
    return [index[tuple(clip["positions"][0, 2:].tolist())] for clip in clips]


def drawn(patches, count, *, frames=(20,), packing=None):
    """The patch sizes that the first training clips of 20 draw, whose lengths take turns."""
    frames = tf.constant(frames)

    def clip(place):
        size = frames[place % len(frames)]
        features = tf.ensure_shape(tf.zeros([size, 32]), [None, 32])
        drawing = {"place": place, "epoch": place // 20, "clip_id": place % 20}
        return {"features": features, "frame_shift_scale": 1.0, **drawing}

    clips = make_tokens(tf.data.Dataset.range(count).map(clip), patches, packing=packing)
    return extents(clips.as_numpy_iterator())


def test_sizes_come_as_often_as_their_weights_say():
    patches = dataclasses.replace(SIZES, patch_weights=(1, 5, 2))
    found = np.bincount(drawn(patches, 1000), minlength=3) / 1000
    np.testing.assert_allclose(found, [1 / 8, 5 / 8, 2 / 8], atol=0.04)
    np.testing.assert_allclose(patches.patch_shares, [1 / 8, 5 / 8, 2 / 8])
    np.testing.assert_allclose(np.bincount(drawn(SIZES, 1000)) / 1000, [1 / 3] * 3, atol=0.05)


def test_a_long_clip_draws_by_weight_from_what_fits():
    """148 frames are 76, 20 and 26 tokens."""
    patches = dataclasses.replace(SIZES, patch_weights=(1, 3, 1))
    found = drawn(patches, 400, frames=(148,), packing=PackSettings(1, 64, 1))
    found = np.bincount(found, minlength=3)
    assert found[0] == 0 and 270 < found[1] < 330


def test_consecutive_clips_share_a_size():
    for weights in ((), (1, 1, 2)):
        patches = dataclasses.replace(SIZES, clips_per_draw=4, patch_weights=weights)
        found = np.reshape(drawn(patches, 240), [60, 4])
        assert (found == found[:, :1]).all() and set(found[:, 0]) == {0, 1, 2}
        packing = PackSettings(1, 64, 4)
        mixed = np.reshape(drawn(patches, 240, frames=(148, 9, 9, 9), packing=packing), [60, 4])
        np.testing.assert_array_equal(mixed[:, 1:], found[:, 1:])
        long = mixed[:, 0]  # draws its own where the others have the first size
        assert (long != 0).all() and (long == found[:, 0])[found[:, 0] > 0].all()
        assert set(long[found[:, 0] == 0]) == {1, 2}


def test_training_clips_share_a_size_from_any_place():
    data = WaveformSource([np.zeros(3000 + 100 * number) for number in range(20)])
    patches = dataclasses.replace(SIZES, clips_per_draw=4)
    clips = training_clips(data, FBANK, patches=patches, start=(2,)).take(50)
    found = np.reshape(extents(clips.as_numpy_iterator())[2:], [12, 4])
    assert (found == found[:, :1]).all() and len(set(found[:, 0])) > 1


def test_sizes_along_an_axis():
    assert patch_sizes_along("both", (8, 24)) == ((8, 8), (24, 24))
    assert patch_sizes_along("time", (8, 24)) == ((16, 8), (16, 24))
    assert patch_sizes_along("frequency", (8, 24), base_patch=(4, 6)) == ((8, 6), (24, 6))
    with pytest.raises(ValueError, match=r"axis='freq' is unknown\. Choose one of 'both'"):
        patch_sizes_along("freq", (8,))


def test_settings_mistakes():
    for values, message in (
        ({"patch_weights": (1, 2)}, r"patch_weights=\(1, 2\) must be one positive number for"),
        ({"patch_weights": (1, 0, 2)}, "patch_weights=0 must be a positive number"),
        ({"clips_per_draw": 0}, "clips_per_draw=0 must be a whole number"),
        ({"pool_frames": (5,)}, "pool_frames=5 must be a whole number from 1 to 4"),
        ({"pool_frames": ()}, r"pool_frames=\(\) must be at least one number"),
        ({"pooling": "mean"}, "pooling='mean' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SIZES, **values)
    weighted = dataclasses.replace(SIZES, patch_weights=(1, 2, 3), pool_frames=(1, 3))
    assert PatchSettings.from_dict(weighted.to_dict()) == weighted
    fixed = weighted.at([24], 20.0, 2)
    assert (fixed.patch_sizes, fixed.frame_shifts_ms) == (((24, 24),), (20.0,))
    assert (fixed.patch_weights, fixed.pool_frames) == ((), (2,))


def test_settings_of_before_are_read():
    old = {"patch_sizes": [[8, 8]], "frame_shifts_ms": [], "remainder": "cover", "grid": [8, 64]}
    assert PatchSettings.from_dict(old) == PatchSettings((8,))
    assert AugmentSettings.from_dict({"gain_db": 3.0}) == AugmentSettings(3.0)
    with pytest.raises(ValueError, match="has no setting mixing"):
        AugmentSettings.from_dict({"mixing": 1})


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_rare_classes_come_as_often_as_others(sources, kind):
    def counts(augment):
        batches = training_batches(
            sources[kind], FBANK, patches=PatchSettings((16,), grid=(2, 8)), packing=PACKING,
            augment=augment,
        )  # fmt: skip
        labels = [labels[weights > 0] for _, labels, weights in batches.take(60)]
        found = np.bincount(np.concatenate(labels), minlength=3)
        return found / found.sum()

    np.testing.assert_allclose(counts(BALANCED), [1 / 3] * 3, atol=0.04)
    np.testing.assert_allclose(counts(None), [24 / 36, 4 / 36, 8 / 36], atol=0.04)


def test_a_clip_that_comes_twice_draws_twice(sources):
    for data in sources.values():
        clips = training_clips(
            data, FBANK, patches=PatchSettings((16,), grid=(2, 8)),
            augment=AugmentSettings(balanced=True, freq_mask=16),
        ).take(36)  # fmt: skip
        found = [(c["clip_id"], c["tokens"].tobytes()) for c in clips.as_numpy_iterator()]
        ids = [clip_id for clip_id, _ in found]
        assert 12 < len(set(ids)) < 30 and len(set(found)) > len(set(ids)) + 5


WEIGHTS = [0, 3, 1, 1, 9, 0, 6, 0]


def test_an_epoch_has_each_clip_as_often_as_its_share(sources):
    order = list(training_order(8, 5, weights=WEIGHTS).take(80).as_numpy_iterator())
    for epoch in range(10):
        ids = [one["clip_id"] for one in order[8 * epoch : 8 * epoch + 8]]
        counts = np.bincount(ids, minlength=8)
        assert (np.abs(counts - np.multiply(WEIGHTS, 8 / 20)) < 1).all()
    counts = np.bincount([one["clip_id"] for one in order], minlength=8)
    np.testing.assert_allclose(counts, np.multiply(WEIGHTS, 80 / 20), atol=2)
    later = training_order(8, 5, 27, WEIGHTS).take(9).as_numpy_iterator()
    assert list(later) == order[27:36]


@pytest.mark.parametrize("block_bytes", [1, 100_000, 2**26])
def test_blocks_have_each_clip_as_often_as_its_share(sources, monkeypatch, block_bytes):
    """Also where a block has no clip to give; and each clip's partner is of its block."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    clips = sources["shards"].source.clips
    weights = np.r_[np.zeros(9), np.linspace(1, 5, 27)]
    how = {"weights": weights, "partners": True}
    order = list(training_blocks(clips, 5, **how).take(108).as_numpy_iterator())
    assert [one["place"] for one in order] == list(range(108))
    for epoch in range(3):
        ids = [one["clip_id"] for one in order[36 * epoch : 36 * epoch + 36]]
        counts = np.bincount(ids, minlength=36)
        assert (np.abs(counts - weights * 36 / weights.sum()) < 1).all()
    records = {one["clip_id"]: one["record"] for one in order}
    partners = [(one["partner"], one["partner_record"]) for one in order]
    assert all(records.get(clip_id, record) == record for clip_id, record in partners)
    assert len({clip_id for clip_id, _ in partners}) > 15
    if block_bytes == 1:
        assert all(clips.shard[one["partner"]] == clips.shard[one["clip_id"]] for one in order)
    for start in (1, 36, 77):
        later = training_blocks(clips, 5, start, **how).take(9).as_numpy_iterator()
        assert list(later) == order[start : start + 9]


def test_weights_by_hand(sources):
    for data in sources.values():
        found = sampling_weights(data.source.clips)
        labels = data.source.targets()
        expected = [1000 / (COUNTS[data.source.classes[label]] + 0.01) for label in labels]
        np.testing.assert_allclose(found, expected)
    source = sources["files"].source
    several = [
        dataclasses.replace(clip, labels=(0, 2) if number == 0 else clip.labels)
        for number, clip in enumerate(source.clips)
    ]
    several = dataclasses.replace(source, clips=tuple(several), multi_label=True)
    assert sampling_weights(several.clips)[0] == pytest.approx(1000 / 24.01 + 1000 / 9.01)
    own = [dataclasses.replace(clip, weight=float(n)) for n, clip in enumerate(source.clips)]
    own = dataclasses.replace(source, clips=tuple(own))
    np.testing.assert_array_equal(sampling_weights(own.clips), np.arange(36))
    none = [dataclasses.replace(clip, weight=0.0) for clip in source.clips]
    with pytest.raises(ValueError, match="balanced=True must have a clip of a weight above 0"):
        sampling_weights(tuple(none))


MIX = AugmentSettings(mixup=0.5, balanced=True)


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_the_labels_of_mixed_clips_are_shares(sources, kind):
    patches = PatchSettings((16,), grid=(2, 8))
    batches = training_batches(sources[kind], FBANK, patches=patches, packing=PACKING, augment=MIX)
    assert batches.element_spec[1] == tf.TensorSpec([2, 4, 3], tf.float32)
    found = list(batches.take(12).as_numpy_iterator())
    labels = np.concatenate([labels[weights > 0] for _, labels, weights in found])
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    hard = np.isin(labels, (0, 1)).all(-1)
    assert 0.1 < np.mean(~hard) < 0.5  # of the mixed half, some meet their own class
    assert set(labels[hard].argmax(-1)) == {0, 1, 2} and labels[~hard].max(-1).min() > 0.4
    empty = np.concatenate([labels[weights == 0] for _, labels, weights in found])
    assert not empty.any()
