"""Packed self-attention in bands: FlashAttention for XLA on a GPU, without a kernel of its own.

Each tile of TILE queries meets, step by step, the next TILE keys of the clips that it holds. All
tiles take as many steps as the one whose clips cover most tokens: up to about twice the longest
clip. A clip as long as a row makes the whole batch pay for all pairs. The softmax runs online, and
the gradient computes it again from each query's logsumexp. All shapes are static.

Inside, arrays are (rows, tiles, TILE, heads, width) for what has a place in a tile, and (rows,
length, heads, width) for what is gathered. All products and sums are float32.

Reference: FlashAttention, Dao et al. 2022 (arXiv:2205.14135), whose names are used here.
"""

from keras import ops

from keras_flexast.layers.clip_ranges import LOWEST, gathered, in_tiles

TILE = 128  # not tuned on a GPU yet


def attend(query, key, value, segment_ids, *, scale=None):
    """Softmax attention of every token to the tokens of its own clip; see `kernels.Kernel`.

    Padding gets zeros.
    """
    return in_tiles(_attention, query, key, value, segment_ids, tile=TILE, scale=scale)


def _attention(query, key, value, ids, begin, end, scale):
    # What is no float32 has no gradient that both backends take, and what is none of the
    # arguments would leave the trace of a block that is computed again (remat).
    clips = [ops.cast(x, "float32") for x in (ids, begin, end)]

    @ops.custom_gradient
    def attention(query, key, value, *clips):
        tiles = _Tiles(*(ops.cast(x, "int32") for x in clips))
        output, logsumexp = _forward(query, key, value, tiles=tiles, scale=scale)

        def gradients(d_output):
            given = query, key, value, output, logsumexp, d_output
            return *_backward(*given, tiles=tiles, scale=scale), *map(ops.zeros_like, clips)

        return output, gradients

    return attention(query, key, value, *clips)


def _forward(query, key, value, *, tiles, scale):
    q = tiles.split(query)

    def visit(step, output, row_sum, row_max):
        places, pairs = tiles.at(step)
        k, v = gathered(key, places), gathered(value, places)
        logits = ops.where(pairs, _products(q, k) * scale, LOWEST)
        new_max = ops.maximum(row_max, ops.max(logits, -1, keepdims=True))
        weights = ops.where(pairs, ops.exp(logits - new_max), 0)
        shrink = ops.exp(row_max - new_max)
        output = output * _swap_heads(shrink) + _sums(weights, v)
        return output, row_sum * shrink + ops.sum(weights, -1, keepdims=True), new_max

    zeros = ops.zeros_like(ops.cast(q, "float32"))
    column = _swap_heads(zeros[..., :1])
    output, row_sum, row_max = tiles.for_each_step(visit, (zeros, column, column + LOWEST))
    row_sum = ops.where(ops.equal(row_sum, 0), 1, row_sum)  # of padding
    output = ops.cast(output / _swap_heads(row_sum), query.dtype)
    return tiles.join(output), row_max + ops.log(row_sum)


def _backward(query, key, value, output, logsumexp, d_output, *, tiles, scale):
    delta = ops.cast(d_output, "float32") * ops.cast(output, "float32")
    delta = ops.sum(delta, -1, keepdims=True)
    q, k, v, d_out, own_delta = map(tiles.split, (query, key, value, d_output, delta))
    own_delta = _swap_heads(own_delta)
    all_logsumexp, all_delta = tiles.join(_swap_heads(logsumexp)), delta

    def visit_keys(step, d_query):
        places, pairs = tiles.at(step)
        k, v = gathered(key, places), gathered(value, places)
        weights = ops.where(pairs, ops.exp(_products(q, k) * scale - logsumexp), 0)
        d_logits = ops.where(pairs, weights * (_products(d_out, v) - own_delta), 0)
        return (d_query + _sums(d_logits, k),)

    def visit_queries(step, d_key, d_value):
        places, pairs = tiles.at(step)
        q, d_out = gathered(query, places), gathered(d_output, places)
        query_logsumexp, query_delta = (
            ops.transpose(gathered(x, places), (0, 1, 3, 4, 2)) for x in (all_logsumexp, all_delta)
        )
        weights = ops.where(pairs, ops.exp(_products(k, q) * scale - query_logsumexp), 0)
        d_logits = ops.where(pairs, weights * (_products(v, d_out) - query_delta), 0)
        return d_key + _sums(d_logits, q), d_value + _sums(weights, d_out)

    zeros = ops.zeros_like(ops.cast(q, "float32"))
    (d_query,) = tiles.for_each_step(visit_keys, (zeros,))
    d_key, d_value = tiles.for_each_step(visit_queries, (zeros, zeros))
    scaled = (d_query * scale, d_key * scale, d_value)
    return tuple(tiles.join(ops.cast(x, query.dtype)) for x in scaled)


class _Tiles:
    """The tiles of some rows, and the tokens that each of them meets in each step.

    Args:
        ids: int32 (rows, length), segment ids; the length is a multiple of TILE.
        begin, end: int32 (rows, tiles), see `tile_ranges`.
    """

    def __init__(self, ids, begin, end):
        self.ids, self.begin, self.end = ids, begin, end
        self.own_ids = ops.reshape(ids, (-1, ids.shape[1] // TILE, TILE))
        self.steps = ops.max((end - begin + TILE - 1) // TILE)

    def at(self, step):
        """Places of the tokens that come now, (rows, tiles, TILE), and the pairs of one clip.

        Pairs are bool (rows, tiles, 1, TILE own tokens, TILE others).
        """
        places = (self.begin + step * TILE)[..., None] + ops.arange(TILE, dtype="int32")
        inside = ops.less(places, self.end[..., None])
        places = ops.minimum(places, self.ids.shape[1] - 1)
        others = ops.where(inside, gathered(self.ids, places), -1)
        pairs = ops.equal(self.own_ids[..., :, None], others[..., None, :])
        pairs = ops.logical_and(pairs, ops.greater(others, 0)[..., None, :])
        return places, pairs[:, :, None]

    def for_each_step(self, visit, carry):
        """The carry after `visit(step, *carry)` of every step."""
        _, *carry = ops.while_loop(
            lambda step, *_: step < self.steps,
            lambda step, *carry: (step + 1, *visit(step, *carry)),
            (ops.zeros((), "int32"), *carry),
        )
        return carry

    def split(self, x):
        """(rows, length, ...) -> (rows, tiles, TILE, ...)."""
        return ops.reshape(x, (-1, x.shape[1] // TILE, TILE, *x.shape[2:]))

    def join(self, x):
        """(rows, tiles, TILE, ...) -> (rows, length, ...)."""
        return ops.reshape(x, (-1, x.shape[1] * TILE, *x.shape[3:]))


def _products(a, b):
    """Products of every two tokens, float32 (rows, tiles, heads, TILE, TILE)."""
    a, b = ops.cast(a, "float32"), ops.cast(b, "float32")
    return ops.einsum("rtahw,rtbhw->rthab", a, b)


def _sums(weights, x):
    """Weighted sums of tokens, float32 (rows, tiles, TILE, heads, width)."""
    return ops.einsum("rthab,rtbhw->rtahw", weights, ops.cast(x, "float32"))


def _swap_heads(x):
    """(rows, tiles, heads, TILE, 1) -> (rows, tiles, TILE, heads, 1), and back."""
    return ops.transpose(x, (0, 1, 3, 2, 4))
