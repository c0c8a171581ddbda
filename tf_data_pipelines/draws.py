"""The order of the clips and every random draw, from seed, epoch and clip alone.

No draw depends on how many clips came before it, so a training can begin anywhere and see what
an unbroken one sees.
"""

import numpy as np
import tensorflow as tf

# Streams of random numbers. A new one takes the next number, so that no other draw changes.
ORDER, PATCH, SHIFT, GAIN, MASKS, FILL, LEVEL, NOISE = range(1, 9)
CROP, ROLL, MIXED, MIXTURE, PARTNER, STRETCH, POOL, GROUP, TOKENS, BANDS, COLUMNS, TURNS = range(
    9, 21
)


def training_order(count, seed, start=0, weights=None):
    """All clips in a new random order in each epoch, without end.

    Args:
        count: number of clips.
        seed: random seed of the orders.
        start: number of clips to leave out at the beginning; it may be epochs.
        weights: float (count,), how often each clip is wanted against the others; None for once
            in each epoch. With weights an epoch has each clip as often as its share of `count`
            says, rounded up or down.

    Returns:
        Dataset of dictionaries: `place` int64 (), counted from the first clip of the first epoch;
        `epoch` int64 (), with weights the place again, so that a clip which comes twice in an
        epoch draws twice; `clip_id` int64 (), in range(count).
    """
    bounds = None if weights is None else turn_bounds(weights)

    def at(place):
        epoch = place // count
        clip_id = shuffled(count, fold([seed, ORDER], epoch), place % count)
        if bounds is None:
            return {"place": place, "epoch": epoch, "clip_id": clip_id}
        turn = tf.cast(clip_id, tf.float64) + _offset(seed, epoch)
        clip_id = tf.searchsorted(bounds, [turn], side="right", out_type=tf.int64)[0] - 1
        return {"place": place, "epoch": place, "clip_id": clip_id}

    return tf.data.Dataset.range(start, tf.int64.max).map(at)


def turn_bounds(weights):
    """Where each clip's share of an epoch begins, in clips, float64 (clips + 1,) from 0 to clips.

    An epoch is as many turns as clips, at 0, 1, 2, ... plus an offset that it draws. Each turn goes
    to the clip whose share contains it.

    Args:
        weights: float (clips,), none below 0, some above.
    """
    sums = np.cumsum(np.asarray(weights, "float64"))
    bounds = np.append(0.0, sums / sums[-1] * len(sums))
    bounds[np.searchsorted(bounds, bounds[-1]) :] = len(sums)  # also of clips without weight
    return bounds


def turns_before(bounds, seed, epoch):
    """Number of an epoch's turns before each of some bounds, int64, see `turn_bounds`."""
    return tf.cast(tf.math.ceil(bounds - _offset(seed, epoch)), tf.int64)


def _offset(seed, epoch):
    """What an epoch adds to all turns, float64 () in [0, 1)."""
    draw = tf.random.stateless_uniform([], fold([seed, TURNS], epoch))
    return tf.cast(draw, tf.float64)


def uniform(number, clip, seed, stream):
    """So many numbers in [0, 1), a list of float32 (), for a clip in its epoch.

    Args:
        number: how many numbers.
        clip: dictionary with `clip_id` int64 () and perhaps `epoch` int64 (), 0 without it.
        seed: random seed.
        stream: one of the streams of random numbers.
    """
    return tf.unstack(tf.random.stateless_uniform([number], key(clip, seed, stream)))


def choice(choices, clip, seed, stream):
    """One of so many choices, int32 (); see `uniform`."""
    return tf.random.stateless_uniform(
        [], key(clip, seed, stream), minval=0, maxval=choices, dtype=tf.int32
    )


def subset(number, size, clip, seed, stream):
    """So many places in range(size), int32 (number,) ascending, each subset equally likely.

    Args:
        number: int32 (), from 1 to `size`.
        size: int32 ().
        clip, seed, stream: as in `uniform`.
    """
    random = tf.random.stateless_uniform(
        [size], key(clip, seed, stream), maxval=tf.int32.max, dtype=tf.int32
    )
    # The place in the lower bits, so that no two are equal. Selecting is faster than sorting.
    keys = 2**32 * tf.cast(random, tf.int64) + tf.range(tf.cast(size, tf.int64))
    largest = tf.raw_ops.NthElement(input=keys, n=number - 1)
    return tf.cast(tf.reshape(tf.where(keys <= largest), [-1]), tf.int32)


def key(clip, seed, stream):
    """Seed of tf.random.stateless_* for a clip in its epoch, int (2,); see `uniform`."""
    epoch = clip.get("epoch", tf.constant(0, tf.int64))
    return fold(fold([seed, stream], epoch), clip["clip_id"])


def shuffled(count, key, places=None):
    """The numbers in range(count) in a random order, int64 (count,), or those at some places.

    Args:
        count: int, or an integer scalar.
        key: int64 (2,), see `fold`.
        places: int64, places in the order; None for all.
    """
    count = tf.cast(count, tf.int64)
    last = tf.maximum(count, 1) - 1
    if places is not None:
        return tf.random.experimental.index_shuffle(places, key, last)
    return tf.random.experimental.index_shuffle(tf.range(last + 1), key, last)[:count]


def fold(pair, number):
    """Another seed, int64 (2,), from a seed of two numbers and a number.

    The number becomes int64 first: TensorFlow gives another seed for the same number in int32.
    """
    pair, number = tf.cast(tf.stack(pair), tf.int64), tf.cast(number, tf.int64)
    return tf.random.experimental.stateless_fold_in(pair, number)
