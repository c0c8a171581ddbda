"""State dictionaries of PyTorch files, read without PyTorch and without running code.

A PyTorch file is a pickle, and a pickle is a program. The reader here knows the handful of
names that a file of tensors needs, and refuses every other one.
"""

import collections
import io
import pickle
import struct
import zipfile

import numpy as np

WRAPPERS = ("model", "model_state", "model_state_dict", "state_dict")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that is no ZIP archive


def read_torch(path):
    """Read the state dictionary of a file written by torch.save, in either of its two formats.

    Args:
        path: path of the file.

    Returns:
        {name: array} of the tensors, and {name: reason} of entries that are no tensors.

    Raises:
        ValueError: the file is damaged, holds no state dictionary, or tries to run code.
    """
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
            f"If you trust the file, save its weights alone: torch.save(model.state_dict(), ...)."
        ) from error
    except Exception as error:  # pickle raises whatever a damaged program meets
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is not a whole PyTorch file of weights: {reason}") from error
    ignored = {str(k): "not an array" for k, v in content.items() if not isinstance(v, _Tensor)}
    return weights, ignored


def _unpickle_zip(path):
    """Content of a ZIP archive: data.pkl, and one member for each storage."""
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
    """Content of five pickles in a row, then every storage: a count of 8 bytes and its values."""
    with open(path, "rb") as file:
        if _TensorUnpickler(file).load() != LEGACY_MAGIC:
            raise ValueError("it does not begin with the number that marks such files")
        _protocol, _machine = _TensorUnpickler(file).load(), _TensorUnpickler(file).load()
        unpickler = _TensorUnpickler(file)
        content = unpickler.load()
        for key in _TensorUnpickler(file).load():
            storage = unpickler.storages[key]
            (count,) = struct.unpack("<q", file.read(8))
            if count != storage.count:
                raise ValueError(f"storage {key} has {count} values, not {storage.count}")
            storage.fill(file.read(storage.bytes))
    return content


class _ForbiddenError(Exception):
    pass


class _Inert:
    """An object that a pickle may make but not change: BUILD would get past the checks below."""

    def __setstate__(self, state):
        raise _ForbiddenError(f"a change of {type(self).__name__}")


class _Maker(_Inert):
    """A function that a pickle may call."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


class _Kind(_Inert):
    """The dtype of a storage."""

    def __init__(self, dtype):
        self.half = dtype == "bfloat16"  # NumPy has none: read as the upper half of a float32
        self.dtype = np.dtype("<u2" if self.half else dtype)


class _Storage(_Inert):
    """The values behind tensors: of a known dtype and count, filled in later."""

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
    """A view of a storage; `array()` works once the storage is filled."""

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
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
        steps = [stride * storage.values.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(storage.values[offset:], shape, steps)
        return np.ascontiguousarray(view).reshape(shape)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickler of tensors, numbers, text and containers; it refuses anything else."""

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
            raise ValueError(f"a storage has dtype {kind!r} and {count!r} values")
        return self.storages.setdefault(key, _Storage(kind, count))
