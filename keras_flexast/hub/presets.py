"""What `from_preset` is given: the kinds of folders and names, and the models known by name.

None of these models has published weights yet.
"""

import os
import pathlib

import keras

from keras_flexast.conversion.checkpoints import read_json
from keras_flexast.hub.backbone import ASTBackbone
from keras_flexast.models import ElasticAST, FlexiAST
from keras_flexast.runs import Run
from keras_flexast.settings import SIZES
from tf_data_pipelines.settings import PATCH_SIZES, FbankSettings, PackSettings

HUB = "hf://"

_FAMILIES = {  # family: what it pools with, and what to say of it
    "flexiast": ("cls", "[CLS] token and one joint position table, as FlexiAST"),
    "elasticast": ("attention", "mask attention pooling and one position table per axis, as "
                   "ElasticAST"),
}  # fmt: skip


def _described(family, size):
    pooling, text = _FAMILIES[family]
    dim, depth, _ = SIZES[size]
    return {
        "metadata": {
            "description": f"{depth} blocks of width {dim}, {text}. Untrained.",
            "path": family,
        },
        "family": family,
        "size": size,
        "pooling": pooling,
    }


PRESETS = {  # name: its metadata, and what to build
    f"{family}_{size}": _described(family, size) for family in _FAMILIES for size in SIZES
}


def untrained_run(name, num_classes, classes=None):
    """A Run of a model of PRESETS with new weights."""
    make = FlexiAST if PRESETS[name]["family"] == "flexiast" else ElasticAST
    model = make(num_classes, PRESETS[name]["size"])
    return Run(
        model,
        FbankSettings(),
        patches=model.patch_settings(PATCH_SIZES),
        packing=PackSettings(segments=model.segments),
        classes=classes or tuple(map(str, range(num_classes))),
    )


def is_backbone(folder):
    """Whether a folder holds the preset of an ASTBackbone, without a task."""
    path = pathlib.Path(folder, "config.json")
    if not path.is_file() or path.with_name("task.json").exists():
        return False
    return read_json(path).get("registered_name") == keras.saving.get_registered_name(ASTBackbone)


def is_published(preset):
    """Whether a preset is an AST as Hugging Face has them, in a folder or on the hub.

    Raises:
        FileNotFoundError: the hub did not give it.
        ValueError: its config.json is damaged.
    """
    path = pathlib.Path(preset, "config.json")
    if path.is_file():
        return "registered_name" not in read_json(path)
    if os.path.exists(preset):
        return False
    if not preset.startswith(HUB):
        return "://" not in preset and preset.count("/") == 1
    from huggingface_hub import hf_hub_download

    try:
        config = hf_hub_download(preset.removeprefix(HUB), "config.json")
    except Exception as error:  # whatever the network, the hub or the name met
        raise FileNotFoundError(f"the Hugging Face hub did not give {preset}: {error}") from error
    return "registered_name" not in read_json(pathlib.Path(config))
