"""Packed self-attention clip by clip in JAX: FlashAttention that visits only a clip's own tiles.

Static shapes and one compilation: a loop over tiles of TILE queries, and inside it a loop over the
tiles of TILE keys of the same clip. A tile begins where its clip does, or TILE further; what it
holds beyond the clip's end is masked. The softmax over the tiles of a clip runs online, and the
gradient computes it again from each query's logsumexp. PARALLEL query tiles go side by side, in
arrays (PARALLEL, heads, TILE, ...); the last ones may be empty tiles behind the tokens.

Inside, arrays are (heads, tokens, width), the rows end to end.

Reference: FlashAttention, Dao et al. 2022 (arXiv:2205.14135), whose names are used here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from keras_flexast.layers.clip_ranges import LOWEST, token_ranges

TILE, PARALLEL = 192, 2  # tiles of 64 to 512 tokens and 1 to 8 of them were timed on a CPU


def attend(query, key, value, segment_ids, *, scale=None):
    """Softmax attention of every token to the tokens of its own clip; see `kernels.Kernel`.

    All shapes are static. Padding gets zeros.
    """
    heads, width = query.shape[2:]
    query = query * (width**-0.5 if scale is None else scale)
    flat = [x.reshape(-1, heads, width).swapaxes(0, 1) for x in (query, key, value)]
    return _attention(*flat, segment_ids).swapaxes(0, 1).reshape(query.shape)


@jax.custom_vjp
def _attention(query, key, value, segment_ids):
    return _forward(query, key, value, segment_ids)[0]


def _forward(query, key, value, segment_ids):
    heads, tokens, width = query.shape
    steps, tiles = _query_tiles(segment_ids)
    queries, keys, values = _with_room((query, key, value))

    def visit_queries(step, done):
        tile = _at_step(tiles, step)
        q = _take(queries, tile.place)

        def visit_keys(places, inside, done):
            output, row_sum, row_max = done
            k, v = _take(keys, places), _take_inside(values, places, inside)
            logits = jnp.where(_transpose(inside), _matmul(q, _transpose(k)), -jnp.inf)
            new_max = jnp.maximum(row_max, logits.max(-1, keepdims=True))
            weights, shrink = jnp.exp(logits - new_max), jnp.exp(row_max - new_max)
            output = output * shrink + _matmul(weights.astype(v.dtype), v)
            return output, row_sum * shrink + weights.sum(-1, keepdims=True), new_max

        shape = PARALLEL, heads, TILE
        zeros, lowest = (jnp.full((*shape, 1), number) for number in (0.0, LOWEST))
        output, row_sum, row_max = _for_each_key_tile(
            visit_keys, tile, (jnp.zeros((*shape, width)), zeros, lowest)
        )
        row_sum = jnp.where(row_sum == 0, 1, row_sum)  # of an empty tile
        new = output / row_sum, row_max + jnp.log(row_sum)
        # What lies beyond the clip's end is put right by the tiles that follow.
        return tuple(_put(x, one, tile.place) for x, one in zip(done, new, strict=True))

    done = jnp.zeros_like(queries), jnp.zeros((*queries.shape[:2], 1), "float32")
    output, logsumexp = jax.lax.fori_loop(0, steps, visit_queries, done)
    output = jnp.where(jnp.ravel(segment_ids)[:, None] > 0, output[:, :tokens], 0)
    return output, (query, key, value, segment_ids, output, logsumexp)


def _backward(saved, d_output):
    query, key, value, segment_ids, output, logsumexp = saved
    tokens = query.shape[1]
    steps, tiles = _query_tiles(segment_ids)
    delta = (d_output.astype("float32") * output).sum(-1, keepdims=True)
    queries, keys, values, d_outputs, deltas = _with_room((query, key, value, d_output, delta))

    def visit_queries(step, done):
        d_query, d_key, d_value = done
        tile = _at_step(tiles, step)
        inside_q = _inside(tile.place, tile.clip_end)
        q = _take_inside(queries, tile.place, inside_q)
        d_out = _take_inside(d_outputs, tile.place, inside_q)
        row_logsumexp, row_delta = _take(logsumexp, tile.place), _take(deltas, tile.place)

        def visit_keys(places, inside, done):
            d_q, d_key, d_value = done
            k, v = _take_inside(keys, places, inside), _take_inside(values, places, inside)
            pairs = inside_q & _transpose(inside)
            weights = jnp.where(pairs, jnp.exp(_matmul(q, _transpose(k)) - row_logsumexp), 0)
            d_logits = jnp.where(pairs, weights * (_matmul(d_out, _transpose(v)) - row_delta), 0)
            weights, d_logits = weights.astype(q.dtype), d_logits.astype(q.dtype)
            return (
                d_q + _matmul(d_logits, k),
                _add(d_key, _matmul(_transpose(d_logits), q), places, inside),
                _add(d_value, _matmul(_transpose(weights), d_out), places, inside),
            )

        d_q, d_key, d_value = _for_each_key_tile(
            visit_keys, tile, (jnp.zeros(q.shape), d_key, d_value)
        )
        return _add(d_query, d_q, tile.place, inside_q), d_key, d_value

    done = tuple(jnp.zeros(queries.shape) for _ in range(3))
    gradients = jax.lax.fori_loop(0, steps, visit_queries, done)
    return (*(x[:, :tokens].astype(query.dtype) for x in gradients), None)


_attention.defvjp(_forward, _backward)


# === Tiles: where they are, and how they are read and written ===


class _Tiles(NamedTuple):
    """Query tiles, int32 (tiles,) each."""

    place: jax.Array  # first token of the tile
    clip_start: jax.Array  # first token of its clip
    clip_end: jax.Array  # first token behind its clip


def _query_tiles(segment_ids):
    """Number of steps of PARALLEL query tiles, and the _Tiles, empty ones behind the tokens."""
    rows, length = segment_ids.shape
    tokens, flat, places = rows * length, jnp.ravel(segment_ids), jnp.arange(rows * length)
    row = (jnp.arange(rows) * length)[:, None]
    start, end = (jnp.ravel(row + x) for x in token_ranges(segment_ids))
    is_tile = (flat > 0) & ((places - start) % TILE == 0)
    (place,) = jnp.nonzero(is_tile, size=tokens + PARALLEL, fill_value=tokens)
    start, end = (jnp.append(x, tokens)[place] for x in (start, end))
    return (is_tile.sum() + PARALLEL - 1) // PARALLEL, _Tiles(place, start, end)


def _at_step(tiles, step):
    """The PARALLEL tiles of one step."""
    start = step * PARALLEL
    return _Tiles(*(jax.lax.dynamic_slice_in_dim(x, start, PARALLEL) for x in tiles))


def _for_each_key_tile(visit, tile, done):
    """`done` after `visit(places, inside, done)` of every key tile of the clips."""
    starts, ends = tile.clip_start, tile.clip_end

    def body(index, done):
        places = starts + index * TILE
        # A clip with fewer tiles than the one beside it has none left: what lies behind the last
        # token is read as the room there, since dynamic slices clamp, and none of it is inside.
        return visit(places, _inside(places, ends), done)

    return jax.lax.fori_loop(0, ((ends - starts + TILE - 1) // TILE).max(), body, done)


def _inside(places, ends):
    """Which tokens of each tile are its clip's, (PARALLEL, 1, TILE, 1)."""
    return (places[:, None] + jnp.arange(TILE) < ends[:, None])[:, None, :, None]


def _with_room(arrays):
    """The arrays with room for the last tile, which may reach beyond the last token."""
    return [jnp.pad(x, ((0, 0), (0, TILE), (0, 0))) for x in arrays]


def _take(x, places):
    slices = [jax.lax.dynamic_slice_in_dim(x, place, TILE, 1) for place in places]
    return jnp.stack(slices)


def _take_inside(x, places, inside):
    """`_take`, with zeros outside the clip: no weight of 0 may meet a neighbor's NaN."""
    return jnp.where(inside, _take(x, places), 0)


def _put(x, tiles, places):
    for tile, place in zip(tiles, places, strict=True):
        x = jax.lax.dynamic_update_slice_in_dim(x, tile.astype(x.dtype), place, 1)
    return x


def _add(x, tiles, places, inside):
    tiles = jnp.where(inside, tiles, 0)
    for tile, place in zip(tiles, places, strict=True):  # in turn: both may be the same place
        sums = jax.lax.dynamic_slice_in_dim(x, place, TILE, 1) + tile
        x = jax.lax.dynamic_update_slice_in_dim(x, sums, place, 1)
    return x


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type="float32")


def _transpose(x):
    return jnp.swapaxes(x, -1, -2)
