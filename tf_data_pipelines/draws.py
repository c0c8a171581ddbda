"""The order of the clips and every random draw, from seed, epoch and clip alone.

No draw depends on how many clips came before it, so a training can begin anywhere and see what
an unbroken one sees.
"""

import tensorflow as tf

ORDER, PATCH, SHIFT, GAIN, MASKS, FILL, LEVEL, NOISE = range(1, 9)  # streams of random numbers


def training_order(count, seed, start=0):
    """All clips in a new random order in each epoch, without end.

    Args:
        count: number of clips.
        seed: random seed of the orders.
        start: number of clips to leave out at the beginning; it may be epochs.

    Returns:
        Dataset of dictionaries: `place` int64 (), counted from the first clip of the first epoch;
        `epoch` int64 (); `clip_id` int64 (), in range(count).
    """

    def at(place):
        epoch = place // count
        clip_id = shuffled(count, fold([seed, ORDER], epoch), place % count)
        return {"place": place, "epoch": epoch, "clip_id": clip_id}

    return tf.data.Dataset.range(start, tf.int64.max).map(at)


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
    places = tf.range(count) if places is None else places
    return tf.random.experimental.index_shuffle(places, key, count - 1)


def fold(pair, number):
    """Another seed, int64 (2,), from a seed of two numbers and a number."""
    return tf.random.experimental.stateless_fold_in(tf.cast(tf.stack(pair), tf.int64), number)
