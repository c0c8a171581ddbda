"""Transformer audio classification that is free of fixed sizes.

One set of weights runs at any patch size, on clips of any length, at any frame shift.
Importing and training need Keras and NumPy only; TensorFlow is needed for data and export.
"""

import os
import sys

if os.path.basename("".join(sys.argv[:1])) == "flexast":
    # TensorFlow reads it once, when Keras imports it; an export would write a page of notes.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_flexast.conversion.convert import convert_checkpoint
from keras_flexast.layers import MaskAttentionPooling, MaskedSelfAttention, PIResizePatchEmbed
from keras_flexast.models import ElasticAST, FlexiAST, PackedAST, fixed_model

__version__ = "0.1.0"

__all__ = [
    "ElasticAST",
    "FlexiAST",
    "MaskAttentionPooling",
    "MaskedSelfAttention",
    "PIResizePatchEmbed",
    "PackedAST",
    "convert_checkpoint",
    "fixed_model",
]
