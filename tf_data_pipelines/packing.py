"""Sequence packing: clips of any length fill dense rows, inside the TensorFlow graph.

clips        [a a a] [b b]
tokens        a a a b b .
segment_ids   1 1 1 2 2 0
"""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tf_data_pipelines.settings import PackSettings

SUBSETS = 4096  # subsets compared for a row; with a quarter of them 0.2 % more stays empty
ARRIVALS = 16  # clips that arrive at a time; one at a time costs three times as much
SLOT_NAMES = {"label": "labels", "clip_id": "clip_ids", "weight": "weights"}  # clip -> row
# Names in a row that the packer makes itself; `length` is what it keeps of a waiting clip.
RESERVED = ("segment_ids", "length", *SLOT_NAMES.values())


def pack(
    clips: tf.data.Dataset, settings: PackSettings, beside: Mapping[str, int] | None = None
) -> tf.data.Dataset:
    """Pack clips into rows, each the best of thousands of subsets of the waiting clips.

    A row takes the clip that has waited longest, and of the `settings.buffer_size` oldest clips
    those that fill the row best. The subsets to compare are drawn once and are the same for
    every row, so a dataset is packed the same way every time. No clip waits for more than
    buffer_size + ARRIVALS rows, and no more clips than that are held, apart from what tf.data
    prefetches. Clips stay whole, but their order changes, which `clip_ids` records.

    Args:
        clips: finite or endless tf.data.Dataset of dictionaries with the columns
            `tokens` float32 (n, width), n at most settings.row_length;
            `positions` float32 (n, 4), or of another width;
            `label` of any shape and dtype, such as int32 () or float32 (classes,);
            `clip_id` int64 ();
            `weight` float32 (), the weight of the clip in the loss; it may be left out;
            any further numbers of the clip, such as a teacher's scores, of static shape.
        settings: PackSettings.
        beside: {name: row length} of further tokens of the same clips, the columns `NAME_tokens`
            and `NAME_positions`. They are packed beside the others, each into a row of its own
            length and into the clip's slot there. A clip joins a row only if all its kinds of
            tokens fit; of the choices that fit, the one that fills the first row best wins. None
            for no others.

    Returns:
        Dataset of rows, dictionaries with
            tokens       float32 (row_length, width)
            positions    float32 (row_length, 4)
            segment_ids  int32 (row_length,), 1, 2, ... for the clips, 0 for padding
            labels       (segments, *shape of label)
            weights      float32 (segments,), the clip's weight or 1; 0 for an empty slot
            clip_ids     int64 (segments,), -1 for an empty slot
            and each further column under its own name: (segments, *shape), zeros in empty
            slots; of `beside` also NAME_tokens, NAME_positions and NAME_segment_ids.
        Every clip is in exactly one row, also at the end of a finite dataset.

    Raises:
        ValueError: a column has a name that rows use, no static shape, or is not numeric.
        tf.errors.InvalidArgumentError: a clip has more tokens than a row; raised while the
            rows are read.
    """
    packer = _Packer(settings, clips.element_spec, beside or {})
    arrivals = clips.map(packer.hold).batch(ARRIVALS)
    # One more element marks the end of the clips. The tf.data service does not split this
    # source, so every worker has its own end.
    end = tf.data.Dataset.random(0).take(1).map(lambda _: packer.no_clips())
    with tf.device("CPU"):  # made at once, so TensorFlow could place it on a GPU
        start = packer.start()
    rows = arrivals.concatenate(end).scan(start, packer.step).unbatch()
    return _untuned(rows.map(packer.fill))


