"""The implementations of packed self-attention, in one table, and the choice between them.

Every kernel computes the same numbers: softmax attention of each token to the tokens of its own
clip. They differ in where they run and in what they cost. A new kernel is one function, in a file
of its own, and one row of KERNELS.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops

CLIP_BY_CLIP_FROM = 512  # tokens in a row; shorter rows gain nothing, and lose with tiny clips


class Site(NamedTuple):
    """Where a layer is traced.

    Args:
        backend: Keras's backend, "tensorflow", "jax" or "torch".
        device: kind of device, "cpu", "gpu" or "tpu".
        distributed: whether several devices share the work.
        length: tokens in a row; None where the trace does not know it.
        dtype: name of the dtype of query, key and value.
        xla: whether XLA compiles what is traced.
    """

    backend: str
    device: str
    distributed: bool
    length: int | None
    dtype: str
    xla: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One row of KERNELS.

    Args:
        function: function of query, key and value, each float (rows, length, heads, width),
            segment_ids, int (rows, length), and scale, the factor on the query-key products
            (None for 1 / sqrt(width)). It returns float (rows, length, heads, width).
        works: function from a Site to whether the kernel runs there.
        preferred: function from a Site to whether "auto" takes the kernel where it works.
        supports_jit: whether XLA compiles the kernel on TensorFlow.
    """

    function: Callable
    works: Callable
    preferred: Callable
    supports_jit: bool = True


def dense_mask(query, key, value, segment_ids, scale=None):
    """Attention under a block-diagonal mask: computes every pair of tokens of a row."""
    mask = ops.equal(segment_ids[:, :, None], segment_ids[:, None, :])
    return masked_attention(query, key, value, mask, scale=scale)


def masked_attention(query, key, value, mask, *, scale=None):
    """Softmax attention under a mask, without a trace of what the mask hides.

    Args:
        query: float (rows, queries, heads, width).
        key, value: float (rows, tokens, heads, width).
        mask: bool (rows, queries, tokens), True where a query sees a token.
        scale: factor on the query-key products; None for 1 / sqrt(width).

    Returns:
        float (rows, queries, heads, width). A query that sees a NaN or infinity gets NaN; any
        other query gets the finite numbers that it would get without that token.
    """
    finite = ops.all(ops.isfinite(value), axis=(2, 3))
    value = ops.where(finite[:, :, None, None], value, 0)
    attended = ops.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale)
    return ops.where(sees_nonfinite(mask, finite)[:, :, None, None], float("nan"), attended)


def sees_nonfinite(mask, finite):
    """Whether each query sees a token that is not finite.

    A mask gives a hidden token the weight 0, but 0 times NaN is NaN: so masked sums are taken
    over zeros in place of such tokens, and the queries that see one are marked here.

    Args:
        mask: bool (rows, queries, tokens), True where a query sees a token.
        finite: bool (rows, tokens).

    Returns:
        bool (rows, queries).
    """
    return ops.any(ops.logical_and(mask, ops.logical_not(finite)[:, None, :]), axis=-1)


def clip_loop(query, key, value, segment_ids, scale=None):
    """Clip by clip in a TensorFlow loop: no work for pairs of tokens of different clips."""
    from keras_flexast.layers.clip_loop import attend  # TensorFlow is optional

    return attend(query, key, value, segment_ids, scale)


def clip_tiles(query, key, value, segment_ids, scale=None):
    """Clip by clip in tiles of static shape, for JAX: FlashAttention with a loop over clips."""
    from keras_flexast.layers.clip_tiles import attend  # JAX is not loaded on other backends

    return attend(query, key, value, segment_ids, scale)


def _long_rows_on_one_cpu(site):
    """Where a loop over clips is fastest: a clip is work enough for all cores of a CPU."""
    on_one_cpu = site.device == "cpu" and not site.distributed
    return on_one_cpu and site.length is not None and site.length >= CLIP_BY_CLIP_FROM


KERNELS = {  # "auto" takes the first that works and is preferred
    "clip_loop": Kernel(
        clip_loop,
        works=lambda site: site.backend == "tensorflow" and not site.xla,
        preferred=_long_rows_on_one_cpu,
        supports_jit=False,  # arrays of clips of their own lengths
    ),
    "clip_tiles": Kernel(
        clip_tiles,
        works=lambda site: site.backend == "jax" and site.length is not None,
        preferred=_long_rows_on_one_cpu,
    ),
    "dense": Kernel(dense_mask, works=lambda site: True, preferred=lambda site: True),
}


def choose_kernel(attention, site):
    """The Kernel of a MaskedSelfAttention at a site.

    Args:
        attention: name in KERNELS, or "auto" for the first that works and is preferred.
        site: Site, as `current_site` tells it.

    Returns:
        Kernel.

    Raises:
        RuntimeError: the named kernel does not work at this site.
    """
    if attention == "auto":
        return next(k for k in KERNELS.values() if k.works(site) and k.preferred(site))
    if not KERNELS[attention].works(site):
        able = ", ".join(repr(name) for name, kernel in KERNELS.items() if kernel.works(site))
        raise RuntimeError(
            f"attention={attention!r} does not work here ({site}). Choose 'auto', or one of {able}."
        )
    return KERNELS[attention]


def current_site(length, dtype="float32"):
    """The Site of what is being traced.

    Args:
        length: tokens in a row; anything but an int (an unknown or symbolic size) is unknown.
        dtype: name of a dtype.
    """
    backend, device, distributed, xla = keras.backend.backend(), "cpu", False, True
    if backend == "jax":
        import jax

        device = jax.default_backend()
        distributed = keras.distribution.distribution() is not None
    elif backend == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.ops import control_flow_util  # no public function tells it

        device = "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
        distributed = tf.distribute.has_strategy()
        xla = not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        )
    length = length if isinstance(length, int) else None
    return Site(backend, device, distributed, length=length, dtype=dtype, xla=xla)
