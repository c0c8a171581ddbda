"""Streaming packer: clips of any length become dense rows, inside the TensorFlow graph.

clips        [a a a] [b b]
tokens        a a a b b .
segment_ids   1 1 1 2 2 0
"""

import numpy as np
import tensorflow as tf

SUBSETS = 4096  # compared for a row; a quarter of them leaves 0.2 % more of it empty
ARRIVALS = 16  # clips taken in at a time; one at a time costs three times as much


def pack(clips, settings, label_shape=(), label_dtype=tf.int32):
    """Pack clips into rows, each the best of thousands of subsets of the waiting clips.

    A row takes the clip that has waited longest, and of the `settings.buffer_size` oldest those
    that fill it best: the subsets tried are drawn once, and the same for every row. So no
    clip waits for more than buffer_size + ARRIVALS rows, and a dataset is packed the same way
    every time. Clips keep their content whole; their order changes, which is why `clip_ids`
    come along. At most buffer_size + ARRIVALS clips are held, but for what tf.data prefetches.

    Args:
        clips: finite or endless tf.data.Dataset of dictionaries with `tokens` float32
            (n, width), `positions` float32 (n, 4), `label` (label_shape) and `clip_id`
            int64 (); n at most settings.row_length.
        settings: PackSettings.
        label_shape: () for one class index a clip, (classes,) for multi-label targets.
        label_dtype: dtype of the labels.

    Returns:
        Dataset of rows, dictionaries with
            tokens       float32 (row_length, width)
            positions    float32 (row_length, 4)
            segment_ids  int32 (row_length,), 1, 2, ... per clip, 0 for padding
            labels       (segments, *label_shape)
            weights      float32 (segments,), 1 for a clip, 0 for an empty slot
            clip_ids     int64 (segments,), -1 for an empty slot
        Every clip is in exactly one row, those of a finite dataset's last rows included.

    Raises:
        InvalidArgumentError (while iterating): a clip has more tokens than a row.
    """
    width = clips.element_spec["tokens"].shape[-1]
    packer = _Packer(settings, width, tuple(label_shape), label_dtype)
    arrivals = clips.map(packer.hold).batch(ARRIVALS)
    # Any one element after the clips; a source that tf.data service does not split, so that
    # every worker has its own end.
    end = tf.data.Dataset.random(0).take(1).map(lambda _: packer.no_clips())
    with tf.device("CPU"):  # made at once, where a GPU could take it
        start = packer.start()
    rows = arrivals.concatenate(end).scan(start, packer.step).unbatch()
    return rows.map(packer.fill)


def batch_rows(rows, settings, partial=True):
    """Batch rows to (rows, ...); the last, partial batch is filled up with empty rows.

    Args:
        rows: Dataset from `pack`.
        settings: PackSettings.
        partial: keep the last batch when it is not full; False drops it.
    """
    batches = rows.batch(settings.rows, drop_remainder=not partial)
    if not partial:
        return batches

    def fill(name, value):
        missing = settings.rows - tf.shape(value)[0]
        padding = [[0, missing]] + [[0, 0]] * (value.shape.rank - 1)
        value = tf.pad(value, padding, constant_values=-1 if name == "clip_ids" else 0)
        return tf.ensure_shape(value, [settings.rows, *value.shape[1:]])

    return batches.map(lambda batch: {name: fill(name, batch[name]) for name in batch})


