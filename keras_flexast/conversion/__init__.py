"""Published checkpoints as our models."""

from keras_flexast.conversion.convert import Conversion, convert_checkpoint, convert_run

__all__ = ["Conversion", "convert_checkpoint", "convert_run"]
