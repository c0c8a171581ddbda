"""Packed self-attention in JAX on an NVIDIA GPU: FlashAttention that visits a clip's own tiles.

Three Pallas kernels, which Triton compiles: one for the output, one for the gradient of the
queries, one for those of keys and values. Each program has one tile of TILE tokens of one head,
and visits only the blocks of tokens that hold tokens of the same clips. On a CPU the same kernels
are interpreted, which is for tests: exact, and slow.

JAX's own `pallas.ops.gpu.attention.mha` masks the tiles of other clips and computes them all the
same, so that a row costs the square of its length.

Inside, arrays are (rows, length, heads, width); length is a multiple of TILE and width a power
of two. What is one number for each token and head is (rows, heads, length).

Reference: FlashAttention-2, Dao 2023 (arXiv:2307.08691), whose names are used here.
"""

import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from keras_flexast.layers.clip_ranges import LOWEST, in_tiles


class Loop(NamedTuple):
    """How the programs of a kernel visit other tokens."""

    visited: int  # tokens at a time, which divide TILE
    warps: int
    stages: int  # of the pipeline that loads them ahead


# The fastest of those that examples/benchmarks/gpu/kernels.py tries, on an H200.
TILE = 64
OUTPUT_LOOP, QUERY_LOOP, KEY_LOOP = Loop(32, 4, 3), Loop(64, 4, 3), Loop(64, 4, 3)
NARROWEST = 16  # width of a matrix product on tensor cores
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}  # of numbers around 1
log = logging.getLogger(__name__)


def attend(query, key, value, segment_ids, *, scale=None):
    """Softmax attention of every token to the tokens of its own clip; see `kernels.Kernel`.

    All shapes are static. Padding gets zeros.
    """
    width = max(NARROWEST, 1 << (query.shape[3] - 1).bit_length())
    return in_tiles(_rows, query, key, value, segment_ids, tile=TILE, scale=scale, width=width)


@functools.cache
def works_here(expected, width, dtype):
    """Whether this GPU compiles the kernels, and they give the numbers of another one.

    They are tried once; where they fail, the log says why.

    Args:
        expected: function of the other kernel.
        width: width of a head.
        dtype: name of the dtype of query, key and value.
    """
    try:
        with ThreadPoolExecutor(1) as thread:  # JAX may be tracing a model in this one
            error = thread.submit(largest_error, expected, width, dtype).result()
    except Exception as failure:  # of any compiler
        problem = str(failure).strip().partition("\n")[0] or type(failure).__name__
    else:
        if error < TOLERANCES.get(dtype, 0):
            return True
        problem = f"{dtype} numbers differ by {error:.1e}"
    log.warning("'clip_triton' fails on this GPU and is left out: %s.", problem)
    return False


