"""Audio files to packed batches of tokens, in tf.data. This package never imports Keras.

Settings, resize matrices and the reading of files need no TensorFlow; it is imported when
anything else is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tf_data_pipelines.settings import (
    PATCH_SIZES,
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
)

if TYPE_CHECKING:  # what `_ROOMS` loads, for those who check hints
    from tf_data_pipelines.audio import pad_waveforms, read_audio, read_waveforms, stream_audio
    from tf_data_pipelines.augment import augment_features, augment_waveforms
    from tf_data_pipelines.clips import Clip, ScannedSource, Source
    from tf_data_pipelines.decode import decode_audio
    from tf_data_pipelines.distillation import TeacherTokens
    from tf_data_pipelines.fbank import features, log_mel, normalize
    from tf_data_pipelines.lengths import packing_for, training_packing
    from tf_data_pipelines.loading import load_waveforms
    from tf_data_pipelines.packing import batch_rows, pack
    from tf_data_pipelines.parts import AudioError
    from tf_data_pipelines.patches import patch_tokens
    from tf_data_pipelines.pipeline import (
        counted,
        evaluation_batches,
        training_batches,
        training_clips,
    )
    from tf_data_pipelines.prepare import prepare_data
    from tf_data_pipelines.sources import WaveformSource, load_source, read_data, scan_source
    from tf_data_pipelines.stages import extract_features, make_tokens

_ROOMS = {
    "AudioError": "parts",
    "decode_audio": "decode",
    "pad_waveforms": "audio",
    "read_audio": "audio",
    "read_waveforms": "audio",
    "stream_audio": "audio",
    "Clip": "clips",
    "Source": "clips",
    "ScannedSource": "clips",
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
    "AudioError",
    "AugmentSettings",
    "Clip",
    "FbankSettings",
    "PackSettings",
    "PatchSettings",
    "ScannedSource",
    "Source",
    "TeacherTokens",
    "WaveformSource",
    "augment_features",
    "augment_waveforms",
    "batch_rows",
    "counted",
    "decode_audio",
    "evaluation_batches",
    "extract_features",
    "features",
    "load_source",
    "load_waveforms",
    "log_mel",
    "make_tokens",
    "normalize",
    "pack",
    "packing_for",
    "pad_waveforms",
    "patch_tokens",
    "prepare_data",
    "read_audio",
    "read_data",
    "read_waveforms",
    "scan_source",
    "stream_audio",
    "training_batches",
    "training_clips",
    "training_packing",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'tf_data_pipelines' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tf_data_pipelines.{_ROOMS[name]}"), name)
