"""What the package promises: its names, and the folders that a wheel has."""

import importlib
import inspect
import tomllib

import pytest
from helpers import ONCE, ROOT

import keras_flexast
import tf_data_pipelines

PUBLIC = {  # renaming one breaks what others wrote
    "keras_flexast": """
        ElasticAST FlexiAST MaskAttentionPooling MaskedSelfAttention PIResizePatchEmbed PackedAST
        PackedBackbone Run compile_packed convert_checkpoint convert_run evaluate_run export_run
        fixed_model load_classifier load_run train_run
    """,
    "keras_flexast.hub": """
        ASTAudioConverter ASTBackbone AudioClassifier AudioClassifierPreprocessor PRESETS
    """,
    "tf_data_pipelines": """
        AudioError AugmentSettings Clip FbankSettings PATCH_SIZES PackSettings PatchSettings
        ScannedSource Source TeacherTokens WaveformSource augment_features augment_waveforms
        batch_rows counted decode_audio evaluation_batches extract_features features load_source
        load_waveforms log_mel make_tokens normalize pack packing_for pad_waveforms patch_tokens
        prepare_data read_audio read_data read_waveforms scan_source stream_audio training_batches
        training_clips training_packing
    """,
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_there_and_explained(module):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name


@ONCE
def test_a_wheel_has_every_folder():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in (keras_flexast, tf_data_pipelines)
        for path in (ROOT / top.__name__).rglob("__init__.py")
    ]
    assert sorted(setup["packages"]) == sorted(folders)
