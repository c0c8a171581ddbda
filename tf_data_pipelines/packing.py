"""Streaming packer: clips of any length become dense rows, inside the TensorFlow graph.

clips        [a a a] [b b]
tokens        a a a b b .
segment_ids   1 1 1 2 2 0
"""

import tensorflow as tf


def pack(clips, settings, label_shape=(), label_dtype=tf.int32):
    """Pack clips into rows, best fit over several open rows.

    A clip goes to the fullest open row that still has room for it. When none has, the
    fullest row is closed and given out, and the clip opens a new one in its place. Clips
    keep their content whole; their order changes, which is why `clip_ids` come along.

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
    flush = tf.data.Dataset.from_tensors(packer.nothing()).repeat(settings.open_rows)
    marked = clips.map(lambda clip: (clip, False)).concatenate(flush.map(lambda c: (c, True)))
    steps = marked.scan(packer.start(), packer.step)
    return steps.filter(lambda closed, row: closed).map(
        lambda closed, row: packer.with_static_shapes(row)
    )


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
    """The open rows, as tensors that `tf.data.Dataset.scan` carries along.

    Tokens wait in tensor lists, one list a row inside one outer list, so that adding a
    clip moves a reference and copies nothing; a row's tokens are copied once, at closing.
    """

    def __init__(self, settings, width, label_shape, label_dtype):
        self.settings = settings
        self.width = width
        self.columns = width + 4  # tokens and positions travel side by side
        self.label_shape = label_shape
        self.label_dtype = label_dtype

    def nothing(self):
        """An element of the clips' structure that only asks for a row to be closed."""
        return {
            "tokens": tf.zeros([0, self.width]),
            "positions": tf.zeros([0, 4]),
            "label": tf.zeros(self.label_shape, self.label_dtype),
            "clip_id": tf.constant(-1, tf.int64),
        }

    def start(self):
        open_rows, segments = self.settings.open_rows, self.settings.segments
        held = tf.raw_ops.TensorListReserve(
            element_shape=tf.constant([], tf.int32),
            num_elements=open_rows,
            element_dtype=tf.variant,
        )
        for row in range(open_rows):
            held = tf.raw_ops.TensorListSetItem(
                input_handle=held, index=row, item=self._empty_row()
            )
        return {
            "held": held,
            "used": tf.zeros([open_rows], tf.int32),
            "count": tf.zeros([open_rows], tf.int32),
            "labels": tf.zeros([open_rows, segments, *self.label_shape], self.label_dtype),
            "clip_ids": tf.fill([open_rows, segments], tf.constant(-1, tf.int64)),
        }

    def step(self, state, element):
        clip, flush = element
        settings = self.settings
        tokens = tf.shape(clip["tokens"])[0]
        with tf.control_dependencies([self._check(tokens, clip["clip_id"])]):
            free = settings.row_length - state["used"]
        fits = (free >= tokens) & (state["count"] < settings.segments) & ~flush
        found = tf.reduce_any(fits)
        tightest = tf.argmin(tf.where(fits, free, settings.row_length + 1), output_type=tf.int32)
        fullest = tf.argmax(state["used"], output_type=tf.int32)
        row = tf.where(found, tightest, fullest)
        # A row that was never filled is not given out (flushing, or a fresh packer).
        closed = ~found & (state["count"][row] > 0)

        result = tf.cond(closed, lambda: self._close(state, row), self._no_row)
        state = tf.cond(found, lambda: dict(state), lambda: self._reopen(state, row))
        state = tf.cond(flush, lambda: dict(state), lambda: self._add(state, row, clip))
        return state, (closed, result)

    def with_static_shapes(self, row):
        length, segments = self.settings.row_length, self.settings.segments
        shapes = {
            "tokens": [length, self.width],
            "positions": [length, 4],
            "segment_ids": [length],
            "labels": [segments, *self.label_shape],
            "weights": [segments],
            "clip_ids": [segments],
        }
        return {name: tf.ensure_shape(row[name], shape) for name, shape in shapes.items()}

    def _empty_row(self):
        return tf.raw_ops.EmptyTensorList(
            element_shape=tf.constant([-1, self.columns], tf.int32),
            max_num_elements=self.settings.segments,
            element_dtype=tf.float32,
        )

    def _check(self, tokens, clip_id):
        return tf.debugging.Assert(
            tokens <= self.settings.row_length,
            [
                "clip", clip_id, "has", tokens, "tokens, more than the row length",
                self.settings.row_length, '. Raise row_length, or pass overlong="crop".',
            ],
        )  # fmt: skip

    def _waiting(self, state, row):
        return tf.raw_ops.TensorListGetItem(
            input_handle=state["held"],
            index=row,
            element_shape=tf.constant([], tf.int32),
            element_dtype=tf.variant,
        )

    def _close(self, state, row):
        content = tf.raw_ops.TensorListConcatV2(
            input_handle=self._waiting(state, row),
            element_shape=tf.constant([-1, self.columns], tf.int32),
            leading_dims=tf.constant([], tf.int64),
            element_dtype=tf.float32,
        )
        count = state["count"][row]
        padding = [[0, self.settings.row_length - state["used"][row]]]
        columns = tf.pad(content.tensor, [*padding, [0, 0]])
        segment_ids = tf.repeat(tf.range(1, count + 1), content.lengths)
        return {
            "tokens": columns[:, : self.width],
            "positions": columns[:, self.width :],
            "segment_ids": tf.pad(segment_ids, padding),
            "labels": state["labels"][row],
            "weights": tf.cast(tf.range(self.settings.segments) < count, tf.float32),
            "clip_ids": state["clip_ids"][row],
        }

    def _no_row(self):
        return {
            "tokens": tf.zeros([0, self.width]),
            "positions": tf.zeros([0, 4]),
            "segment_ids": tf.zeros([0], tf.int32),
            "labels": tf.zeros([0, *self.label_shape], self.label_dtype),
            "weights": tf.zeros([0]),
            "clip_ids": tf.zeros([0], tf.int64),
        }

    def _reopen(self, state, row):
        at = [[row]]
        scatter = tf.tensor_scatter_nd_update
        return {
            "held": tf.raw_ops.TensorListSetItem(
                input_handle=state["held"], index=row, item=self._empty_row()
            ),
            "used": scatter(state["used"], at, [0]),
            "count": scatter(state["count"], at, [0]),
            "labels": scatter(state["labels"], at, tf.zeros_like(state["labels"][:1])),
            "clip_ids": scatter(state["clip_ids"], at, -tf.ones_like(state["clip_ids"][:1])),
        }

    def _add(self, state, row, clip):
        slot = state["count"][row]
        waiting = tf.raw_ops.TensorListPushBack(
            input_handle=self._waiting(state, row),
            tensor=tf.concat([clip["tokens"], clip["positions"]], -1),
        )
        scatter = tf.tensor_scatter_nd_update
        return {
            "held": tf.raw_ops.TensorListSetItem(
                input_handle=state["held"], index=row, item=waiting
            ),
            "used": tf.tensor_scatter_nd_add(state["used"], [[row]], [tf.shape(clip["tokens"])[0]]),
            "count": scatter(state["count"], [[row]], [slot + 1]),
            "labels": scatter(state["labels"], [[row, slot]], clip["label"][None]),
            "clip_ids": scatter(state["clip_ids"], [[row, slot]], clip["clip_id"][None]),
        }
