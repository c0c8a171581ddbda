"""Checkpoints as others publish them: names, arrays and configuration, read without running code.

A PyTorch file is a pickle, and a pickle is a program. The reader here knows the handful of
names that a file of tensors needs and refuses every other one; PyTorch itself is not needed.
"""

import collections
import dataclasses
import io
import json
import pathlib
import pickle
import struct
import zipfile

import numpy as np

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS_KINDS = (  # that NumPy has too
    "F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL",
)  # fmt: skip
WRAPPERS = ("model", "model_state", "model_state_dict", "state_dict")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Args:
        origin: file, folder or name it came from, for messages.
        weights: {name: array}, as named there without DataParallel's `module.`.
        config: the model's configuration; empty where a file has none.
        features: Hugging Face's preprocessor_config.json; empty where there is none.
        ignored: {name: reason} of entries that are no weights.
    """

    origin: str
    weights: dict
    config: dict = dataclasses.field(default_factory=dict)
    features: dict = dataclasses.field(default_factory=dict)
    ignored: dict = dataclasses.field(default_factory=dict)


def read_checkpoint(source):
    """Read a checkpoint from wherever it is.

    Args:
        source: a `.pth` (`.pt`, `.bin`, `.ckpt`), `.npz` or `.safetensors` file; a Hugging
            Face folder; a Hugging Face hub name, such as
            MIT/ast-finetuned-audioset-10-10-0.4593; or a KerasHub ViTBackbone or DeiTBackbone,
            itself, its preset's name or its preset's folder.

    Returns:
        Checkpoint; a KerasHub backbone comes under timm's names.

    Raises:
        FileNotFoundError: no such file, folder, or name.
        ValueError: the file is damaged, of an unknown kind, or tries to run code.
        ImportError: a hub's package is missing.
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
    config = _read_json(folder / "config.json")
    if "registered_name" in config:
        return _from_preset(str(folder))
    found = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors and no pytorch_model.bin, so it is not a "
            f"checkpoint folder of Hugging Face."
        )
    features = folder / "preprocessor_config.json"
    return dataclasses.replace(
        _read_file(found[0]),
        origin=str(folder),
        config=config,
        features=_read_json(features) if features.is_file() else {},
    )


def _read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder needs it.")
    return _json_object(path.read_bytes(), path)


def _json_object(text, where):
    try:
        content = json.loads(text)  # UnicodeDecodeError is a ValueError too
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a JSON {type(content).__name__}; expected an object.")
    return content


