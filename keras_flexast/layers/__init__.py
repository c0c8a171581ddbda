from keras_flexast.layers.attention import (
    MaskAttentionPooling,
    MaskedSelfAttention,
    MeanPooling,
    PrefixPooling,
)
from keras_flexast.layers.embedding import (
    PatchGrid,
    PIResizePatchEmbed,
    PositionEmbedding,
    PrefixTokens,
)
from keras_flexast.layers.encoder import EncoderBlock

__all__ = [
    "EncoderBlock",
    "MaskAttentionPooling",
    "MaskedSelfAttention",
    "MeanPooling",
    "PIResizePatchEmbed",
    "PatchGrid",
    "PositionEmbedding",
    "PrefixPooling",
    "PrefixTokens",
]
