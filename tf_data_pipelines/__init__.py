"""Audio files to packed batches of tokens, in tf.data. This package never imports Keras.

Settings, resize matrices and the reading of files need no TensorFlow; it is imported when
anything else is first used.
"""

import importlib

from tf_data_pipelines.settings import (
    PATCH_SIZES,
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
)

_LAZY = {
    "AudioError": "audio",
    "decode_audio": "decode",
    "pad_waveforms": "audio",
    "read_audio": "audio",
    "read_waveforms": "audio",
    "stream_audio": "audio",
    "Clip": "clips",
    "Source": "clips",
    "ScannedSource": "sources",
    "WaveformSource": "sources",
    "load_source": "sources",
    "read_data": "sources",
    "scan_source": "sources",
    "features": "fbank",
    "log_mel": "fbank",
    "normalize": "fbank",
    "patch_tokens": "patches",
    "augment_features": "augment",
    "augment_waveforms": "augment",
    "batch_rows": "packing",
    "counted": "pipeline",
    "pack": "packing",
    "evaluation_batches": "pipeline",
    "extract_features": "stages",
    "load_waveforms": "loading",
    "make_tokens": "stages",
    "packing_for": "lengths",
    "prepare_data": "prepare",
    "TeacherTokens": "distillation",
    "training_batches": "pipeline",
    "training_clips": "pipeline",
    "training_packing": "lengths",
}

__all__ = [
    "PATCH_SIZES",
    "AugmentSettings",
    "FbankSettings",
    "PackSettings",
    "PatchSettings",
    *_LAZY,
]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'tf_data_pipelines' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tf_data_pipelines.{_LAZY[name]}"), name)
