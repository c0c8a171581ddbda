"""Where the clips of a row begin and end, for the kernels that visit a clip's own tokens alone."""

import keras
from keras import ops


def token_ranges(segment_ids):
    """First token of each token's clip, and the first one behind it: int32 (rows, length) twice.

    The tokens of a clip lie side by side; so does padding, which counts as a clip here.
    """
    rows, length = ops.shape(segment_ids)
    ids, edge = ops.cast(segment_ids, "int32"), ops.full((rows, 1), -1, "int32")
    changes = ops.not_equal(ops.concatenate([edge, ids], 1), ops.concatenate([ids, edge], 1))
    places = ops.arange(length, dtype="int32")
    first = ops.where(changes[:, :-1], places, 0)
    last = ops.where(changes[:, 1:], places + 1, length)
    begin, end, shift = first, last, 1
    while shift < length:  # Keras's associative_scan is nothing that TensorFlow's XLA compiles
        begin = ops.maximum(begin, ops.pad(begin[:, :-shift], [(0, 0), (shift, 0)]))
        room = ops.full((rows, shift), length, "int32")
        end = ops.minimum(end, ops.concatenate([end[:, shift:], room], 1))
        shift *= 2
    return begin, end


def tile_ranges(segment_ids, begin, end, tile):
    """Range of tokens that the clips with a token in each tile cover: int32 (rows, tiles) twice.

    The length is a multiple of `tile`. A tile of padding alone has an empty range. The other way
    round, the tokens of a tile are seen from its range alone, so one range serves queries and keys.
    """
    rows, length = ops.shape(segment_ids)
    real = ops.greater(segment_ids, 0)
    shape = rows, length // tile, tile
    begin = ops.min(ops.reshape(ops.where(real, begin, length), shape), -1)
    end = ops.max(ops.reshape(ops.where(real, end, 0), shape), -1)
    return ops.minimum(begin, end), end


def without_nonfinite(value, begin, end):
    """Values with zeros in place of tokens that are not finite, and whose clips have such tokens.

    A weight of 0 times NaN is NaN, which no other clip may get; see `kernels.sees_nonfinite`.

    Returns:
        Tuple of value, float (rows, length, heads, width), and bool (rows, length).
    """
    finite = ops.all(ops.isfinite(value), axis=(2, 3))
    count = ops.cumsum(ops.cast(ops.logical_not(finite), "int32"), axis=1)
    count = ops.pad(count, [(0, 0), (1, 0)])
    seen = ops.greater(gathered(count, end), gathered(count, begin))
    return ops.where(finite[:, :, None, None], value, 0), seen


def gathered(x, places):
    """x[row, places[row]] of every row: (rows, length, ...), (rows, ...) -> (rows, ..., ...)."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.gather(x, places, batch_dims=1)
    return ops.vectorized_map(lambda row: ops.take(row[0], row[1], axis=0), (x, places))
