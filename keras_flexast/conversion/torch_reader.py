"""State dictionaries of PyTorch files, read without PyTorch and without running code.

A PyTorch file is a pickle, and a pickle is a program. The reader here knows the handful of
names that a file of tensors needs, and refuses every other one. A small file can also promise
gigabytes, or nest a value so that it takes years to hash or to print: what a file unpacks to is
bounded by its own size, and nothing but its tensors' numbers comes into a message.
"""

import collections
import io
import math
import mmap
import os
import pickle
import struct
import zipfile

import numpy as np

WRAPPERS = ("model", "model_state", "model_state_dict", "state_dict")
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that is no ZIP archive
MAX_PICKLE = 1 << 22  # bytes of data.pkl; a thousand tensors take 0.2 MB
SMALL = 1 << 26  # bytes that any file may unpack to
MAX_GROWTH = 16  # times its own size that a larger file may unpack to


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
        tensors = {str(k): v for k, v in content.items() if isinstance(v, _Tensor)}
        check_growth(sum(one.bytes for one in tensors.values()), os.path.getsize(path))
        weights = {name: one.array() for name, one in tensors.items()}
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


def check_growth(content, size):
    """Raise a ValueError where a file of `size` bytes promises far more bytes of content."""
    if content > max(SMALL, MAX_GROWTH * size):
        raise ValueError(f"its {size:,} bytes promise {content:,} bytes of content")


def check_archive(path):
    """Raise a ValueError where the members of a ZIP archive promise far more than its size."""
    with zipfile.ZipFile(path) as archive:
        check_growth(sum(one.file_size for one in archive.infolist()), os.path.getsize(path))


def _unpickle_zip(path):
    """Content of a ZIP archive: data.pkl, and one member for each storage."""
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("data.pkl")), None)
        if pickled is None:
            raise ValueError("it is a ZIP archive without data.pkl")
        folder = pickled.removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its byte order is not little endian")
        if archive.getinfo(pickled).file_size > MAX_PICKLE:
            raise ValueError(f"its data.pkl has more than {MAX_PICKLE:,} bytes")
        unpickler = _TensorUnpickler(io.BytesIO(archive.read(pickled)))
        content = unpickler.load()
        for key, storage in unpickler.storages.items():
            storage.fill(archive.read(f"{folder}data/{key}"))
    return content


def _unpickle_legacy(path):
    """Content of five pickles in a row, then every storage: a count of 8 bytes and its values."""
    # mmap reads no further than the file, however much a pickle asks for.
    with (
        open(path, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file,
    ):
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


class _Tuple(tuple):
    """A tuple of a pickle, which cannot be hashed: one that is nested 100 times takes years."""

    __hash__ = None  # type: ignore[assignment]


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
        numbers = (offset, *shape, *strides)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a tensor's shape, offset or strides are not whole numbers from 0 on")
        self.view = storage, offset, tuple(shape), tuple(strides)
        self.bytes = math.prod(shape) * storage.kind.dtype.itemsize

    def array(self):
        storage, offset, shape, strides = self.view
        if 0 in shape:
            return np.zeros(shape, storage.values.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if last >= storage.values.size:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
        steps = [stride * storage.values.itemsize for stride in strides]
        view = np.lib.stride_tricks.as_strided(storage.values[offset:], shape, steps)
        return np.ascontiguousarray(view).reshape(shape)


def _unhashable(load):
    """An opcode's method that leaves a _Tuple on the stack where `load` leaves a tuple."""

    def load_tuple(unpickler):
        load(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return load_tuple


class _TensorUnpickler(pickle._Unpickler):
    """Unpickler of tensors, numbers, text and containers; it refuses anything else.

    The one in C would make plain tuples, and a table of as many places as a pickle asks for.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012
    for _code in pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3:
        dispatch[_code] = _unhashable(dispatch[_code])

    kinds = {  # noqa: RUF012
        "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2",
        "BFloat16Storage": "bfloat16", "LongStorage": "<i8", "IntStorage": "<i4",
        "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?",
    }  # fmt: skip

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.storages = {}

    def find_class(self, module, name):
        if not name:  # Python's unpickler takes what is left of a file for a line
            raise ValueError("it ends within a name")
        if module == "torch" and name in self.kinds:
            return _Kind(self.kinds[name])
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _Maker(_Tensor),
            ("torch._utils", "_rebuild_parameter"): _Maker(lambda tensor, *_: tensor),
            ("torch", "Size"): _Maker(_Tuple),
        }
        if (module, name) not in known:
            raise _ForbiddenError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, identity):
        _, kind, key, _, count, *_ = identity
        if not isinstance(kind, _Kind) or type(count) is not int or count < 0:
            raise ValueError("a storage has no known dtype, or no number of values")
        return self.storages.setdefault(key, _Storage(kind, count))
