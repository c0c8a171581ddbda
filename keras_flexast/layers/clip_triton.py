"""Packed self-attention in JAX on an NVIDIA GPU: FlashAttention that visits a clip's own blocks.

Three Pallas kernels, which Triton compiles: one for the output, one for the gradient of the
queries, one for those of keys and values. Each program has one block of BLOCK tokens of one head,
and goes through the blocks of the clips that have a token in it; blocks of other clips are not
read. On a CPU the same kernels are interpreted, which is for tests: exact, and slow.

JAX's own `pallas.ops.gpu.attention.mha` masks the blocks of other clips and computes them all the
same, so that a row costs the square of its length.

Inside, arrays are (rows, length, heads, width); length is a multiple of BLOCK and width a power
of two.

Reference: FlashAttention-2, Dao 2023 (arXiv:2307.08691), whose names are used here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from keras_flexast.layers.clip_ranges import tile_ranges, token_ranges, without_nonfinite

BLOCK = 64
NARROWEST = 16  # width of a matrix product on tensor cores
WARPS, STAGES = 4, 2
LOWEST = -1e30


def attend(query, key, value, segment_ids, *, scale=None):
    """Softmax attention of every token to the tokens of its own clip; see `kernels.Kernel`.

    All shapes are static. Padding gets zeros.
    """
    length, _, width = query.shape[1:]
    scale = width**-0.5 if scale is None else scale
    room = (0, 0), (0, -length % BLOCK)
    wide = max(NARROWEST, 1 << (width - 1).bit_length())
    ids = jnp.pad(segment_ids.astype("int32"), room)
    begin, end = token_ranges(ids)
    query, key, value = (
        jnp.pad(x, (*room, (0, 0), (0, wide - width))) for x in (query, key, value)
    )
    value, spoilt = without_nonfinite(value, begin, end)
    ranges = tile_ranges(ids, begin, end, BLOCK)
    output = _attention(query, key, value, ids, ranges, float(scale))
    output = jnp.where((ids > 0)[..., None, None], output, 0)
    return jnp.where(spoilt[..., None, None], jnp.nan, output)[:, :length, :, :width]


def largest_error(expected, width, dtype):
    """Largest difference to another kernel here, of output and gradients of a small row."""
    rows = np.random.default_rng(0).normal(size=(4, 1, 3 * BLOCK, 2, width))
    ids = np.repeat([1, 2, 3, 0], [70, 5, 100, 3 * BLOCK - 175])[None].astype("int32")
    real = (ids > 0)[..., None, None]

    def found(kernel):
        def loss(query, key, value, slope):
            output = jnp.where(real, kernel(query, key, value, ids), 0)
            return (output * slope).sum(dtype="float32"), output

        given = (jnp.asarray(x, dtype) for x in rows)
        (_, output), slopes = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*given)
        return output, *slopes

    pairs = zip(found(attend), found(expected), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(query, key, value, ids, ranges, scale):
    return _forward(query, key, value, ids, ranges, scale)[0]


def _forward(query, key, value, ids, ranges, scale):
    columns = jnp.zeros((query.shape[0], *query.shape[2:0:-1]))  # rows, heads, length
    output, logsumexp = _run(
        _output_kernel, scale, (*ranges, ids), own=[query], others=[key, value],
        results=[query, columns],
    )  # fmt: skip
    return output, (query, key, value, ids, ranges, output, logsumexp)


def _backward(scale, saved, d_output):
    query, key, value, ids, ranges, output, logsumexp = saved
    delta = jnp.einsum("rthw,rthw->rht", *(x.astype("float32") for x in (d_output, output)))
    columns, clips = [logsumexp, delta], (*ranges, ids)
    (d_query,) = _run(
        _query_kernel, scale, clips, own=[query, d_output, *columns], others=[key, value],
        results=[query],
    )  # fmt: skip
    d_key, d_value = _run(
        _key_kernel, scale, clips, own=[key, value], others=[query, d_output, *columns],
        results=[key, value],
    )  # fmt: skip
    return d_query, d_key, d_value, None, None


_attention.defvjp(_forward, _backward)


# === Kernels ===


def _output_kernel(clips, scale, own, others, results):
    (query,), (keys, values) = own, others
    q = triton.load(query)

    def visit(pairs, places, done):
        output, row_sum, row_max = done
        k, v = triton.load(keys.at[places]), triton.load(values.at[places])
        logits = jnp.where(pairs, _dot(q, k.T) * scale, LOWEST)
        new_max = jnp.maximum(row_max, logits.max(1))
        weights = jnp.where(pairs, jnp.exp(logits - new_max[:, None]), 0)
        shrink = jnp.exp(row_max - new_max)
        output = output * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return output, row_sum * shrink + weights.sum(1), new_max

    zeros, column = jnp.zeros(q.shape, "float32"), jnp.zeros(BLOCK, "float32")
    done = _for_each_block(clips, visit, (zeros, column, column + LOWEST))
    output, row_sum, row_max = done
    row_sum = jnp.where(row_sum == 0, 1, row_sum)  # of padding
    outputs, logsumexps = results
    triton.store(outputs, (output / row_sum[:, None]).astype(outputs.dtype))
    triton.store(logsumexps, row_max + jnp.log(row_sum))


def _query_kernel(clips, scale, own, others, results):
    q, d_out, logsumexp, delta = map(triton.load, own)
    keys, values = others

    def visit(pairs, places, d_query):
        k, v = triton.load(keys.at[places]), triton.load(values.at[places])
        weights = jnp.where(pairs, jnp.exp(_dot(q, k.T) * scale - logsumexp[:, None]), 0)
        d_logits = weights * (_dot(d_out, v.T) - delta[:, None])
        return d_query + _dot(d_logits.astype(k.dtype), k)

    d_query = _for_each_block(clips, visit, jnp.zeros(q.shape, "float32"))
    triton.store(results[0], (d_query * scale).astype(results[0].dtype))


def _key_kernel(clips, scale, own, others, results):
    k, v = map(triton.load, own)

    def visit(pairs, places, done):
        d_key, d_value = done
        q, d_out, logsumexp, delta = (triton.load(x.at[places]) for x in others)
        weights = jnp.where(pairs, jnp.exp(_dot(k, q.T) * scale - logsumexp[None]), 0)
        d_logits = weights * (_dot(v, d_out.T) - delta[None])
        d_value += _dot(weights.astype(d_out.dtype), d_out)
        return d_key + _dot(d_logits.astype(q.dtype), q), d_value

    zeros = jnp.zeros(k.shape, "float32")
    d_key, d_value = _for_each_block(clips, visit, (zeros, zeros))
    triton.store(results[0], (d_key * scale).astype(results[0].dtype))
    triton.store(results[1], d_value.astype(results[1].dtype))


def _for_each_block(clips, visit, done):
    """`done` after `visit(pairs, places, done)` of the blocks of the clips that this one holds."""
    begin, end, ids = clips
    own_ids = triton.load(ids.at[pl.ds(pl.program_id(0) * BLOCK, BLOCK)])

    def body(index, done):
        places = pl.ds(index * BLOCK, BLOCK)
        other_ids = triton.load(ids.at[places])
        pairs = (own_ids[:, None] == other_ids[None]) & (other_ids > 0)[None]
        return visit(pairs, places, done)

    first, last = triton.load(begin) // BLOCK, (triton.load(end) + BLOCK - 1) // BLOCK
    return jax.lax.fori_loop(first, last, body, done)


def _dot(a, b):
    """Matrix product in float32, of float32 without the 10 bits of TF32."""
    return triton.dot(a, b, allow_tf32=False) if a.dtype == "float32" else triton.dot(a, b)


# === How a kernel is started ===


def _run(kernel, scale, clips, *, own, others, results):
    """Run a kernel for each block of each row and head.

    Args:
        kernel: function of references: clips, scale, own, others, results.
        scale: factor on the query-key products.
        clips: tuple of begin and end, int32 (rows, blocks), see `tile_ranges`, and segment ids.
        own: list of arrays of which a program has its own block: (rows, length, heads, width), or
            (rows, heads, length).
        others: list of such arrays of which it has all tokens.
        results: list of arrays with the shapes and dtypes of the results.

    Returns:
        List of arrays.
    """
    rows, length, heads, _ = own[0].shape

    def whole(x):
        if x.ndim == 3:
            return pl.BlockSpec((None, None, length), lambda block, row, head: (row, head, 0))
        shape = None, length, None, x.shape[3]
        return pl.BlockSpec(shape, lambda block, row, head: (row, 0, head, 0))

    def part(x):
        if x.ndim == 3:
            return pl.BlockSpec((None, None, BLOCK), lambda block, row, head: (row, head, block))
        shape = None, BLOCK, None, x.shape[3]
        return pl.BlockSpec(shape, lambda block, row, head: (row, block, head, 0))

    number = pl.BlockSpec((None, None), lambda block, row, head: (row, block))
    ids = pl.BlockSpec((None, length), lambda block, row, head: (row, 0))
    counts = len(clips), len(own), len(others)

    def start(*references):
        groups, references = [], list(references)
        for count in counts:
            groups.append(references[:count])
            del references[:count]
        kernel(groups[0], scale, *groups[1:], references)

    def call(interpret):
        return pl.pallas_call(
            start,
            grid=(length // BLOCK, rows, heads),
            in_specs=[number, number, ids, *map(part, own), *map(whole, others)],
            out_specs=[*map(part, results)],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )

    return jax.lax.platform_dependent(*clips, *own, *others, cuda=call(False), default=call(True))
