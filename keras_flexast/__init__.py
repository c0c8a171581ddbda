"""Transformer audio classification that is free of fixed sizes.

One set of weights runs at any patch size, on clips of any length, at any frame shift.
Importing and training need no TensorFlow; reading sounds and exporting models do.
"""

import importlib
import os
import sys

from keras_flexast.settings import VERSION

__version__ = VERSION

_ROOMS = {  # public name: the module that has it
    "ElasticAST": "models",
    "FlexiAST": "models",
    "MaskAttentionPooling": "layers",
    "MaskedSelfAttention": "layers",
    "PIResizePatchEmbed": "layers",
    "PackedAST": "models",
    "PackedBackbone": "models",
    "Run": "runs",
    "compile_packed": "training",
    "convert_checkpoint": "conversion",
    "convert_run": "conversion",
    "evaluate_run": "evaluation",
    "export_run": "export",
    "fixed_model": "models",
    "load_classifier": "inference",
    "load_run": "runs",
    "train_run": "training",
}
__all__ = [*_ROOMS]


def __getattr__(name):
    if name not in _ROOMS:
        raise AttributeError(f"module 'keras_flexast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"keras_flexast.{_ROOMS[name]}"), name)


# Importing the package registers its layers with Keras. Only the command `flexast` loads what each
# of its commands needs, so that its help is there at once.
if os.path.basename("".join(sys.argv[:1])) not in ("flexast", "flexast.exe"):
    globals().update({name: __getattr__(name) for name in _ROOMS})
