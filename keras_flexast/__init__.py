"""Transformer audio classification that is free of fixed sizes.

One set of weights runs at any patch size, on clips of any length, at any frame shift.
Importing and training need no TensorFlow; reading sounds and exporting models do.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from keras_flexast.settings import VERSION

if TYPE_CHECKING:  # what `_ROOMS` loads, for those who check hints
    from keras_flexast.conversion import convert_checkpoint, convert_run
    from keras_flexast.evaluation import evaluate_run
    from keras_flexast.export import export_run
    from keras_flexast.inference import load_cascade, load_classifier
    from keras_flexast.layers import MaskAttentionPooling, MaskedSelfAttention, PIResizePatchEmbed
    from keras_flexast.models import ElasticAST, FlexiAST, PackedAST, PackedBackbone, fixed_model
    from keras_flexast.optimizers import compile_packed
    from keras_flexast.runs import Run, load_run
    from keras_flexast.training import train_run

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
    "compile_packed": "optimizers",
    "convert_checkpoint": "conversion",
    "convert_run": "conversion",
    "evaluate_run": "evaluation",
    "export_run": "export",
    "fixed_model": "models",
    "load_cascade": "inference",
    "load_classifier": "inference",
    "load_run": "runs",
    "train_run": "training",
}
__all__ = [
    "ElasticAST",
    "FlexiAST",
    "MaskAttentionPooling",
    "MaskedSelfAttention",
    "PIResizePatchEmbed",
    "PackedAST",
    "PackedBackbone",
    "Run",
    "compile_packed",
    "convert_checkpoint",
    "convert_run",
    "evaluate_run",
    "export_run",
    "fixed_model",
    "load_cascade",
    "load_classifier",
    "load_run",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'keras_flexast' has no attribute {name!r}")
    return getattr(importlib.import_module(f"keras_flexast.{_ROOMS[name]}"), name)


# Importing the package registers its layers with Keras. Only the command `flexast` loads what each
# of its commands needs, so that its help is there at once.
if os.path.basename("".join(sys.argv[:1])) not in ("flexast", "flexast.exe"):
    globals().update({name: __getattr__(name) for name in _ROOMS})
