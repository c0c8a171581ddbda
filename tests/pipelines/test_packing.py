"""Every clip in exactly one row, whole and in its own slot, soon; rows that are nearly full."""

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines.packing import ARRIVALS, _subsets, batch_rows, pack
from tf_data_pipelines.settings import PackSettings

WIDTH = 3
LENGTH = 53


def lengths_of(clips, seed=3):
    """Random lengths, of one token and of a full row included."""
    lengths = np.random.default_rng(seed).integers(1, LENGTH // 2, clips)
    lengths[[0, clips // 2, clips - 1]] = 1, LENGTH, LENGTH
    return lengths


def clips_of(lengths, classes=0):
    """Clips whose numbers tell where they come from; a graph without Python in it."""
    lengths = tf.constant(lengths, tf.int32)

    def clip(clip_id):
        index = tf.cast(tf.range(lengths[clip_id]), tf.float32)
        place = tf.cast(clip_id, tf.float32) + 0 * index
        label = tf.cast(clip_id % 11, tf.int32)
        return {
            "tokens": tf.stack([place, index, place + 1000 * index], -1),
            "positions": tf.stack([place + 0.5, -index, index * index, place - index], -1),
            "label": tf.one_hot([clip_id % classes], classes)[0] if classes else label,
            "clip_id": clip_id,
        }

    return tf.data.Dataset.range(len(lengths)).map(clip)


def rows_of(lengths, settings):
    return list(pack(clips_of(lengths), settings).as_numpy_iterator())


def fill_of(rows):
    return np.mean([np.mean(row["segment_ids"] > 0) for row in rows])


@pytest.mark.parametrize(("segments", "buffer_size"), [(1, 1), (1, 7), (13, 1), (13, 41), (4, 113)])
def test_every_clip_is_once_and_whole(buffer_size, segments):
    lengths = lengths_of(97)
    settings = PackSettings(row_length=LENGTH, segments=segments, buffer_size=buffer_size)
    rows = rows_of(lengths, settings)
    seen = []
    for row in rows:
        ids, segment_ids = row["clip_ids"], row["segment_ids"]
        count = np.sum(ids >= 0)
        assert 1 <= count <= segments
        used = np.sum(lengths[ids[:count]])
        np.testing.assert_array_equal(ids[count:], -1)
        np.testing.assert_array_equal(row["labels"], np.where(ids >= 0, ids % 11, 0))
        np.testing.assert_array_equal(row["weights"], ids >= 0)
        # 1, 1, ..., 2, 2, ... without a gap, then 0.
        np.testing.assert_array_equal(
            segment_ids,
            np.pad(np.repeat(np.arange(1, count + 1), lengths[ids[:count]]), (0, LENGTH - used)),
        )
        for slot, clip_id in enumerate(ids[:count]):
            inside = segment_ids == slot + 1
            index = np.arange(lengths[clip_id])
            place = clip_id + 0.0 * index
            np.testing.assert_array_equal(
                row["tokens"][inside], np.stack([place, index, place + 1000 * index], -1)
            )
            np.testing.assert_array_equal(
                row["positions"][inside],
                np.stack([place + 0.5, -index, index * index, place - index], -1),
            )
        assert not row["tokens"][used:].any() and not row["positions"][used:].any()
        seen += ids[:count].tolist()
    assert sorted(seen) == list(range(97))
    assert sum(row["weights"].sum() for row in rows) == 97


def found_ids(rows):
    return [row["clip_ids"][row["clip_ids"] >= 0].tolist() for row in rows]


def test_best_subset_by_hand():
    """Rows of 10: 5 + 3 + 2, not 5 + 4, which came first; 4 + 6; the 9, too late for a 1."""
    rows = rows_of([5, 4, 3, 2, 6, 9], PackSettings(row_length=10, segments=3, buffer_size=6))
    assert found_ids(rows) == [[0, 2, 3], [1, 4], [5]]


def test_equal_clips_stay_in_order():
    rows = rows_of(np.full(90, 17), PackSettings(row_length=LENGTH))
    assert found_ids(rows) == np.arange(90).reshape(30, 3).tolist()


def test_no_clip_waits_for_long():
    """Each row takes the oldest, so a clip that arrives with n before it leaves in n + 1 rows.

    n is under buffer_size + ARRIVALS, for a row is chosen as soon as `buffer_size` clips wait.
    """
    settings = PackSettings(row_length=LENGTH, segments=5, buffer_size=11)
    lengths = np.random.default_rng(5).integers(1, LENGTH + 1, 400)
    left = list(range(400))
    for ids in found_ids(rows_of(lengths, settings)):
        assert ids[0] == left[0] and ids == sorted(ids)
        assert set(ids) <= set(left[: settings.buffer_size])
        left = [clip_id for clip_id in left if clip_id not in ids]
    assert not left


def test_a_row_knows_only_the_clips_that_waited():
    settings = PackSettings(row_length=LENGTH, segments=5, buffer_size=11)
    lengths = np.random.default_rng(5).integers(1, LENGTH + 1, 200)
    whole = found_ids(rows_of(lengths, settings))
    for clips in (19, 64, 177):
        rows = found_ids(rows_of(lengths[:clips], settings))
        waiting = clips - np.cumsum([0, *map(len, rows)])
        before_the_end = np.sum(waiting >= settings.buffer_size)
        assert before_the_end > 0 and rows[:before_the_end] == whole[:before_the_end]


def test_empty_clips_have_their_slots():
    lengths = np.array([0, 30, 0, LENGTH, 0, 0, 23, 0])
    rows = rows_of(lengths, PackSettings(row_length=LENGTH, segments=3))
    assert sorted(clip_id for ids in found_ids(rows) for clip_id in ids) == list(range(8))
    for row in rows:
        counts = np.bincount(row["segment_ids"], minlength=4)[1:]
        ids = row["clip_ids"]
        np.testing.assert_array_equal(counts, np.where(ids >= 0, lengths[ids], 0))
        np.testing.assert_array_equal(row["weights"], ids >= 0)
    assert len(rows_of(np.zeros(40, int), PackSettings(row_length=LENGTH))) == 3


def speech_lengths(clips, seed):
    """Tokens of clips of 4 to 30 s, half of them under 7 s, as VoxCeleb's; none under 192."""
    seconds = np.random.default_rng(seed).lognormal(np.log(7), 0.5, clips).clip(4, 30)
    return 8 * ((1 + (16000 * seconds - 400).astype(int) // 160) // 16)


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_of_speech_are_full(seed):
    lengths = speech_lengths(900, seed)
    rows = rows_of(lengths, PackSettings(row_length=2048))
    assert fill_of(rows[:-8]) > 0.995  # without the last rows, of what was left over
    assert len(rows) <= -(-lengths.sum() // 2048) + 1


def test_more_waiting_clips_raise_the_fill():
    lengths = np.random.default_rng(1).integers(1, 40, 400)
    fills = [
        fill_of(rows_of(lengths, PackSettings(row_length=LENGTH, segments=6, buffer_size=n))[:120])
        for n in (6, 12, 48)
    ]
    assert fills[0] < fills[1] < fills[2] and fills[2] > 0.99


def test_an_endless_dataset_gives_rows():
    clips = clips_of(lengths_of(7)).repeat()
    settings = PackSettings(rows=2, row_length=LENGTH, segments=5, buffer_size=5)
    batches = batch_rows(pack(clips, settings), settings, partial=False)
    batches = list(batches.take(9).as_numpy_iterator())
    assert len(batches) == 9
    ids = np.concatenate([batch["clip_ids"].ravel() for batch in batches])
    counts = np.bincount(ids[ids >= 0], minlength=7)
    held = settings.buffer_size + ARRIVALS  # not out yet
    assert counts.max() - counts.min() <= 1 + -(-held // 7)


def test_multi_label_targets():
    settings = PackSettings(row_length=LENGTH, segments=4)
    rows = pack(clips_of(lengths_of(31), classes=5), settings)
    assert rows.element_spec["labels"] == tf.TensorSpec([4, 5], tf.float32)
    targets = np.concatenate([np.eye(5, dtype="float32"), np.zeros([1, 5], "float32")])
    for row in rows.as_numpy_iterator():
        index = np.where(row["clip_ids"] >= 0, row["clip_ids"] % 5, 5)
        np.testing.assert_array_equal(row["labels"], targets[index])


def with_columns(lengths):
    """Clips with a matrix and a number that tell which clip they belong to."""

    def add(clip):
        place = tf.cast(clip["clip_id"], tf.float32)
        scores = place + tf.reshape(tf.range(6.0) / 8, [2, 3])
        return {**clip, "scores": scores, "fold": clip["clip_id"] % 7 + 1}

    return clips_of(lengths).map(add)


def test_further_columns_travel_in_the_slots():
    settings = PackSettings(rows=4, row_length=LENGTH, segments=5)
    rows = pack(with_columns(lengths_of(61)), settings)
    assert rows.element_spec["scores"] == tf.TensorSpec([5, 2, 3], tf.float32)
    assert rows.element_spec["fold"] == tf.TensorSpec([5], tf.int64)
    for row in batch_rows(rows, settings).unbatch().as_numpy_iterator():
        ids = row["clip_ids"]
        expected = np.where(ids >= 0, ids, 0)[:, None, None] + np.arange(6.0).reshape(2, 3) / 8
        expected[ids < 0] = 0
        np.testing.assert_array_equal(row["scores"], expected)
        np.testing.assert_array_equal(row["fold"], np.where(ids >= 0, ids % 7 + 1, 0))


def test_columns_do_not_change_the_rows():
    settings = PackSettings(row_length=LENGTH, segments=5)
    rows = pack(with_columns(lengths_of(61)), settings).as_numpy_iterator()
    for row, plain in zip(rows, rows_of(lengths_of(61), settings), strict=True):
        for name in plain:
            np.testing.assert_array_equal(row[name], plain[name])


def test_a_weight_of_the_clip_is_the_weight_of_its_slot():
    def weigh(clip):
        return {**clip, "weight": 0.5 + tf.cast(clip["clip_id"], tf.float32)}

    settings = PackSettings(row_length=LENGTH, segments=5)
    rows = pack(clips_of(lengths_of(31)).map(weigh), settings)
    assert "weight" not in rows.element_spec
    for row in rows.as_numpy_iterator():
        ids = row["clip_ids"]
        np.testing.assert_array_equal(row["weights"], np.where(ids >= 0, ids + 0.5, 0))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"weights": 1.0}, "column 'weights', a name that the packer uses itself"),
        ({"length": 1}, "column 'length', a name"),
        ({"word": "yes"}, "column 'word' has dtype string"),
        ({"weight": [1.0, 2.0]}, r"column 'weight' has dtype float32 and shape \(2,\)"),
        ({"weight": 1}, "column 'weight' has dtype int32"),
    ],
)
def test_columns_that_cannot_travel_are_named(column, message):
    clips = clips_of([5]).map(lambda clip: {**clip, **column})
    with pytest.raises(ValueError, match=message):
        pack(clips, PackSettings(row_length=LENGTH))
    loose = clips_of([5]).map(lambda clip: {**clip, "sound": clip["tokens"][:, 0]})
    with pytest.raises(ValueError, match=r"'sound' has .*static shape, the same for every clip"):
        pack(loose, PackSettings(row_length=LENGTH))


def best_rows(lengths, settings):
    """The packer's rows in plain Python, clip by clip: lists of clip ids."""
    subsets = [np.flatnonzero(row) for row in _subsets(settings.buffer_size, settings.segments)]
    rows, waiting, arrived = [], [], 0
    while arrived < len(lengths) or waiting:
        coming = list(range(arrived, min(arrived + ARRIVALS, len(lengths))))
        arrived += len(coming)
        waiting += coming
        while waiting and (len(waiting) >= settings.buffer_size or not coming):
            tried = [[waiting[i] for i in subset if i < len(waiting)] for subset in subsets]
            sums = [sum(lengths[clip] for clip in chosen) for chosen in tried]
            fits = [total if total <= settings.row_length else -1 for total in sums]
            rows.append(tried[int(np.argmax(fits))])
            waiting = [clip for clip in waiting if clip not in rows[-1]]
    return rows


@pytest.mark.parametrize(("segments", "buffer_size"), [(3, 5), (6, 17)])
def test_rows_are_those_of_the_rule(segments, buffer_size):
    lengths = [int(length) for length in lengths_of(83)]
    settings = PackSettings(row_length=LENGTH, segments=segments, buffer_size=buffer_size)
    assert found_ids(rows_of(lengths, settings)) == best_rows(lengths, settings)


def test_a_clip_that_is_too_long_is_named():
    rows = pack(clips_of([5, 54, 7]), PackSettings(row_length=LENGTH))
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        list(rows)
    words = " ".join(str(error.value).replace("[", " ").replace("]", " ").split())
    assert "clip 1 has 54 tokens, more than the row length 53" in words
    assert "Raise row_length" in words


def test_nothing_gives_no_rows():
    assert rows_of(np.zeros([0], int), PackSettings()) == []


def test_static_shapes():
    settings = PackSettings(rows=6, row_length=LENGTH, segments=4)
    rows = pack(clips_of(lengths_of(9)), settings)
    expected = {
        "tokens": tf.TensorSpec([LENGTH, WIDTH], tf.float32),
        "positions": tf.TensorSpec([LENGTH, 4], tf.float32),
        "segment_ids": tf.TensorSpec([LENGTH], tf.int32),
        "labels": tf.TensorSpec([4], tf.int32),
        "weights": tf.TensorSpec([4], tf.float32),
        "clip_ids": tf.TensorSpec([4], tf.int64),
    }
    assert rows.element_spec == expected
    for partial in (True, False):
        for name, spec in batch_rows(rows, settings, partial).element_spec.items():
            assert spec == tf.TensorSpec([6, *expected[name].shape], expected[name].dtype)


def test_the_last_batch_is_filled_up_or_dropped():
    lengths = np.full(20, LENGTH)  # 20 rows
    settings = PackSettings(rows=8, row_length=LENGTH, segments=3)
    rows = pack(clips_of(lengths), settings)
    padded = list(batch_rows(rows, settings).as_numpy_iterator())
    assert len(padded) == 3 and len(list(batch_rows(rows, settings, partial=False))) == 2
    together = {name: np.concatenate([b[name] for b in padded]) for name in padded[0]}
    assert together["tokens"].shape == (24, LENGTH, WIDTH)
    assert together["weights"].sum() == 20
    np.testing.assert_array_equal(together["clip_ids"][20:], -1)
    for name in ("tokens", "positions", "segment_ids", "labels", "weights"):
        assert not together[name][20:].any(), name


def test_same_seed_same_rows():
    def rows(seed):
        clips = clips_of(lengths_of(61)).shuffle(61, seed)
        packed = pack(clips, PackSettings(row_length=LENGTH, segments=9))
        return np.stack([row["clip_ids"] for row in packed.as_numpy_iterator()])

    first = rows(1)
    np.testing.assert_array_equal(first, rows(1))
    other = rows(2)
    assert first.shape != other.shape or (first != other).any()


def operations(function):
    """Names of every operation in a function's graph and in all that it calls."""
    graph = tf.function(function).get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    return {node.op for node in nodes}


def test_the_packer_is_a_pure_graph():
    settings = PackSettings(rows=2, row_length=LENGTH, segments=5)

    def tokens():
        batches = batch_rows(pack(clips_of(lengths_of(9)), settings), settings)
        return batches.reduce(0.0, lambda total, batch: total + tf.reduce_sum(batch["tokens"]))

    def with_python():
        clips = tf.data.Dataset.range(3)
        clips = clips.map(lambda i: tf.numpy_function(lambda i: i, [i], tf.int64))
        return clips.reduce(tf.constant(0, tf.int64), lambda total, i: total + i)

    assert "ScanDataset" in operations(tokens)
    assert not {name for name in operations(tokens) if "PyFunc" in name}
    assert {name for name in operations(with_python) if "PyFunc" in name}


def test_tf_data_service_workers_lose_no_clip():
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    config = service.WorkerConfig(dispatcher.target.split("://")[1], heartbeat_interval_ms=100)
    workers = [service.WorkerServer(config) for _ in range(2)]
    lengths = lengths_of(400)
    rows = pack(clips_of(lengths), PackSettings(row_length=LENGTH, segments=5))
    rows = rows.apply(service.distribute("distributed_epoch", dispatcher.target))
    ids = found_ids(rows.as_numpy_iterator())
    assert sorted(clip_id for row in ids for clip_id in row) == list(range(400))
    del workers


def test_an_iterator_resumes(tmp_path):
    rows = pack(clips_of(lengths_of(150)), PackSettings(row_length=LENGTH, segments=5))
    iterator = iter(rows)
    for _ in range(9):
        next(iterator)
    path = tf.train.Checkpoint(iterator=iterator).save(tmp_path / "rows")
    resumed = iter(rows)
    tf.train.Checkpoint(iterator=resumed).restore(path)
    for row in iterator:
        other = next(resumed)
        for name in row:
            np.testing.assert_array_equal(row[name], other[name])
    assert next(resumed, None) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": 0}, "rows=0 must be a positive number"),
        ({"row_length": 25.5}, r"row_length=25\.5 must be"),
        ({"segments": True}, "segments=True must be"),
        ({"buffer_size": 0}, "buffer_size=0 must be a positive number"),
        ({"overlong": "split"}, "overlong='split' is unknown. Choose one of 'error', 'crop'"),
    ],
)
def test_settings_mistakes(values, message):
    with pytest.raises(ValueError, match=message):
        PackSettings(**values)
