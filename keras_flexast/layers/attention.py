"""Attention and pooling that stop at the borders between the clips of a row."""

from typing import Any

import keras
from keras import ops

from keras_flexast.hints import Shape, Tensor
from keras_flexast.layers.configured import ConfiguredLayer
from keras_flexast.layers.kernels import (
    KERNELS,
    Kernel,
    choose_kernel,
    current_site,
    masked_attention,
    sees_nonfinite,
)
from tf_data_pipelines.settings import check_choice


def slot_mask(segment_ids, segments):
    """Whether each token belongs to the clip of each slot, bool (rows, segments, length)."""
    slots = ops.arange(1, segments + 1, dtype=segment_ids.dtype)
    return ops.equal(slots[None, :, None], segment_ids[:, None, :])


class _Attention(ConfiguredLayer):
    """Projections shared by self-attention and pooling."""

    def __init__(
        self, num_heads: int, scale: float | None = None, dropout: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.scale = scale
        self.dropout = dropout

    def _build_projections(self, dim):
        if dim % self.num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={self.num_heads}.")
        for name in ("query", "key", "value", "output"):
            dense = keras.layers.Dense(dim, dtype=self.dtype_policy, name=name)
            dense.build((None, None, dim))
            setattr(self, f"{name}_dense", dense)
        self.dropout_layer = keras.layers.Dropout(self.dropout, dtype=self.dtype_policy)

    def _project(self, queries, tokens):
        """(b, q, dim), (b, t, dim) -> query, key and value (b, q or t, heads, width)."""
        width = tokens.shape[-1] // self.num_heads

        def heads(x):
            return ops.reshape(x, (*ops.shape(x)[:2], self.num_heads, width))

        return (
            heads(self.query_dense(queries)),
            heads(self.key_dense(tokens)),
            heads(self.value_dense(tokens)),
        )

    def weights_of(self, queries: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """How much each query attends to each token, a mean over the heads.

        Args:
            queries: float (rows, queries, dim).
            tokens: float (rows, length, dim).
            mask: bool (rows, queries or 1, length), True where a query sees a token.

        Returns:
            float32 (rows, queries, length); the sum over the tokens is 1.
        """
        query, key, _ = self._project(queries, tokens)
        scale = self.scale or query.shape[-1] ** -0.5
        logits = ops.cast(ops.einsum("bqhw,bthw->bhqt", query, key), "float32") * scale
        logits = ops.where(mask[:, None], logits, -1e30)
        return ops.mean(ops.softmax(logits), 1)

    def _output(self, attended, training):
        """(b, q, heads, width) -> (b, q, dim)."""
        attended = ops.reshape(attended, (*ops.shape(attended)[:2], -1))
        return self.dropout_layer(self.output_dense(attended), training=training)


@keras.saving.register_keras_serializable(package="keras_flexast")
class MaskedSelfAttention(_Attention):
    """Multi-head self-attention in which a token sees only the tokens of its own clip.

    Args:
        num_heads: number of attention heads; it divides the width.
        scale: factor on the query-key products; None for 1 / sqrt(width of a head).
            ElasticAST's published weights need 1.0.
        dropout: dropout rate of the output.
        attention: name of the implementation, see `layers.kernels`: "dense", "clip_loop"
            (TensorFlow without XLA), "clip_tiles" (JAX), "clip_triton" (JAX on an NVIDIA GPU;
            interpreted on a CPU, for tests) or "clip_bands". "auto" chooses for the backend, the
            device and the row length each time the layer is traced: the fastest on a CPU; the
            order on a GPU is not measured yet. The numbers are the same. A name is saved with the
            model, so export one that was made with "auto" or "dense".

    Call arguments:
        tokens: float (rows, length, dim).
        segment_ids: int (rows, length), 1, 2, ... per clip, 0 for padding; None when every
            row is one clip without padding.

    Output:
        float (rows, length, dim). Padding tokens hold finite numbers without meaning.

    Reference: ElasticAST, Feng et al. 2024 (arXiv:2407.08691), section 2.2.
    """

    def __init__(
        self,
        num_heads: int,
        scale: float | None = None,
        dropout: float = 0.0,
        attention: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, scale, dropout, **kwargs)
        check_choice("attention", attention, ("auto", *KERNELS))
        self.attention = attention
        # Where XLA compiles, "auto" takes a kernel that XLA takes.
        self.supports_jit = attention == "auto" or KERNELS[attention].supports_jit

    def build(self, tokens_shape: Shape, segment_ids_shape: Shape | None = None) -> None:
        self._build_projections(tokens_shape[-1])
        self.built = True

    def call(
        self, tokens: Tensor, segment_ids: Tensor | None = None, training: bool | None = None
    ) -> Tensor:
        query, key, value = self._project(tokens, tokens)
        if segment_ids is None:
            attended = ops.dot_product_attention(query, key, value, scale=self.scale)
        else:
            kernel = self.kernel(tokens.shape[1])
            attended = kernel.function(query, key, value, segment_ids, scale=self.scale)
        return self._output(attended, training)

    def kernel(self, length: int | None) -> Kernel:
        """The Kernel that is taken here for rows of so many tokens; None where that is unknown."""
        width = self.query_dense.units // self.num_heads
        return choose_kernel(self.attention, current_site(length, width, self.compute_dtype))

    def compute_output_shape(
        self, tokens_shape: Shape, segment_ids_shape: Shape | None = None
    ) -> Shape:
        return tokens_shape


@keras.saving.register_keras_serializable(package="keras_flexast")
class MaskAttentionPooling(_Attention):
    """One vector per clip: a learned query, repeated for every slot, attends to its clip.

    Args:
        num_heads: number of attention heads; it divides the width.
        segments: clip slots in a row.
        scale, dropout: as in MaskedSelfAttention.

    Call arguments:
        tokens: float (rows, length, dim).
        segment_ids: int (rows, length); None when every row is one clip: one slot then.

    Output:
        float (rows, segments, dim). An empty slot holds finite numbers without meaning; its
        weight in the packed batch is 0.

    Reference: ElasticAST, Feng et al. 2024 (arXiv:2407.08691), section 2.3.
    """

    def __init__(
        self,
        num_heads: int,
        segments: int = 16,
        scale: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, scale, dropout, **kwargs)
        self.segments = segments

    def build(self, tokens_shape: Shape, segment_ids_shape: Shape | None = None) -> None:
        dim = tokens_shape[-1]
        self.query = self.add_weight(
            shape=(dim,), initializer=keras.initializers.TruncatedNormal(stddev=0.02), name="query"
        )
        self._build_projections(dim)
        self.built = True

    def call(
        self, tokens: Tensor, segment_ids: Tensor | None = None, training: bool | None = None
    ) -> Tensor:
        slots = 1 if segment_ids is None else self.segments
        shape = (ops.shape(tokens)[0], slots, tokens.shape[-1])
        queries = ops.broadcast_to(ops.cast(self.query, tokens.dtype), shape)
        query, key, value = self._project(queries, tokens)
        if segment_ids is None:
            attended = ops.dot_product_attention(query, key, value, scale=self.scale)
        else:
            mask = slot_mask(segment_ids, slots)
            attended = masked_attention(query, key, value, mask, scale=self.scale)
        return self._output(attended, training)

    def compute_output_shape(
        self, tokens_shape: Shape, segment_ids_shape: Shape | None = None
    ) -> Shape:
        slots = 1 if segment_ids_shape is None else self.segments
        return (tokens_shape[0], slots, tokens_shape[-1])


@keras.saving.register_keras_serializable(package="keras_flexast")
class PrefixPooling(ConfiguredLayer):
    """One vector per clip: the mean of its prefix tokens ([CLS], or [CLS] and distillation).

    Args:
        count: prefix tokens per clip.
        segments: clip slots in a row.

    Call arguments:
        tokens: float (rows, length, dim).
        positions: float (rows, length, 4); frequency extent 0 marks a prefix token. None
            when every row is one clip with its prefix tokens first.
        segment_ids: int (rows, length); None together with positions.

    Output:
        float (rows, segments, dim); zeros for an empty slot.
    """

    def __init__(self, count, segments=16, **kwargs):
        super().__init__(**kwargs)
        self.count = count
        self.segments = segments

    def call(self, tokens, positions=None, segment_ids=None):
        if segment_ids is None:
            return ops.mean(self._chosen(tokens), 1, keepdims=True)
        mask = ops.logical_and(
            slot_mask(segment_ids, self.segments), self._is_chosen(positions)[:, None, :]
        )
        finite = ops.all(ops.isfinite(tokens), axis=-1)
        weights = ops.cast(mask, "float32")
        count = ops.maximum(ops.sum(weights, -1, keepdims=True), 1)
        clean = ops.where(finite[:, :, None], tokens, 0)
        pooled = ops.matmul(ops.cast(weights, tokens.dtype), clean) / ops.cast(count, tokens.dtype)
        return ops.where(sees_nonfinite(mask, finite)[:, :, None], float("nan"), pooled)

    def _chosen(self, tokens):
        return tokens[:, : self.count]

    def _is_chosen(self, positions):
        return ops.equal(positions[..., 2], 0)

    def compute_output_shape(self, tokens_shape, positions_shape=None, segment_ids_shape=None):
        slots = 1 if segment_ids_shape is None else self.segments
        return (tokens_shape[0], slots, tokens_shape[-1])


@keras.saving.register_keras_serializable(package="keras_flexast")
class MeanPooling(PrefixPooling):
    """One vector per clip: the mean of its tokens, prefix tokens left out.

    Arguments and output are those of PrefixPooling.

    Reference: SSAST, Gong et al. 2022 (arXiv:2110.09784), its fine-tuning.
    """

    def _chosen(self, tokens):
        return tokens[:, self.count :]

    def _is_chosen(self, positions):
        return ops.not_equal(positions[..., 2], 0)