class _Packer:
    """Chooses rows from the waiting clips, which `tf.data.Dataset.scan` carries along.

    What waits is one handle a clip, a variant that refers to its tokens: choosing moves
    handles, and a clip's tokens are copied once, into their row. The first of the waiting
    is a blank, without tokens, for the slots that stay empty.
    """

    def __init__(self, settings, width, label_shape, label_dtype):
        self.row_length, self.segments = settings.row_length, settings.segments
        self.buffer_size = max(settings.buffer_size, settings.segments)
        self.subsets = _subsets(self.buffer_size, self.segments)
        self.widths = {"tokens": width, "positions": 4}
        self.label_shape = label_shape
        self.label_dtype = label_dtype

    def hold(self, clip):
        handles = {name: _handle(clip[name]) for name in self.widths}
        length = tf.shape(clip["tokens"])[0]
        return {**handles, "length": length, "label": clip["label"], "clip_id": clip["clip_id"]}

    def start(self):
        blank = {name: tf.zeros([0, width]) for name, width in self.widths.items()}
        blank["label"] = tf.zeros(self.label_shape, self.label_dtype)
        blank["clip_id"] = tf.constant(-1, tf.int64)
        return {name: value[None] for name, value in self.hold(blank).items()}

    def no_clips(self):
        """Arrivals without a clip: the sign that all have arrived."""
        return {name: value[:0] for name, value in self.start().items()}

    def step(self, held, arrivals):
        """The clips that stay, blank first, and the rows (rows, segments) of handles."""
        last = tf.size(arrivals["length"]) == 0
        held = _join(held, arrivals)
        with tf.control_dependencies([self._check(held)]):
            order = tf.range(1, tf.size(held["length"]))
        # 0 is the blank: the order always has `buffer_size` clips, real ones first.
        order = tf.pad(order, [[0, self.buffer_size]])
        lengths = tf.cast(held["length"], tf.float32)
        enough = tf.where(last, 1, self.buffer_size)

        def a_row(order, rows):
            oldest = order[: self.buffer_size]
            sums = tf.linalg.matvec(self.subsets, tf.gather(lengths, oldest))
            best = tf.argmax(tf.where(sums <= self.row_length, sums, -1.0))
            # Equal values keep their order: the chosen clips by age, then the others.
            chosen, by_choice = tf.math.top_k(tf.gather(self.subsets, best), self.buffer_size)
            oldest, chosen = tf.gather(oldest, by_choice), tf.cast(chosen, tf.int32)
            count = tf.reduce_sum(chosen)
            left = [oldest[count:], order[self.buffer_size :], tf.zeros([count], tf.int32)]
            return tf.concat(left, 0), rows.write(rows.size(), oldest * chosen)

        rows = tf.TensorArray(tf.int32, 0, dynamic_size=True, element_shape=[self.buffer_size])
        order, rows = tf.while_loop(
            lambda order, rows: order[enough - 1] > 0,
            a_row,
            (order, rows),
            shape_invariants=(tf.TensorShape([None]), None),
        )
        rows = rows.stack()[:, : self.segments]
        order = order[: tf.math.count_nonzero(order)]
        stay = tf.pad(order, [[1, 0]])
        return _take(held, stay), _take(held, rows)

    def fill(self, row):
        """A row's handles as its tokens, padded, with static shapes."""
        length, segments = self.row_length, self.segments
        ends = tf.cumsum(row["length"])
        # A place's segment is the number of clips that end before it, and 1.
        segment_ids = 1 + tf.searchsorted(ends, tf.range(length), side="right")
        filled = {
            "segment_ids": segment_ids % (segments + 1),  # after the last slot: padding
            "labels": tf.ensure_shape(row["label"], [segments, *self.label_shape]),
            "weights": tf.cast(row["clip_id"] >= 0, tf.float32),
            "clip_ids": row["clip_id"],
        }
        for name, width in self.widths.items():
            padding = _handle(tf.zeros([length - ends[-1], width]))
            content = tf.raw_ops.RaggedTensorFromVariant(
                encoded_ragged=tf.stack([*tf.unstack(row[name]), padding]),
                input_ragged_rank=0,
                output_ragged_rank=1,
                Tvalues=tf.float32,
                Tsplits=tf.int64,
            ).output_dense_values
            filled[name] = tf.ensure_shape(content, [length, width])
        return filled

    def _check(self, held):
        longest = tf.argmax(held["length"])
        tokens, clip_id = held["length"][longest], held["clip_id"][longest]
        return tf.raw_ops.Assert(
            condition=tokens <= self.row_length,
            data=[
                "clip", clip_id, "has", tokens, "tokens, more than the row length",
                self.row_length, '. Raise row_length, or pass overlong="crop".',
            ],
        )  # fmt: skip


def _subsets(waiting, segments):
    """Subsets of the waiting clips, the oldest in each: 0 or 1, float32 (subsets, waiting).

    They are the beginnings, of up to `segments` clips, of random orders of the clips, and
    of the order of arrival. Those with older clips come first, to win when two fill alike.
    """
    most = min(waiting, segments)
    keys = np.random.default_rng(0).random((max(1, SUBSETS // most), waiting))
    keys[:, 0] = -1
    keys[0] = np.arange(waiting)
    ranks = keys.argsort(1).argsort(1)
    subsets = ranks[:, None] < np.arange(1, most + 1)[:, None]
    return np.unique(subsets.reshape(-1, waiting), axis=0)[::-1].astype("float32")


def _handle(content):
    return tf.raw_ops.RaggedTensorToVariant(
        rt_nested_splits=[], rt_dense_values=content, batched_input=False
    )


def _join(first, second):
    split = tf.size(first["length"])
    places = tf.range(split + tf.size(second["length"]))
    places = [places[:split], places[split:]]
    # tf.concat does not take handles.
    joined = {name: tf.dynamic_stitch(places, [first[name], second[name]]) for name in first}
    return {name: tf.ensure_shape(joined[name], [None, *first[name].shape[1:]]) for name in first}


def _take(held, places):
    return {name: tf.gather(value, places) for name, value in held.items()}