def _untuned(dataset):
    """The same Dataset without tf.data's autotuning.

    What is made of it by map, batch, repeat or zip has none either; what is made by flat_map, and
    what a client of the tf.data service gets, needs `with_options` of its own.

    When an iterator ends, TensorFlow 2.21 may not wake the thread that tunes, and waits until that
    has slept: as long as the iterator lived, up to a minute. `model.fit` ends an iterator with each
    validation. Autotuned or not, parallel stages begin with one thread for each core, 16 at most.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def batch_rows(
    rows: tf.data.Dataset, settings: PackSettings, partial: bool = True
) -> tf.data.Dataset:
    """Batch rows to (rows, ...).

    Args:
        rows: Dataset from `pack`.
        settings: PackSettings.
        partial: whether a last batch that is not full is filled up with empty rows (True) or
            dropped (False).

    Returns:
        Dataset of dictionaries like those of `pack`, with settings.rows rows each.
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

    A waiting clip is held as one handle, a variant that refers to its tokens. Choosing moves
    handles only; the tokens are copied once, into their row. The first of the held clips is a
    blank without tokens, for the slots that stay empty.

    Args:
        settings: PackSettings.
        columns: element spec of the clips.
        beside: as in `pack`.
    """

    def __init__(self, settings, columns, beside):
        self.segments = settings.segments
        self.row_lengths = {"": settings.row_length}  # by what stands before `tokens`
        self.row_lengths |= {f"{name}_": length for name, length in beside.items()}
        self.buffer_size = max(settings.buffer_size, settings.segments)
        self.subsets = _subsets(self.buffer_size, self.segments)
        self.widths = {
            prefix + name: columns[prefix + name].shape[-1]
            for prefix in self.row_lengths
            for name in ("tokens", "positions")
        }
        self.columns = {name: spec for name, spec in columns.items() if name not in self.widths}
        made = [prefix + name for prefix in self.row_lengths for name in ("segment_ids", "length")]
        _check_columns(self.columns, {*RESERVED, *made})

    def hold(self, clip):
        """A clip as it waits: handles of its tokens, their number and the other columns."""
        handles = {name: _handle(clip[name]) for name in self.widths}
        others = {name: clip[name] for name in self.columns}
        lengths = {
            f"{prefix}length": tf.shape(clip[f"{prefix}tokens"])[0] for prefix in self.row_lengths
        }
        return {**handles, **others, **lengths}

    def start(self):
        """What is held at the start: the blank."""
        blank = {name: tf.zeros([0, width]) for name, width in self.widths.items()}
        for name, spec in self.columns.items():
            blank[name] = tf.zeros(spec.shape, spec.dtype)
        blank["clip_id"] -= 1
        return {name: value[None] for name, value in self.hold(blank).items()}

    def no_clips(self):
        """Arrivals without a clip, the sign that all clips have arrived."""
        return {name: value[:0] for name, value in self.start().items()}

    def step(self, held, arrivals):
        """The clips that stay, the blank first, and the rows (rows, segments) of handles."""
        last = tf.size(arrivals["length"]) == 0
        held = _join(held, arrivals)
        with tf.control_dependencies([self._check(held)]):
            order = tf.range(1, tf.size(held["length"]))
        # The order always has `buffer_size` clips, real ones first, then the blank (0).
        order = tf.pad(order, [[0, self.buffer_size]])
        lengths = tf.stack([held[f"{prefix}length"] for prefix in self.row_lengths], -1)
        lengths = tf.cast(lengths, tf.float32)
        most = tf.constant([*self.row_lengths.values()], tf.float32)
        enough = tf.where(last, 1, self.buffer_size)

        def a_row(order, rows):
            oldest = order[: self.buffer_size]
            sums = tf.matmul(self.subsets, tf.gather(lengths, oldest))
            fits = tf.reduce_all(sums <= most, 1)
            best = tf.argmax(tf.where(fits, sums[:, 0], -1.0))
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
        """The row of these handles: its tokens, padded, and its slots, with static shapes."""
        filled = {"weights": tf.cast(row["clip_id"] >= 0, tf.float32)}
        for name, spec in self.columns.items():
            slots = tf.ensure_shape(row[name], [self.segments, *spec.shape])
            filled[SLOT_NAMES.get(name, name)] = slots
        for prefix, length in self.row_lengths.items():
            ends = tf.cumsum(row[f"{prefix}length"])
            # The segment at a place is 1 plus the number of clips that end before it.
            segment_ids = 1 + tf.searchsorted(ends, tf.range(length), side="right")
            # After the last slot: padding.
            filled[f"{prefix}segment_ids"] = segment_ids % (self.segments + 1)
            for name in (f"{prefix}tokens", f"{prefix}positions"):
                filled[name] = _joined(row[name], ends[-1], length, width=self.widths[name])
        return filled

    def _check(self, held):
        checks = []
        for prefix, most in self.row_lengths.items():
            lengths = held[f"{prefix}length"]
            longest = tf.argmax(lengths)
            data = [
                "clip", held["clip_id"][longest], "has", lengths[longest],
                f"{prefix}tokens, more than the row length", most,
                '. Raise row_length (--row-length), or pass overlong="crop" (--overlong crop).',
            ]  # fmt: skip
            checks.append(tf.raw_ops.Assert(condition=lengths[longest] <= most, data=data))
        return tf.group(checks)


def _joined(handles, tokens, length, *, width):
    """The content of handles (slots,), so many tokens in all, padded to (length, width)."""
    padding = _handle(tf.zeros([length - tokens, width]))
    content = tf.raw_ops.RaggedTensorFromVariant(
        encoded_ragged=tf.stack([*tf.unstack(handles), padding]),
        input_ragged_rank=0,
        output_ragged_rank=1,
        Tvalues=tf.float32,
        Tsplits=tf.int64,
    ).output_dense_values
    return tf.ensure_shape(content, [length, width])


def _check_columns(columns, reserved):
    """Raise a ValueError for columns that cannot travel in the slots of a row."""
    for name, spec in columns.items():
        if name in reserved:
            raise ValueError(
                f"clips have a column {name!r}, a name that the packer uses itself; rename the "
                f"column. Reserved are {', '.join(sorted(reserved))}."
            )
        numeric = spec.dtype.is_floating or spec.dtype.is_integer
        if not numeric or not spec.shape.is_fully_defined():
            raise ValueError(
                f"column {name!r} has dtype {spec.dtype.name} and shape {spec.shape}; expected "
                f"numbers of a static shape, the same for every clip."
            )
    weight = columns.get("weight", tf.TensorSpec([], tf.float32))
    if weight.dtype != tf.float32 or weight.shape.rank != 0:
        raise ValueError(
            f"column 'weight' has dtype {weight.dtype.name} and shape {weight.shape}; expected "
            f"float32 and shape (), one weight for each clip."
        )


def _subsets(buffer_size, segments):
    """Subsets of the waiting clips: 0 or 1, float32 (subsets, buffer_size).

    A subset is the beginning, of up to `segments` clips, of a random order of the clips or of
    the order of arrival, with the oldest clip in front. Subsets with older clips come first,
    so that they win where two subsets fill a row equally.
    """
    most = min(buffer_size, segments)
    keys = np.random.default_rng(0).random((max(1, SUBSETS // most), buffer_size))
    keys[:, 0] = -1
    keys[0] = np.arange(buffer_size)
    ranks = keys.argsort(1).argsort(1)
    subsets = ranks[:, None] < np.arange(1, most + 1)[:, None]
    return np.unique(subsets.reshape(-1, buffer_size), axis=0)[::-1].astype("float32")


def _handle(content):
    """A variant that refers to the tensor."""
    return tf.raw_ops.RaggedTensorToVariant(
        rt_nested_splits=[], rt_dense_values=content, batched_input=False
    )


def _join(first, second):
    """The clips of both, one behind the other."""
    split = tf.size(first["length"])
    places = tf.range(split + tf.size(second["length"]))
    places = [places[:split], places[split:]]
    # tf.concat does not take handles.
    joined = {name: tf.dynamic_stitch(places, [first[name], second[name]]) for name in first}
    return {name: tf.ensure_shape(joined[name], [None, *first[name].shape[1:]]) for name in first}


def _take(held, places):
    """The held clips at these places."""
    return {name: tf.gather(value, places) for name, value in held.items()}
