"""A teacher hears the clip that the student hears, in the same slot of a row of its own."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines.distillation import TeacherTokens
from tf_data_pipelines.lengths import batches_per_epoch
from tf_data_pipelines.packing import pack
from tf_data_pipelines.pipeline import training_batches
from tf_data_pipelines.settings import (
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
)
from tf_data_pipelines.sources import WaveformSource

LENGTHS = (53, 71)  # of the rows of student and teacher
FBANK = FbankSettings(mel_bins=32, mean=-5.0, std=3.0)
PATCHES = PatchSettings((8, 16), grid=(2, 8))
PACKING = PackSettings(rows=2, row_length=128, segments=5)
AUGMENT = AugmentSettings(6.0, freq_mask=9, time_mask_ms=90.0, fill_ms=100.0)


def packed(clips, **settings):
    """Rows of clips of two random lengths each, whose tokens tell the clip and the place."""
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(1, most // 2, clips) for most in LENGTHS])
    lengths[:, clips // 2] = LENGTHS  # a clip may fill both

    def clip(clip_id):
        columns = {"label": tf.cast(clip_id, tf.int32), "clip_id": clip_id}
        for number, prefix in enumerate(("", "teacher_")):
            index = tf.cast(tf.range(tf.gather(lengths[number], clip_id)), tf.float32)
            tokens = tf.stack([tf.cast(clip_id, tf.float32) + 0 * index, index], -1)
            columns |= {f"{prefix}tokens": tokens, f"{prefix}positions": -tokens}
        return columns

    settings = PackSettings(row_length=LENGTHS[0], **settings)
    rows = pack(tf.data.Dataset.range(clips).map(clip), settings, {"teacher": LENGTHS[1]})
    return lengths, list(rows.as_numpy_iterator())


def test_both_rows_have_each_clip_whole_and_in_one_slot():
    lengths, rows = packed(97, segments=7)
    seen = []
    for row in rows:
        ids = row["clip_ids"][row["clip_ids"] >= 0]
        seen += ids.tolist()
        for number, prefix in enumerate(("", "teacher_")):
            segment_ids = row[f"{prefix}segment_ids"]
            expected = np.repeat(np.arange(1, len(ids) + 1), lengths[number, ids])
            np.testing.assert_array_equal(segment_ids[: len(expected)], expected)
            assert len(segment_ids) == LENGTHS[number] and not segment_ids[len(expected) :].any()
            for slot, clip_id in enumerate(ids, 1):
                tokens = row[f"{prefix}tokens"][segment_ids == slot]
                np.testing.assert_array_equal(tokens[:, 0], clip_id)
                np.testing.assert_array_equal(tokens[:, 1], np.arange(lengths[number, clip_id]))
            np.testing.assert_array_equal(row[f"{prefix}positions"], -row[f"{prefix}tokens"])
    assert sorted(seen) == list(range(97))
    for name in ("segment_ids", "teacher_segment_ids"):
        assert np.mean([row[name] > 0 for row in rows]) > 0.8


def test_a_clip_too_long_for_the_teachers_row_is_named():
    clips = tf.data.Dataset.from_tensors(
        {
            "tokens": tf.ones([3, 2]), "positions": tf.ones([3, 4]), "label": 0, "clip_id": 5,
            "teacher_tokens": tf.ones([9, 2]), "teacher_positions": tf.ones([9, 4]),
        }
    ).map(lambda clip: {**clip, "clip_id": tf.cast(clip["clip_id"], tf.int64)})  # fmt: skip
    rows = pack(clips, PackSettings(row_length=10), {"teacher": 8})
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"teacher_tokens, more than the row"):
        list(rows)
    with pytest.raises(ValueError, match="'teacher_length', a name that the packer uses itself"):
        column = clips.map(lambda clip: {**clip, "teacher_length": 1})
        pack(column, PackSettings(row_length=10), {"teacher": 8})


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(1)
    samples = rng.integers(2000, 12000, 23)
    return WaveformSource([rng.normal(0, 0.1, n).astype("float32") for n in samples], 16000)


def batches(data, count=3, **how):
    how = {"patches": PATCHES, "packing": PACKING, "augment": AUGMENT, **how}
    dataset = training_batches(data, FBANK, seed=3, **how)
    return list(dataset.take(count).as_numpy_iterator())


def one_size(size, **front_end):
    patches = dataclasses.replace(PATCHES, patch_sizes=(size,))
    return TeacherTokens(dataclasses.replace(FBANK, **front_end), patches, row_length=64)


def test_a_teacher_like_the_student_hears_the_same_numbers(data):
    """The same crop, gain, silence and masks; at one patch size the tokens are the same."""
    how = {"patches": one_size(16).patches, "teacher": one_size(16)}
    for inputs, _, _ in batches(data, **how):
        assert inputs["segment_ids"].any()
        for name in ("tokens", "positions", "segment_ids"):
            ours, theirs = inputs[name], inputs[f"teacher_{name}"]
            np.testing.assert_array_equal(theirs, ours[:, :64])
            assert not ours[:, 64:].any()


def test_a_teacher_hears_with_its_own_mean_and_deviation(data):
    patches = one_size(16).patches
    teacher = one_size(16, mean=-3.5, std=2.0)
    for inputs, _, _ in batches(data, patches=patches, teacher=teacher):
        inside = inputs["teacher_segment_ids"] > 0
        log_mel = inputs["tokens"][:, :64][inside] * 2 * FBANK.std + FBANK.mean
        found = inputs["teacher_tokens"][inside]
        np.testing.assert_allclose(found, (log_mel + 3.5) / 4, rtol=0, atol=1e-5)


def test_the_teacher_has_its_own_size_and_the_students_draws_stay(data):
    def clips(inputs, prefix=""):
        """The tokens of each clip, as bytes."""
        ids, tokens = (inputs[f"{prefix}{name}"] for name in ("segment_ids", "tokens"))
        return [tokens[row][ids[row] == k].tobytes() for row in range(2) for k in range(1, 6)]

    alone = {clip for inputs, _, _ in batches(data, 9) for clip in clips(inputs)}
    small = {
        clip
        for inputs, _, _ in batches(data, 3, teacher=one_size((32, 4)))
        for clip in clips(inputs, "teacher_")
    }
    for inputs, _, weights in batches(data, 3, teacher=one_size((16, 4))):
        ours, theirs = clips(inputs), clips(inputs, "teacher_")
        assert [len(one) > 0 for one in ours] == (weights > 0).ravel().tolist()
        assert [len(one) > 0 for one in theirs] == (weights > 0).ravel().tolist()
        assert {*ours} - {b""} <= alone
        assert not {*theirs} & (alone | small) - {b""}


def test_a_teaching_begins_at_any_batch(data):
    teacher = one_size((32, 4))
    whole = batches(data, 9, teacher=teacher)
    later = batches(data, 4, teacher=teacher, start=5)
    for ours, theirs in zip(whole[5:], later, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, theirs, ours)


def test_a_teacher_has_one_patch_size():
    with pytest.raises(ValueError, match=r"patch_sizes=\(\(8, 8\), \(16, 16\)\) must be one size"):
        TeacherTokens(FBANK, PATCHES, row_length=64)


def test_an_epoch_has_all_clips_also_where_the_teachers_rows_are_the_narrow_ones():
    clips = WaveformSource([np.zeros(8000, "float32")] * 40)
    teacher = TeacherTokens(FBANK, dataclasses.replace(PATCHES, patch_sizes=((8, 8),)), 64)
    how = {"patches": dataclasses.replace(PATCHES, patch_sizes=((16, 16),)), "packing": PACKING}
    alone, taught = (batches_per_epoch(clips, FBANK, teacher=one, **how) for one in (None, teacher))
    # 48 frames: 6 columns of 4 patches of the teacher's, so 2 clips in a row of 64.
    assert alone == 4 and taught == 40 * 24 / (2 * 64) + 0.5
