"""KerasHub's doors to packed models: backbone, preprocessing and task, loaded by `from_preset`.

It needs the extra `hub`; nothing else in the package imports it.
"""

try:
    import keras_hub  # noqa: F401
except ImportError as error:
    raise ImportError(
        f'keras_flexast.hub needs KerasHub: pip install "keras-flexast[hub]" ({error})'
    ) from error

from keras_flexast.hub.audio_classifier import AudioClassifier
from keras_flexast.hub.backbone import ASTBackbone
from keras_flexast.hub.preprocessing import ASTAudioConverter, AudioClassifierPreprocessor
from keras_flexast.hub.presets import PRESETS

__all__ = [
    "PRESETS",
    "ASTAudioConverter",
    "ASTBackbone",
    "AudioClassifier",
    "AudioClassifierPreprocessor",
]
