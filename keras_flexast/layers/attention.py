"""Attention and pooling that stop at the borders between the clips of a row."""

import keras
from keras import ops

from keras_flexast.layers.kernels import attend_by_clip


def segment_mask(segment_ids):
    """True where two tokens of a row belong to the same clip.

    Padding tokens (id 0) see each other, so that no softmax runs over nothing.

    Args:
        segment_ids: int (rows, length).

    Returns:
        bool (rows, length, length).
    """
    return ops.equal(segment_ids[:, :, None], segment_ids[:, None, :])


def slot_mask(segment_ids, segments):
    """True where a token belongs to the clip of a slot.

    Args:
        segment_ids: int (rows, length); ids 1 ... segments.
        segments: number of slots.

    Returns:
        bool (rows, segments, length).
    """
    slots = ops.arange(1, segments + 1, dtype=segment_ids.dtype)
    return ops.equal(slots[None, :, None], segment_ids[:, None, :])


class _Attention(keras.layers.Layer):
    """Projections shared by self-attention and pooling."""

    def __init__(self, num_heads, scale=None, dropout=0.0, **kwargs):
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

    def _attend(self, queries, tokens, mask, training):
        """queries (b, q, dim), tokens (b, t, dim), mask (b, q, t) or None -> (b, q, dim)."""
        attended = ops.dot_product_attention(
            *self._project(queries, tokens),
            mask=None if mask is None else mask[:, None],
            scale=self.scale,
        )
        return self._output(attended, training)

    def _output(self, attended, training):
        """(b, q, heads, width) -> (b, q, dim)."""
        attended = ops.reshape(attended, (*ops.shape(attended)[:2], -1))
        return self.dropout_layer(self.output_dense(attended), training=training)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "scale": self.scale,
            "dropout": self.dropout,
        }


@keras.saving.register_keras_serializable(package="keras_flexast")
class MaskedSelfAttention(_Attention):
    """Multi-head self-attention in which a token sees only the tokens of its own clip.

    Args:
        num_heads: attention heads; divides the width.
        scale: factor on the query-key products; None for 1 / sqrt(width of a head).
            ElasticAST's published weights need 1.0.
        dropout: rate, on the output.

    Call arguments:
        tokens: float (rows, length, dim).
        segment_ids: int (rows, length), 1, 2, ... per clip, 0 for padding; None when every
            row is one clip without padding.

    Output:
        float (rows, length, dim). Padding tokens hold finite numbers without meaning.

    Attributes:
        by_clip: attend clip by clip instead of under a dense mask: the same numbers, see
            `attend_by_clip`. `PackedAST.choose_attention` sets it.

    Reference: ElasticAST, Feng et al. 2024 (arXiv:2407.08691), section 2.2.
    """

    by_clip = False

    def build(self, tokens_shape, segment_ids_shape=None):
        self._build_projections(tokens_shape[-1])
        self.built = True

    def call(self, tokens, segment_ids=None, training=None):
        if segment_ids is not None and self.by_clip:
            query, key, value = self._project(tokens, tokens)
            scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
            return self._output(attend_by_clip(query * scale, key, value, segment_ids), training)
        mask = None if segment_ids is None else segment_mask(segment_ids)
        return self._attend(tokens, tokens, mask, training)

    def compute_output_shape(self, tokens_shape, segment_ids_shape=None):
        return tokens_shape


@keras.saving.register_keras_serializable(package="keras_flexast")
class MaskAttentionPooling(_Attention):
    """One vector per clip: a learned query, repeated for every slot, attends to its clip.

    Args:
        num_heads: attention heads; divides the width.
        segments: clip slots in a row.
        scale, dropout: as MaskedSelfAttention.

    Call arguments:
        tokens: float (rows, length, dim).
        segment_ids: int (rows, length); None when every row is one clip: one slot then.

    Output:
        float (rows, segments, dim). An empty slot
        holds finite numbers without meaning; its weight is 0.

    Reference: ElasticAST, Feng et al. 2024 (arXiv:2407.08691), section 2.3.
    """

    def __init__(self, num_heads, segments=16, scale=None, dropout=0.0, **kwargs):
        super().__init__(num_heads, scale, dropout, **kwargs)
        self.segments = segments

    def build(self, tokens_shape, segment_ids_shape=None):
        dim = tokens_shape[-1]
        self.query = self.add_weight(
            shape=(dim,), initializer=keras.initializers.TruncatedNormal(stddev=0.02), name="query"
        )
        self._build_projections(dim)
        self.built = True

    def call(self, tokens, segment_ids=None, training=None):
        slots = 1 if segment_ids is None else self.segments
        shape = (ops.shape(tokens)[0], slots, tokens.shape[-1])
        queries = ops.broadcast_to(ops.cast(self.query, tokens.dtype), shape)
        mask = None if segment_ids is None else slot_mask(segment_ids, slots)
        return self._attend(queries, tokens, mask, training)

    def compute_output_shape(self, tokens_shape, segment_ids_shape=None):
        slots = 1 if segment_ids_shape is None else self.segments
        return (tokens_shape[0], slots, tokens_shape[-1])

    def get_config(self):
        return {**super().get_config(), "segments": self.segments}


@keras.saving.register_keras_serializable(package="keras_flexast")
class PrefixPooling(keras.layers.Layer):
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
        mine = ops.logical_and(
            slot_mask(segment_ids, self.segments), self._is_chosen(positions)[:, None, :]
        )
        mine = ops.cast(mine, "float32")
        count = ops.maximum(ops.sum(mine, -1, keepdims=True), 1)
        pooled = ops.matmul(ops.cast(mine, tokens.dtype), tokens)
        return pooled / ops.cast(count, tokens.dtype)

    def _chosen(self, tokens):
        return tokens[:, : self.count]

    def _is_chosen(self, positions):
        return ops.equal(positions[..., 2], 0)

    def compute_output_shape(self, tokens_shape, positions_shape=None, segment_ids_shape=None):
        slots = 1 if segment_ids_shape is None else self.segments
        return (tokens_shape[0], slots, tokens_shape[-1])

    def get_config(self):
        return {**super().get_config(), "count": self.count, "segments": self.segments}


@keras.saving.register_keras_serializable(package="keras_flexast")
class MeanPooling(PrefixPooling):
    """One vector per clip: the mean of its tokens, prefix tokens left out.

    Arguments and output as PrefixPooling.

    Reference: SSAST, Gong et al. 2022 (arXiv:2110.09784), its fine-tuning.
    """

    def _chosen(self, tokens):
        return tokens[:, self.count :]

    def _is_chosen(self, positions):
        return ops.not_equal(positions[..., 2], 0)
