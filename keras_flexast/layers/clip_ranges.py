"""Where the clips of a row begin and end, for the kernels that visit a clip's own tokens alone."""

import keras
from keras import ops

LOWEST = -1e30  # of a logit that does not count; not -inf, as inf - inf is NaN


def in_tiles(kernel, query, key, value, segment_ids, *, tile, scale=None, width=None):
    """What a kernel of whole tiles gives for rows of any length, as `kernels.Kernel` asks for it.

    Args:
        kernel: function of query, key and value, each float (rows, length, heads, width),
            segment ids, the two arrays of `tile_ranges` and the scale; it returns float
            (rows, length, heads, width).
        query, key, value, segment_ids, scale: as in `kernels.Kernel`.
        tile: number of tokens in a tile; the kernel's rows are a multiple of it.
        width: width of a head for the kernel; None for that of the query.

    Returns:
        float (rows, length, heads, width), zeros for padding; NaN for a clip with a token that is
        not finite.
    """
    rows, length, _, own_width = query.shape
    if rows == 0:
        return ops.zeros_like(query)
    scale = own_width**-0.5 if scale is None else scale
    padding = [(0, 0), (0, -length % tile)]
    ids = ops.pad(ops.cast(segment_ids, "int32"), padding)
    padding += [(0, 0), (0, 0 if width is None else width - own_width)]
    arrays = [ops.pad(x, padding) for x in (query, key, value)]
    begin, end = token_ranges(ids)
    # A weight of 0 times NaN is NaN, which no other clip may get: see `kernels.sees_nonfinite`.
    finite = ops.all(ops.stack([ops.all(ops.isfinite(x), axis=(2, 3)) for x in arrays]), axis=0)
    arrays = [ops.where(finite[:, :, None, None], x, 0) for x in arrays]
    output = kernel(*arrays, ids, *tile_ranges(ids, begin, end, tile), scale)
    output = ops.where(ops.greater(ids, 0)[..., None, None], output, 0)
    sees_nonfinite = _any_in(begin, end, ops.logical_not(finite))
    output = ops.where(sees_nonfinite[..., None, None], float("nan"), output)
    return output[:, :length, :, :own_width]


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

    The length is a multiple of `tile`. A tile of padding alone has an empty range. A tile's range
    also holds all tokens that attend to it, so one range serves queries and keys.
    """
    rows, length = ops.shape(segment_ids)
    real = ops.greater(segment_ids, 0)
    shape = rows, length // tile, tile
    begin = ops.min(ops.reshape(ops.where(real, begin, length), shape), -1)
    end = ops.max(ops.reshape(ops.where(real, end, 0), shape), -1)
    return ops.minimum(begin, end), end


def _any_in(begin, end, marked):
    """Whether any token of a token's clip is marked; all are (rows, length)."""
    count = ops.pad(ops.cumsum(ops.cast(marked, "int32"), axis=1), [(0, 0), (1, 0)])
    return ops.greater(gathered(count, end), gathered(count, begin))


def gathered(x, places):
    """x[row, places[row]] of every row: (rows, length, ...), (rows, ...) -> (rows, ..., ...)."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.gather(x, places, batch_dims=1)
    return ops.vectorized_map(lambda row: ops.take(row[0], row[1], axis=0), (x, places))
