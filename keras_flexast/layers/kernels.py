"""The implementations of packed self-attention, in one table, and the choice between them.

Every kernel computes the same numbers: softmax attention of each token to the tokens of its own
clip. They differ in where they run and in what they cost. A new kernel is one function, in a file
of its own, and one row of KERNELS.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops

# Tokens in a row; shorter rows gain nothing, and lose with tiny clips: measured on CPUs alone.
CLIP_BY_CLIP_FROM = 512
# The same for bands of keras.ops on a GPU, for the sake of memory, which a mask fills in long rows.
# In rows of 2,048 on an H200 bands take six times as long as the mask; longer ones were not timed.
BANDS_FROM = 4096


class Site(NamedTuple):
    """Where a layer is traced."""

    backend: str  # "tensorflow", "jax" or "torch"
    device: str  # "cpu", "gpu" or "tpu"
    distributed: bool  # whether several devices share the work
    length: int | None  # tokens in a row; None where the trace does not know it
    width: int | None  # of a head
    dtype: str  # of query, key and value
    xla: bool  # whether XLA compiles what is traced


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One row of KERNELS.

    Args:
        function: function of query, key and value, each float (rows, length, heads, width),
            segment_ids, int (rows, length), the tokens of a clip side by side, and scale, the
            factor on the query-key products (None for 1 / sqrt(width)); it returns float
            (rows, length, heads, width), finite numbers without meaning for padding.
        works: function from a Site to whether the kernel runs there; it may try the kernel.
        preferred: function from a Site to whether "auto" takes the kernel where it works.
        supports_jit: whether XLA compiles the kernel.
    """

    function: Callable
    works: Callable
    preferred: Callable
    supports_jit: bool = True


def dense_mask(query, key, value, segment_ids, *, scale=None):
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
        other query gets the numbers that it would get without that token.
    """
    finite = ops.all(ops.isfinite(value), axis=(2, 3))
    value = ops.where(finite[:, :, None, None], value, 0)
    attended = ops.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale)
    return ops.where(sees_nonfinite(mask, finite)[:, :, None, None], float("nan"), attended)


def sees_nonfinite(mask, finite):
    """Whether each query sees a token that is not finite, bool (rows, queries).

    A mask gives a hidden token the weight 0, but 0 times NaN is NaN. So masked sums are taken
    over zeros in place of tokens that are not `finite`, bool (rows, tokens), and the queries
    that see one are marked here.
    """
    return ops.any(ops.logical_and(mask, ops.logical_not(finite)[:, None, :]), axis=-1)


def _from_file(name):
    """Import a file's `attend` on first use: TensorFlow and JAX are optional."""

    def attend(*arguments, scale=None):
        module = importlib.import_module(f"keras_flexast.layers.{name}")
        return module.attend(*arguments, scale=scale)

    return attend


def _long_rows_on(device, *, least=CLIP_BY_CLIP_FROM, several=False):
    """Function from a Site to whether this is one such device, or several, with long rows."""

    def preferred(site):
        here = site.device == device and (several or not site.distributed)
        return here and site.length is not None and site.length >= least

    return preferred


def _triton_works(site):
    """Whether the Triton kernels run at a Site; on a GPU they are tried once."""
    if site.backend != "jax" or site.length is None or site.distributed:
        return False
    if site.device == "gpu":
        from keras_flexast.layers import clip_triton

        return clip_triton.works_here(dense_mask, site.width, site.dtype)
    return site.device == "cpu"  # interpreted


KERNELS = {  # "auto" takes the first that works and is preferred
    "clip_loop": Kernel(
        _from_file("clip_loop"),
        works=lambda site: site.backend == "tensorflow" and not site.xla,
        preferred=_long_rows_on("cpu"),  # a clip is work enough for all cores
        supports_jit=False,  # its arrays have the lengths of the clips
    ),
    "clip_tiles": Kernel(
        _from_file("clip_tiles"),
        works=lambda site: site.backend == "jax" and site.length is not None,
        preferred=_long_rows_on("cpu"),
    ),
    "clip_triton": Kernel(
        _from_file("clip_triton"),
        works=_triton_works,
        preferred=_long_rows_on("gpu"),
    ),
    "clip_bands": Kernel(
        _from_file("clip_bands"),
        works=lambda site: site.backend in ("tensorflow", "jax") and site.length is not None,
        preferred=_long_rows_on("gpu", least=BANDS_FROM, several=True),
    ),
    "dense": Kernel(dense_mask, works=lambda site: True, preferred=lambda site: True),
}


def choose_kernel(attention, site):
    """The Kernel with a name at a Site; "auto" gives the first that works and is preferred."""
    if attention == "auto":
        return next(k for k in KERNELS.values() if k.preferred(site) and k.works(site))
    if not KERNELS[attention].works(site):
        able = ", ".join(repr(name) for name, kernel in KERNELS.items() if kernel.works(site))
        raise RuntimeError(
            f"attention={attention!r} does not work here ({site}). Choose 'auto', or one of {able}."
        )
    return KERNELS[attention]


def current_site(length, width=None, dtype="float32"):
    """The Site of what is being traced; a length that is no int is unknown."""
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
    return Site(backend, device, distributed, length=length, width=width, dtype=dtype, xla=xla)
