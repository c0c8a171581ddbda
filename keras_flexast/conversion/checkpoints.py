"""Checkpoints as others publish them: names, arrays and configuration, from file, folder or hub."""

import dataclasses
import json
import pathlib

import numpy as np

from keras_flexast.conversion.torch_reader import check_archive, read_torch

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS_KINDS = (  # that NumPy has too
    "F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Args:
        origin: file, folder or name that it came from, for messages.
        weights: {name: array}, under the published names without DataParallel's `module.`.
        config: configuration of the model; empty where a file has none.
        features: content of Hugging Face's preprocessor_config.json; empty where there is none.
        ignored: {name: reason} of entries that are no weights.
    """

    origin: str
    weights: dict
    _: dataclasses.KW_ONLY
    config: dict = dataclasses.field(default_factory=dict)
    features: dict = dataclasses.field(default_factory=dict)
    ignored: dict = dataclasses.field(default_factory=dict)

    def setting(self, *names, default=None):
        """The first of these settings that the configuration has."""
        return next((self.config[name] for name in names if name in self.config), default)


def read_checkpoint(source):
    """Read a checkpoint from a file, a folder, a hub or a KerasHub backbone.

    Args:
        source: path of a `.pth` (`.pt`, `.bin`, `.ckpt`), `.npz` or `.safetensors` file; path
            of a Hugging Face folder; name on the Hugging Face hub, such as
            MIT/ast-finetuned-audioset-10-10-0.4593; or a KerasHub ViTBackbone or DeiTBackbone:
            the object, the name of its preset, or the folder of its preset.

    Returns:
        Checkpoint; the weights of a KerasHub backbone have timm's names.

    Raises:
        FileNotFoundError: there is no such file, folder or name.
        ValueError: the file is damaged, of an unknown kind, or tries to run code.
        ImportError: the package of a hub is missing.
    """
    if not isinstance(source, (str, pathlib.Path)):
        return _from_backbone(source, type(source).__name__)
    path = pathlib.Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    name = str(source)
    if path.suffix in (*TORCH_SUFFIXES, ".npz", ".safetensors") or name.startswith((".", "/")):
        raise FileNotFoundError(f"{name} does not exist.")
    if "/" in name and "://" not in name:
        return _read_folder(_download(name))
    return _from_preset(name)


def _read_folder(folder):
    config = read_json(folder / "config.json")
    if "registered_name" in config:
        return _from_preset(str(folder))
    found = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors and no pytorch_model.bin. A checkpoint folder "
            f"of Hugging Face has one of them."
        )
    features = folder / "preprocessor_config.json"
    return dataclasses.replace(
        _read_file(found[0]),
        origin=str(folder),
        config=config,
        features=read_json(features) if features.is_file() else {},
    )


def read_json(path):
    """The dictionary in a file; an error names the file that is missing, or is no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder needs it.")
    return _json_object(path.read_bytes(), path)


def _json_object(text, where):
    try:
        content = json.loads(text)  # UnicodeDecodeError is a ValueError too
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a JSON {type(content).__name__}; expected an object.")
    return content


def _read_file(path):
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    readers.update(dict.fromkeys(TORCH_SUFFIXES, _read_pickle))
    if path.suffix not in readers:
        raise ValueError(f"{path} is of an unknown kind; expected {', '.join(sorted(readers))}.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    checkpoint = readers[path.suffix](path)
    weights = checkpoint.weights
    for name in list(weights):
        short = name.removeprefix("module.")
        if short != name and short in weights:
            raise ValueError(f"{path} holds both {name} and {short}. Save one of them alone.")
        weights[short] = weights.pop(name)
    if not weights:
        raise ValueError(f"{path} holds no weights.")
    return checkpoint


def _read_pickle(path):
    weights, ignored = read_torch(path)
    return Checkpoint(str(path), weights, ignored=ignored)


def _read_npz(path):
    """Checkpoint of an archive: `meta` is the configuration; `weights/` may mark the weights."""
    try:
        check_archive(path)
        with np.load(path) as archive:
            arrays = dict(archive)
    except Exception as error:  # zipfile and NumPy raise whatever a damaged file meets
        raise ValueError(f"{path} is not a whole .npz file of arrays: {error}") from error
    others = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if others:
        raise ValueError(f"{path} is not an .npz file of arrays: {others[0]} is something else.")
    config = _json_object(str(arrays.pop("meta")), f"{path}: meta") if "meta" in arrays else {}
    prefix = "weights/"
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if not weights:
        return Checkpoint(str(path), arrays, config=config)
    others = [name for name in arrays if not name.startswith(prefix)]
    ignored = dict.fromkeys(others, f"not under {prefix}")
    return Checkpoint(str(path), weights, config=config, ignored=ignored)


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    weights = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118, not a dictionary
                kind = file.get_slice(name).get_dtype()
                if kind not in SAFETENSORS_KINDS:
                    raise ValueError(f"{path}: {name} is {kind}. Save the checkpoint as float32.")
                weights[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
    return Checkpoint(str(path), weights)


# === Hubs ===


def _download(name):
    """Folder of a Hugging Face checkpoint, from its cache where it is there."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError(
            f"{name} is neither a file nor a folder here. To look it up on the Hugging Face hub, "
            f'install its package: pip install "keras-flexast[hub]"'
        ) from None
    try:
        for weights in ("model.safetensors", "pytorch_model.bin"):
            folder = pathlib.Path(snapshot_download(name, allow_patterns=["*.json", weights]))
            if (folder / weights).exists():
                break
        return folder
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name} is neither a file nor a folder here, and the Hugging Face hub did not give "
            f"it: {error}"
        ) from error


def _from_preset(name):
    try:
        import keras_hub
    except ImportError:
        raise FileNotFoundError(
            f"{name} does not exist. If it is a KerasHub preset, install KerasHub: "
            f'pip install "keras-flexast[hub]"'
        ) from None
    try:
        backbone = keras_hub.models.Backbone.from_preset(name)
    except Exception as error:  # KerasHub raises what Kaggle, Hugging Face or Keras met
        if pathlib.Path(name).is_dir():
            raise ValueError(f"{name} is not a whole KerasHub preset: {error}") from error
        raise FileNotFoundError(
            f"{name} is neither a file nor a folder here, and KerasHub could not load a preset of "
            f"that name: {error}"
        ) from error
    return _from_backbone(backbone, name)


def _from_backbone(backbone, origin):
    """Checkpoint of a KerasHub ViTBackbone or DeiTBackbone, with timm's names."""
    kind = type(backbone).__name__
    if kind not in ("ViTBackbone", "DeiTBackbone"):
        raise ValueError(f"{origin} is a {kind}; expected a ViTBackbone or a DeiTBackbone.")
    embedding, encoder = backbone.layers[1], backbone.layers[2]
    weights = {}

    def put(name, arrays):
        kernel, *bias = arrays
        weights[f"{name}.weight"] = kernel
        if bias:
            weights[f"{name}.bias"] = bias[0]

    def dense(layer, rows):
        kernel, *bias = layer.get_weights()
        return (kernel.reshape(rows, -1).T, *(one.reshape(-1) for one in bias))

    kernel, *bias = embedding.patch_embedding.get_weights()
    put("patch_embed.proj", (np.transpose(kernel, (3, 2, 0, 1)), *bias))
    table = embedding.position_embedding
    weights["pos_embed"] = np.asarray(getattr(table, "embeddings", table)).reshape(
        1, -1, backbone.hidden_dim
    )
    for ours, theirs in (("cls_token", "class_token"), ("dist_token", "distillation_token")):
        if hasattr(embedding, theirs):
            weights[ours] = np.asarray(getattr(embedding, theirs))
    dim = backbone.hidden_dim
    for index, block in enumerate(encoder.encoder_layers):
        name = f"blocks.{index}"
        put(f"{name}.norm1", block.layer_norm_1.get_weights())
        put(f"{name}.norm2", block.layer_norm_2.get_weights())
        for ours, theirs in (("q", "query"), ("k", "key"), ("v", "value"), ("proj", "output")):
            put(f"{name}.attn.{ours}", dense(getattr(block.mha, f"{theirs}_dense"), dim))
        if kind == "ViTBackbone":
            hidden, output = block.mlp.dense_1, block.mlp.dense_2
        else:
            hidden, output = block.mlp.dense, block.output_layer.dense
        put(f"{name}.mlp.fc1", dense(hidden, dim))
        put(f"{name}.mlp.fc2", dense(output, hidden.units))
    put("norm", encoder.layer_norm.get_weights())
    config = {
        "num_attention_heads": backbone.num_heads,
        "layer_norm_eps": backbone.layer_norm_epsilon,
    }
    return Checkpoint(origin, weights, config=config)
