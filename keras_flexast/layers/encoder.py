"""The transformer block of ViT, on packed rows."""

import functools

import keras

from keras_flexast.layers.attention import MaskedSelfAttention
from keras_flexast.layers.configured import ConfiguredLayer


@keras.saving.register_keras_serializable(package="keras_flexast")
class EncoderBlock(ConfiguredLayer):
    """Pre-norm transformer block: masked self-attention, then a two-layer GELU network.

    Args:
        num_heads: number of attention heads.
        mlp_dim: width of the hidden layer.
        dropout: dropout rate of both outputs.
        scale, attention: as in MaskedSelfAttention.
        norm_epsilon: epsilon of both LayerNorms.
        remat: gradient checkpointing: keep only the block's input while training, and compute
            the rest again for the gradient. Less memory for about a third more time; the
            numbers are the same.

    Call arguments:
        tokens: float (rows, length, dim).
        segment_ids: int (rows, length) or None, see MaskedSelfAttention.

    Output:
        float (rows, length, dim).

    Reference: ViT, Dosovitskiy et al. 2020 (arXiv:2010.11929).
    """

    def __init__(
        self, num_heads, mlp_dim, *, dropout=0.0, scale=None, norm_epsilon=1e-6, attention="auto",
        remat=False, **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        if remat and dropout:
            raise ValueError(
                f"dropout={dropout} would be drawn anew when remat=True computes a block again. "
                f"Train without dropout, or without remat."
            )
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.dropout = dropout
        self.scale = scale
        self.norm_epsilon = norm_epsilon
        self.attention = attention
        self.remat = remat

    def build(self, tokens_shape, segment_ids_shape=None):
        policy, dim = self.dtype_policy, tokens_shape[-1]

        def norm(name):
            return keras.layers.LayerNormalization(
                epsilon=self.norm_epsilon, dtype=policy, name=name
            )

        self.attention_norm = norm("attention_norm")
        self.self_attention = MaskedSelfAttention(
            self.num_heads, self.scale, self.dropout, self.attention, dtype=policy, name="attention"
        )
        self.mlp_norm = norm("mlp_norm")
        self.mlp_hidden = keras.layers.Dense(self.mlp_dim, dtype=policy, name="mlp_hidden")
        self.mlp_output = keras.layers.Dense(dim, dtype=policy, name="mlp_output")
        self.mlp_dropout = keras.layers.Dropout(self.dropout, dtype=policy)
        for layer in (self.attention_norm, self.self_attention, self.mlp_norm, self.mlp_hidden):
            layer.build(tokens_shape)
        self.mlp_output.build((*tokens_shape[:-1], self.mlp_dim))
        self.built = True

    def call(self, tokens, segment_ids=None, training=None):
        if self.remat and training:
            # keras.RematScope would make `training` a traced value, which fails on both backends.
            return keras.remat(functools.partial(self._block, training=True))(tokens, segment_ids)
        return self._block(tokens, segment_ids, training=training)

    def _block(self, tokens, segment_ids, training):
        x = self.attention_norm(tokens)
        tokens = tokens + self.self_attention(x, segment_ids, training=training)
        x = keras.activations.gelu(self.mlp_hidden(self.mlp_norm(tokens)), approximate=False)
        return tokens + self.mlp_dropout(self.mlp_output(x), training=training)

    def compute_output_shape(self, tokens_shape, segment_ids_shape=None):
        return tokens_shape
