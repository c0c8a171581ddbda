"""Kinds of arguments of layers and models, for their type hints; without Keras."""

from typing import Any

# Of the backend, a symbolic keras.KerasTensor or an array. Keras has no name for all of them, and
# to name them one by one, every backend would have to be there.
Tensor = Any
Shape = tuple[int | None, ...]
