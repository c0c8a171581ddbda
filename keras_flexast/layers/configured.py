"""Layers whose config is their arguments."""

import inspect
from typing import Any

import keras


class ConfiguredLayer(keras.layers.Layer):
    """A layer that keeps each argument of its constructor as an attribute of the same name."""

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **arguments_of(self)}


def arguments_of(instance, leave_out=()):
    """The arguments of an instance's constructor, from its attributes of the same names."""
    names = inspect.signature(type(instance).__init__).parameters
    left_out = {"self", "kwargs", *leave_out}
    return {name: getattr(instance, name) for name in names if name not in left_out}
