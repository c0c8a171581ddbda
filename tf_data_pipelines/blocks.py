"""The clips of shards as datasets: once in their order, or for training without end."""

import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_data_pipelines.draws import ORDER, PARTNER, fold, shuffled, turn_bounds, turns_before

BLOCK_BYTES = 64 << 20  # of the shards whose clips are shuffled together


def stored_clips(clips):
    """Every clip once, in their order, as a pure TensorFlow graph.

    Args:
        clips: Records.

    Returns:
        Dataset of dictionaries: `record` string (), `clip_id` int64 (), the place in `clips`.
    """
    layout = _Layout.of(clips)

    def shard(path, first, count):
        numbers = tf.data.Dataset.range(first, first + count)
        records = tf.data.TFRecordDataset(path)
        records = records.apply(tf.data.experimental.assert_cardinality(count))
        return tf.data.Dataset.zip((numbers, records))

    shards = tf.data.Dataset.from_tensor_slices((layout.paths, layout.firsts, layout.counts))
    ids = tf.constant(layout.ids)
    return (
        shards.flat_map(shard)
        .map(lambda number, record: {"record": record, "clip_id": tf.gather(ids, number)})
        .filter(lambda clip: clip["clip_id"] >= 0)
    )


def training_blocks(clips, seed, start=0, read=True, *, weights=None, partners=False):
    """`draws.training_order` of clips in shards: blocks of a few random shards, each shuffled.

    Args:
        clips: Records.
        seed: random seed of the orders.
        start: number of clips to leave out at the beginning; it may be epochs.
        read: whether to read the shards.
        weights: as in `training_order`.
        partners: whether each clip comes with another random clip of its block.

    Returns:
        Dataset of dictionaries as of `training_order`, with `record` string () where it reads;
        with partners also `partner` int64 (), the place of the other clip in `clips`, and
        `partner_record` string ().
    """
    layout, total = _Layout.of(clips), len(clips)
    shards = len(layout.counts)
    of_a_shard = np.mean([clips.shards[shard].bytes for shard in np.unique(clips.shard)])
    size = max(1, min(shards, int(BLOCK_BYTES / of_a_shard)))  # shards of a block
    blocks = -(-shards // size)
    bounds = None if weights is None else turn_bounds(weights)
    ends = np.append(0, np.cumsum(layout.kept))  # of the shards, in clips

    def turns(epoch, first, end):
        """How many turns the clips from `first` to before `end` have in an epoch."""
        until, before = (turns_before(tf.gather(bounds, at), seed, epoch) for at in (end, first))
        return until - before

    def block(number):
        epoch, place = number // blocks, size * (number % blocks)
        order = shuffled(shards, fold([seed, ORDER], epoch))
        in_shards = layout.kept if bounds is None else turns(epoch, ends[:-1], ends[1:])
        before = tf.reduce_sum(tf.gather(in_shards, order[:place]))
        chosen = order[place : place + size]
        firsts, counts = tf.gather(layout.firsts, chosen), tf.gather(layout.counts, chosen)
        ids = tf.gather(layout.ids, tf.ragged.range(firsts, firsts + counts).values)
        present = tf.reshape(tf.where(ids >= 0), [-1])
        kept = present
        if bounds is not None:
            clip_ids = tf.gather(ids, present)
            kept = tf.repeat(present, turns(epoch, clip_ids, clip_ids + 1))
        key = fold(fold([seed, ORDER], epoch), number)
        kept = tf.gather(kept, shuffled(tf.size(kept), key))
        places = epoch * total + before + tf.range(tf.size(kept, tf.int64))
        epochs = 0 * places + epoch if bounds is None else places
        found = {"place": places, "epoch": epochs, "clip_id": tf.gather(ids, kept)}
        if read:
            records = tf.data.TFRecordDataset(tf.gather(layout.paths, chosen))
            records = records.batch(tf.reduce_sum(counts)).get_single_element()
            found["record"] = tf.gather(records, kept)
        if read and partners:
            key = fold(fold([seed, PARTNER], epoch), number)
            others = tf.range(tf.size(kept)) % tf.size(present)
            others = tf.gather(present, tf.gather(shuffled(tf.size(present), key), others))
            found["partner"] = tf.gather(ids, others)
            found["partner_record"] = tf.gather(records, others)
        return found

    epoch, inside = divmod(start, total)
    order = shuffled(shards, fold([seed, ORDER], epoch)).numpy()
    in_shards = layout.kept if bounds is None else turns(epoch, ends[:-1], ends[1:]).numpy()
    block_ends = np.cumsum(in_shards[order])[size - 1 :: size]
    first = epoch * blocks + int(np.searchsorted(block_ends, inside, "right"))
    found = tf.data.Dataset.range(first, tf.int64.max).map(block).prefetch(1).unbatch()
    return found.filter(lambda clip: clip["place"] >= start) if inside else found


class _Layout(NamedTuple):
    """The shards that some clips lie in.

    Args:
        paths: str (shards,).
        firsts: int64 (shards,), number of records in the shards before.
        counts: int64 (shards,), number of records.
        kept: int64 (shards,), number of records that are of the clips.
        ids: int64 (records,), place of each record in the clips; -1 if it is none of them.
    """

    paths: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray
    kept: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, clips):
        used, place, kept = np.unique(clips.shard, return_inverse=True, return_counts=True)
        shards = [clips.shards[shard] for shard in used]
        counts = np.array([shard.clips for shard in shards], "int64")
        firsts = np.cumsum(counts) - counts
        ids = np.full(counts.sum(), -1, "int64")
        ids[firsts[place] + clips.record] = np.arange(len(clips))
        paths = np.array([os.fsencode(clips.folder / shard.name) for shard in shards])
        return cls(paths, firsts, counts, kept=kept.astype("int64"), ids=ids)