def _read_file(path):
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    readers.update(dict.fromkeys(TORCH_SUFFIXES, _read_torch))
    if path.suffix not in readers:
        raise ValueError(f"{path} is of an unknown kind; expected {', '.join(sorted(readers))}.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    weights, config, ignored = readers[path.suffix](path)
    for name in list(weights):
        short = name.removeprefix("module.")
        if short != name and short in weights:
            raise ValueError(f"{path} holds both {name} and {short}. Save one of them alone.")
        weights[short] = weights.pop(name)
    if not weights:
        raise ValueError(f"{path} holds no weights.")
    return Checkpoint(str(path), weights, config, {}, ignored)


def _read_npz(path):
    """Arrays under `weights/` where there are such, else all; `meta` is the configuration."""
    try:
        with np.load(path) as archive:
            arrays = dict(archive)
    except Exception as error:  # zipfile and NumPy raise whatever a damaged file meets
        raise ValueError(f"{path} is not a whole .npz file of arrays: {error}") from error
    others = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if others:
        raise ValueError(f"{path} is not an .npz file of arrays: {', '.join(others[:3])} is none.")
    config = _json_object(str(arrays.pop("meta")), f"{path}: meta") if "meta" in arrays else {}
    prefix = "weights/"
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    if not weights:
        return arrays, config, {}
    others = [name for name in arrays if not name.startswith(prefix)]
    return weights, config, dict.fromkeys(others, f"not under {prefix}")


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
    return weights, {}, {}


# === PyTorch files ===


def _read_torch(path):
    """State dictionary of a file written by torch.save, in either of its two formats."""
    try:
        content = _unpickle_zip(path) if zipfile.is_zipfile(path) else _unpickle_legacy(path)
        for wrapper in WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a state dictionary")
        weights = {str(k): v.array() for k, v in content.items() if isinstance(v, _Tensor)}
    except _ForbiddenError as error:
        raise ValueError(
            f"{path} asks for {error}, which a file of weights does not need; it was not run. "
            f"Save the weights alone, torch.save(model.state_dict(), ...), where you trust the "
            f"file."
        ) from error
    except Exception as error:  # pickle raises whatever a damaged program meets
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is not a whole PyTorch file of weights: {reason}") from error
    ignored = {str(k): "not an array" for k, v in content.items() if not isinstance(v, _Tensor)}
    return weights, {}, ignored


def _unpickle_zip(path):
    """One archive member a storage, and data.pkl for everything else."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("data.pkl")), None)
        if pickled is None:
            raise ValueError("it is a ZIP archive without data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its byte order is not little endian")
        unpickler = _TensorUnpickler(io.BytesIO(archive.read(pickled)))
        content = unpickler.load()
        for key, storage in unpickler.storages.items():
            storage.fill(archive.read(f"{folder}data/{key}"))
    return content


def _unpickle_legacy(path):
    """Five pickles in a row, then every storage: a count of 8 bytes and the numbers."""
    with open(path, "rb") as file:
        if _TensorUnpickler(file).load() != 0x1950A86A20F9469CFC6C:
            raise ValueError("its first number is another")
        _protocol, _machine = _TensorUnpickler(file).load(), _TensorUnpickler(file).load()
        unpickler = _TensorUnpickler(file)
        content = unpickler.load()
        for key in _TensorUnpickler(file).load():
            storage = unpickler.storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            if count != storage.count:
                raise ValueError(f"storage {key} has {count} numbers, not {storage.count}")
            storage.fill(file.read(storage.bytes))
    return content


class _ForbiddenError(Exception):
    pass


class _Inert:
    """What a pickle may make but not change: its BUILD would get past the checks below."""

    def __setstate__(self, state):
        raise _ForbiddenError(f"a change of {type(self).__name__}")


class _Maker(_Inert):
    """A function that a pickle may call."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


class _Kind(_Inert):
    """The type of the numbers of a storage."""

    def __init__(self, dtype):
        self.half = dtype == "bfloat16"  # NumPy has none: read as the upper half of a float32
        self.dtype = np.dtype("<u2" if self.half else dtype)


class _Storage(_Inert):
    """The numbers behind tensors: of a known type and count, filled in later."""

    def __init__(self, kind, count):
        self.kind = kind
        self.count = count
        self.bytes = count * kind.dtype.itemsize

    def fill(self, content):
        if len(content) != self.bytes:
            raise ValueError(f"a storage has {len(content)} bytes, not {self.bytes}")
        values = np.frombuffer(content, self.kind.dtype)
        self.values = (values.astype("<u4") << 16).view("<f4") if self.kind.half else values


class _Tensor(_Inert):
    """A view of a storage; `array()` once that is filled."""

    def __init__(self, storage, offset, shape, strides, *_):
        self.view = storage, offset, tuple(shape), tuple(strides)

    def array(self):
        storage, offset, shape, strides = self.view
        numbers = (offset, *shape, *strides)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"a tensor has shape {shape}, offset {offset} and strides {strides}")
        if 0 in shape:
            return np.zeros(shape, storage.values.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if last >= storage.values.size:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its numbers")
        steps = [stride * storage.values.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(storage.values[offset:], shape, steps)
        return np.ascontiguousarray(view).reshape(shape)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler of tensors, numbers, text and containers; anything else is refused."""

    kinds = {  # noqa: RUF012
        "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2",
        "BFloat16Storage": "bfloat16", "LongStorage": "<i8", "IntStorage": "<i4",
        "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
    }  # fmt: skip

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.storages = {}

    def find_class(self, module, name):
        if module == "torch" and name in self.kinds:
            return _Kind(self.kinds[name])
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _Maker(_Tensor),
            ("torch._utils", "_rebuild_parameter"): _Maker(lambda tensor, *_: tensor),
            ("torch", "Size"): tuple,
        }
        if (module, name) not in known:
            raise _ForbiddenError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, identity):
        _, kind, key, _, count, *_ = identity
        if not isinstance(kind, _Kind) or type(count) is not int:
            raise ValueError(f"a storage is of type {kind!r}, with {count!r} numbers")
        return self.storages.setdefault(key, _Storage(kind, count))


# === Hubs ===


def _download(name):
    """Folder of a Hugging Face checkpoint, from its cache where it is there."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError(
            f"{name} is neither a file nor a folder here. To look it up on the Hugging Face hub: "
            f'pip install "keras-flexast[hub]"'
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
            f'{name} does not exist. If it is a KerasHub preset: pip install "keras-flexast[hub]"'
        ) from None
    try:
        backbone = keras_hub.models.Backbone.from_preset(name)
    except Exception as error:  # KerasHub raises what Kaggle, Hugging Face or Keras met
        if pathlib.Path(name).is_dir():
            raise ValueError(f"{name} is a KerasHub preset that is not whole: {error}") from error
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor a preset that KerasHub could load: "
            f"{error}"
        ) from error
    return _from_backbone(backbone, name)


def _from_backbone(backbone, origin):
    """Weights of a KerasHub ViTBackbone or DeiTBackbone under timm's names."""
    kind = type(backbone).__name__
    if kind not in ("ViTBackbone", "DeiTBackbone"):
        raise ValueError(f"{origin} is a {kind}; expected a ViTBackbone or a DeiTBackbone.")
    embedding, encoder = backbone.layers[1], backbone.layers[2]
    weights = {}

    def put(name, layer):
        kernel, *bias = (w.numpy() if hasattr(w, "numpy") else np.asarray(w) for w in layer)
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
    return Checkpoint(origin, weights, config)