def largest_error(expected, width, dtype):
    """Largest difference to another kernel here, of output and gradients of a small row."""
    arrays = np.random.default_rng(0).normal(size=(4, 1, 3 * TILE, 2, width))
    ids = np.repeat([1, 2, 3, 0], [70, 5, 100, 3 * TILE - 175])[None].astype("int32")
    real = (ids > 0)[..., None, None]

    def results(kernel):
        def loss(query, key, value, cotangent):
            output = jnp.where(real, kernel(query, key, value, ids), 0)
            return (output * cotangent).sum(dtype="float32"), output

        given = (jnp.asarray(x, dtype) for x in arrays)
        with jax.default_matmul_precision("highest"):  # not TF32
            step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
            (_, output), gradients = step(*given)
        return output, *gradients

    pairs = zip(results(attend), results(expected), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


class _Clips(NamedTuple):
    """Where the clips lie, int32: a range of tokens for each tile, and the segment ids."""

    begin: jax.Array  # (rows, tiles), see `tile_ranges`
    end: jax.Array
    ids: jax.Array  # (rows, length)


def _rows(query, key, value, ids, begin, end, scale):
    return _attention(query, key, value, _Clips(begin, end, ids), float(scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(query, key, value, clips, scale):
    return _forward(query, key, value, clips, scale)[0]


def _forward(query, key, value, clips, scale):
    rows, length, heads, _ = query.shape
    output, logsumexp = _run(
        _output_kernel, OUTPUT_LOOP, scale, clips, own=(query,), others=(key, value),
        results=(query, jax.ShapeDtypeStruct((rows, heads, length), "float32")),
    )  # fmt: skip
    return output, (query, key, value, clips, output, logsumexp)


def _backward(scale, saved, d_output):
    query, key, value, clips, output, logsumexp = saved
    delta = jnp.einsum("rthw,rthw->rht", *(x.astype("float32") for x in (d_output, output)))
    of_queries = query, d_output, logsumexp, delta
    (d_query,) = _run(
        _query_kernel, QUERY_LOOP, scale, clips, own=of_queries, others=(key, value),
        results=(query,),
    )  # fmt: skip
    d_key, d_value = _run(
        _key_kernel, KEY_LOOP, scale, clips, own=(key, value), others=of_queries,
        results=(key, value),
    )  # fmt: skip
    return d_query, d_key, d_value, None


_attention.defvjp(_forward, _backward)


# === Kernels: own are this program's tile, others all tokens of the row ===


def _output_kernel(clips, own, others, output_ref, logsumexp_ref, *, scale, visited):
    (query,), (keys, values) = own, others
    q = triton.load(query)

    def visit(pairs, places, carry):
        output, row_sum, row_max = carry
        k, v = triton.load(keys.at[places]), triton.load(values.at[places])
        logits = jnp.where(pairs, _dot(q, k.T) * scale, LOWEST)
        new_max = jnp.maximum(row_max, logits.max(1))
        weights = jnp.exp(logits - new_max[:, None])
        shrink = jnp.exp(row_max - new_max)
        output = output * shrink[:, None] + _dot(weights.astype(v.dtype), v)
        return output, row_sum * shrink + weights.sum(1), new_max

    zeros, column = jnp.zeros(q.shape, "float32"), jnp.zeros(TILE, "float32")
    carry = zeros, column, column + LOWEST / 2  # so that what is masked has the weight 0
    output, row_sum, row_max = _for_each_block(clips, visited, visit, carry)
    row_sum = jnp.where(row_sum == 0, 1, row_sum)  # of padding
    triton.store(output_ref, (output / row_sum[:, None]).astype(output_ref.dtype))
    triton.store(logsumexp_ref, row_max + jnp.log(row_sum))


def _query_kernel(clips, own, others, d_query_ref, *, scale, visited):
    q, d_out, logsumexp, delta = map(triton.load, own)
    keys, values = others

    def visit(pairs, places, d_query):
        k, v = triton.load(keys.at[places]), triton.load(values.at[places])
        weights = jnp.where(pairs, jnp.exp(_dot(q, k.T) * scale - logsumexp[:, None]), 0)
        d_logits = jnp.where(pairs, weights * (_dot(d_out, v.T) - delta[:, None]), 0)
        return d_query + _dot(d_logits.astype(k.dtype), k)

    d_query = _for_each_block(clips, visited, visit, jnp.zeros(q.shape, "float32"))
    triton.store(d_query_ref, (d_query * scale).astype(d_query_ref.dtype))


def _key_kernel(clips, own, others, d_key_ref, d_value_ref, *, scale, visited):
    k, v = map(triton.load, own)

    def visit(pairs, places, carry):
        d_key, d_value = carry
        q, d_out, logsumexp, delta = (triton.load(x.at[places]) for x in others)
        weights = jnp.where(pairs, jnp.exp(_dot(k, q.T) * scale - logsumexp[None]), 0)
        d_logits = jnp.where(pairs, weights * (_dot(v, d_out.T) - delta[None]), 0)
        d_value += _dot(weights.astype(d_out.dtype), d_out)
        return d_key + _dot(d_logits.astype(q.dtype), q), d_value

    zeros = jnp.zeros(k.shape, "float32")
    d_key, d_value = _for_each_block(clips, visited, visit, (zeros, zeros))
    triton.store(d_key_ref, (d_key * scale).astype(d_key_ref.dtype))
    triton.store(d_value_ref, d_value.astype(d_value_ref.dtype))


def _for_each_block(clips, visited, visit, carry):
    """The carry after `visit(pairs, places, carry)` of all tokens of the same clips.

    `visited` of them come at a time, at `places`; `pairs` (TILE, visited) tells which are of one
    clip.
    """
    own_ids = triton.load(clips.ids.at[pl.ds(pl.program_id(0) * TILE, TILE)])

    def body(index, carry):
        places = pl.ds(index * visited, visited)
        other_ids = triton.load(clips.ids.at[places])
        pairs = (own_ids[:, None] == other_ids[None]) & (other_ids > 0)[None]
        return visit(pairs, places, carry)

    first = triton.load(clips.begin) // visited
    last = (triton.load(clips.end) + visited - 1) // visited
    return jax.lax.fori_loop(first, last, body, carry)


def _dot(a, b):
    """Matrix product in float32, of float32 without the 10 bits of TF32."""
    return triton.dot(a, b, allow_tf32=False) if a.dtype == "float32" else triton.dot(a, b)


# === How a kernel is started ===


def _run(kernel, loop, scale, clips, *, own, others, results):
    """Run a kernel for each tile of each row and head.

    Args:
        kernel: function of references to clips, own, others and each result, of scale, and of
            the tokens that it visits at a time.
        loop: Loop.
        scale: factor on the query-key products.
        clips: _Clips.
        own: tuple of arrays of which a program has its own tile: (rows, length, heads, width), or
            (rows, heads, length).
        others: tuple of such arrays of which it has all tokens.
        results: tuple of arrays with the shapes and dtypes of the results.

    Returns:
        List of arrays.
    """
    rows, length, heads, _ = own[0].shape

    def tile_spec(x):
        if len(x.shape) == 3:
            return pl.BlockSpec((None, None, TILE), lambda tile, row, head: (row, head, tile))
        shape = None, TILE, None, x.shape[3]
        return pl.BlockSpec(shape, lambda tile, row, head: (row, tile, head, 0))

    def row_spec(x):
        if len(x.shape) == 3:
            return pl.BlockSpec((None, None, length), lambda tile, row, head: (row, head, 0))
        shape = None, length, None, x.shape[3]
        return pl.BlockSpec(shape, lambda tile, row, head: (row, 0, head, 0))

    scalar_spec = pl.BlockSpec((None, None), lambda tile, row, head: (row, tile))
    ids_spec = pl.BlockSpec((None, length), lambda tile, row, head: (row, 0))

    def call(interpret):
        return pl.pallas_call(
            functools.partial(kernel, scale=scale, visited=loop.visited),
            grid=(length // TILE, rows, heads),
            in_specs=(
                _Clips(scalar_spec, scalar_spec, ids_spec),
                tuple(map(tile_spec, own)),
                tuple(map(row_spec, others)),
            ),
            out_specs=tuple(map(tile_spec, results)),
            out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results),
            compiler_params=triton.CompilerParams(num_warps=loop.warps, num_stages=loop.stages),
            interpret=interpret,
            name=kernel.__name__.strip("_"),
        )

    return jax.lax.platform_dependent(clips, own, others, cpu=call(True), cuda=call(False))
