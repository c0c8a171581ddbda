"""Audio files to packed batches of tokens, in tf.data. Never imports Keras.

Settings and resize matrices need NumPy only; everything else imports TensorFlow when it
is first used.
"""

import importlib

from tf_data_pipelines.settings import PATCH_SIZES, FbankSettings, PackSettings, PatchSettings

_LAZY = {
    "AudioError": "decode",
    "decode_audio": "decode",
    "read_audio": "decode",
    "stream_audio": "decode",
    "Clip": "sources",
    "Source": "sources",
    "ScannedSource": "sources",
    "load_source": "sources",
    "scan_source": "sources",
    "log_mel": "fbank",
    "normalize": "fbank",
    "patch_tokens": "patches",
    "pack": "packing",
    "evaluation_batches": "pipeline",
    "training_batches": "pipeline",
}

__all__ = ["PATCH_SIZES", "FbankSettings", "PackSettings", "PatchSettings", *_LAZY]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'tf_data_pipelines' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tf_data_pipelines.{_LAZY[name]}"), name)
