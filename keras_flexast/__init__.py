"""Transformer audio classification that is free of fixed sizes.

One set of weights runs at any patch size, on clips of any length, at any frame shift.
Importing and training need Keras and NumPy only; TensorFlow is needed for data and export.
"""

import os
import sys

from keras_flexast.settings import VERSION

__version__ = VERSION

__all__ = [
    "ElasticAST",
    "FlexiAST",
    "MaskAttentionPooling",
    "MaskedSelfAttention",
    "PIResizePatchEmbed",
    "PackedAST",
    "PackedBackbone",
    "convert_checkpoint",
    "convert_run",
    "evaluate_run",
    "export_run",
    "fixed_model",
    "load_classifier",
    "train_run",
]

# The command `flexast` imports what each command needs, so that its help is there at once.
if os.path.basename("".join(sys.argv[:1])) not in ("flexast", "flexast.exe"):
    from keras_flexast.conversion import convert_checkpoint, convert_run
    from keras_flexast.evaluation import evaluate_run
    from keras_flexast.export import export_run
    from keras_flexast.inference import load_classifier
    from keras_flexast.layers import MaskAttentionPooling, MaskedSelfAttention, PIResizePatchEmbed
    from keras_flexast.models import ElasticAST, FlexiAST, PackedAST, PackedBackbone, fixed_model
    from keras_flexast.training import train_run
