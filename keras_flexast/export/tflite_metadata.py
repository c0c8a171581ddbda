"""TFLite Metadata of an audio classifier: what it hears, its labels and a card, in one file.

The `.tflite` carries a flatbuffer that describes its tensors (MediaPipe and the Task Library
read it), and ends in a ZIP with `labels.txt` and `card.json`: `unzip model.tflite` takes them
out, and interpreters do not read that far.

Source: metadata_schema.fbs of tflite-support and MediaPipe, version 1.5.0.
"""

import io
import json
import zipfile

import flatbuffers
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table

ENTRY = "TFLITE_METADATA"
IDENTIFIER = b"M001"
LABELS, CARD = "labels.txt", "card.json"
# Of the schema's enumerations. AudioProperties came with 1.3.0.
DESCRIPTIONS, TENSOR_AXIS_LABELS = np.int8(1), np.int8(2)
FEATURE_PROPERTIES, AUDIO_PROPERTIES = np.uint8(1), np.uint8(4)
PARSER_VERSIONS = {"waveform": "1.3.0", "features": "1.0.0"}


def attach_metadata(
    content, labels, sample_rate, card, input="waveform", name="keras_flexast",
    description="", version="", author="", license="",
):  # fmt: skip
    """A `.tflite` with metadata; that which it had is replaced. Needs TensorFlow.

    Args:
        content: bytes of a model whose subgraphs have one input and one output (1, classes).
        labels: class names in the order of the scores.
        sample_rate: Hz, of the waveform, or of the sound that the features are of.
        card: dictionary that `json.dumps` takes: whatever else there is to know.
        input: "waveform", mono in [-1, 1]; or "features", a normalized log-mel spectrogram.
        name, description, version, author, license: of the model.

    Returns:
        bytes.

    Raises:
        ValueError: not a TFLite model, of other inputs or outputs, or of another number of
            classes than labels.
    """
    model = unpack_model(content)
    for graph in model.subgraphs:
        outputs = [graph.tensors[index].shape.tolist() for index in graph.outputs]
        if len(graph.inputs) != 1 or outputs != [[1, len(labels)]]:
            raise ValueError(
                f"subgraph {_text(graph.name)!r} has {len(graph.inputs)} inputs and outputs of the "
                f"shapes {outputs}; expected one input, and one output (1, {len(labels)}) for "
                f"{len(labels)} labels."
            )
    audio = {0: np.uint32(sample_rate), 1: np.uint32(1)}  # one channel
    contents = {
        "waveform": {0: AUDIO_PROPERTIES, 1: audio},
        "features": {0: FEATURE_PROPERTIES, 1: {}},
    }
    labels_file = {0: LABELS, 1: "Class names in the order of the scores.", 2: TENSOR_AXIS_LABELS}
    scores = {
        0: "scores",
        1: "Score of each class, 0 to 1.",
        3: {0: FEATURE_PROPERTIES, 1: {}},
        5: {0: np.ones(1, "float32"), 1: np.zeros(1, "float32")},  # most, least
        6: [labels_file],
    }
    heard = {
        "waveform": f"Mono sound at {sample_rate} Hz, -1 to 1.",
        "features": "Log-mel spectrogram, normalized as card.json says: (1, frames, mel bins).",
    }
    given = {0: input, 1: heard[input], 3: contents[input]}
    root = {
        0: name,
        1: description,
        2: version,
        3: [{0: _text(graph.name), 2: [given], 3: [scores]} for graph in model.subgraphs],
        4: author,
        5: license,
        6: [{0: CARD, 1: "How the model hears and what it was made from.", 2: DESCRIPTIONS}],
        7: PARSER_VERSIONS[input],
    }
    builder = flatbuffers.Builder(1024)
    builder.Finish(_write(builder, root), IDENTIFIER)
    set_entry(model, ENTRY, builder.Output())
    tail = io.BytesIO()
    tail.write(pack_model(model))
    with zipfile.ZipFile(tail, "a") as archive:  # stored, as MediaPipe maps it; dated 1980
        archive.writestr(zipfile.ZipInfo(LABELS), "".join(f"{label}\n" for label in labels))
        archive.writestr(zipfile.ZipInfo(CARD), json.dumps(card, indent=2) + "\n")
    return tail.getvalue()


def read_metadata(content):
    """What `attach_metadata` wrote; needs flatbuffers only.

    Args:
        content: bytes of a `.tflite`.

    Returns:
        dictionary of `name`, `description`, `version`, `author`, `license`,
        `min_parser_version`, `labels` (list), `card` (dictionary) and `subgraphs`: for each
        one its `name`, and its `input` and `output`, with `name`, `description` and, of a
        waveform, `sample_rate` (Hz) and `channels`; of scores `labels`, the name of their
        file, `min` and `max`.

    Raises:
        ValueError: not a TFLite model, or one without this metadata.
    """
    _check_model(content)
    model = _Reader.root(content)
    entries = {entry.text(0): entry.number(1, "Uint32") for entry in model.tables(6)}
    if ENTRY not in entries:
        raise ValueError(
            f"the model has no metadata ({ENTRY}), only {sorted(entries)}. Write it anew with "
            f"`flexast export`, or use attach_metadata."
        )
    described = model.tables(4)[entries[ENTRY]].data(0)
    if bytes(described[4:8]) != IDENTIFIER:
        raise ValueError(
            f"the metadata begins with {bytes(described[4:8])!r}, not {IDENTIFIER!r}: another "
            f"schema. Write the model anew."
        )
    root = _Reader.root(described)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        labels, card = archive.read(LABELS).decode(), json.loads(archive.read(CARD))
    return {
        "name": root.text(0),
        "description": root.text(1),
        "version": root.text(2),
        "author": root.text(4),
        "license": root.text(5),
        "min_parser_version": root.text(7),
        "labels": labels.splitlines(),
        "card": card,
        "subgraphs": [
            {
                "name": graph.text(0),
                "input": _read_tensor(graph.tables(2)[0]),
                "output": _read_tensor(graph.tables(3)[0]),
            }
            for graph in root.tables(3)
        ],
    }


def unpack_model(content):
    """Bytes of a `.tflite` as TensorFlow's ModelT, without what is appended to them."""
    from tensorflow.lite.python import schema_py_generated as schema

    _check_model(content)
    return schema.ModelT.InitFromPackedBuf(content, 0)


def pack_model(model):
    """ModelT as the bytes of a `.tflite`."""
    size = sum(0 if buffer.data is None else len(buffer.data) for buffer in model.buffers)
    for buffer in model.buffers:
        buffer.Pack = lambda builder, buffer=buffer: _pack_buffer(builder, buffer)
    builder = flatbuffers.Builder(size + 2**20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def set_entry(model, name, content):
    """Put bytes under a name into a ModelT's own metadata, in place of those there."""
    from tensorflow.lite.python import schema_py_generated as schema

    content = np.frombuffer(content, "uint8")
    model.metadata = model.metadata or []
    for entry in model.metadata:
        if _text(entry.name) == name:
            model.buffers[entry.buffer].data = content
            return
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = content
    entry.name, entry.buffer = name, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata.append(entry)


def _pack_buffer(builder, buffer):
    """A Buffer whose bytes start at a multiple of 16, as schema.fbs asks.

    The generated Pack does not align them, and kernels on ARM may count on it.
    """
    from tensorflow.lite.python import schema_py_generated as schema

    data = None
    if buffer.data is not None:
        builder.Prep(16, len(buffer.data))
        data = builder.CreateNumpyVector(np.asarray(buffer.data, "uint8"))
    schema.BufferStart(builder)
    if data is not None:
        schema.BufferAddData(builder, data)
    return schema.BufferEnd(builder)


def _write(builder, value):
    """Offset of a string, a vector, or a table {field: value}; scalars are NumPy's."""
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, np.ndarray):
        return builder.CreateNumpyVector(value)
    if isinstance(value, list):
        offsets = [_write(builder, one) for one in value]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()
    scalars = {
        np.int8: builder.PrependInt8Slot,
        np.uint8: builder.PrependUint8Slot,
        np.uint32: builder.PrependUint32Slot,
    }
    # Children come first: a flatbuffer does not nest what it builds.
    placed = {
        field: one if type(one) in scalars else _write(builder, one) for field, one in value.items()
    }
    builder.StartObject(max(value, default=-1) + 1)
    for field, one in placed.items():
        prepend = scalars.get(type(one), builder.PrependUOffsetTRelativeSlot)
        prepend(field, int(one), 0)
    return builder.EndObject()


class _Reader:
    """A table of a flatbuffer, its fields by number."""

    def __init__(self, content, position):
        self.table = Table(content, position)

    @classmethod
    def root(cls, content):
        return cls(content, int.from_bytes(content[:4], "little"))

    def _place(self, field):
        """Position of a field's value; None if it is not there."""
        offset = self.table.Offset(4 + 2 * field)
        return self.table.Pos + offset if offset else None

    def number(self, field, kind):
        flags, place = getattr(number_types, f"{kind}Flags"), self._place(field)
        return 0 if place is None else self.table.Get(flags, place)

    def text(self, field):
        place = self._place(field)
        return "" if place is None else self.table.String(place).decode()

    def table_at(self, field):
        place = self._place(field)
        return None if place is None else _Reader(self.table.Bytes, self.table.Indirect(place))

    def tables(self, field):
        place = self._place(field)
        if place is None:
            return []
        offset = place - self.table.Pos
        start = self.table.Vector(offset)
        places = range(start, start + 4 * self.table.VectorLen(offset), 4)
        return [_Reader(self.table.Bytes, self.table.Indirect(one)) for one in places]

    def data(self, field):
        """Bytes of a vector of bytes."""
        offset = self._place(field) - self.table.Pos
        start = self.table.Vector(offset)
        return self.table.Bytes[start : start + self.table.VectorLen(offset)]

    def first_float(self, field):
        offset = self._place(field) - self.table.Pos
        return self.table.Get(number_types.Float32Flags, self.table.Vector(offset))


def _read_tensor(tensor):
    found = {"name": tensor.text(0), "description": tensor.text(1)}
    content, stats = tensor.table_at(3), tensor.table_at(5)
    if content.number(0, "Uint8") == AUDIO_PROPERTIES:
        audio = content.table_at(1)
        found["sample_rate"] = audio.number(0, "Uint32")
        found["channels"] = audio.number(1, "Uint32")
    if stats:
        found["max"], found["min"] = stats.first_float(0), stats.first_float(1)
    for file in tensor.tables(6):
        if file.number(2, "Int8") == TENSOR_AXIS_LABELS:
            found["labels"] = file.text(0)
    return found


def _check_model(content):
    if content[4:8] != b"TFL3":
        raise ValueError(
            f"not a TFLite model: bytes 4 to 8 are {bytes(content[4:8])!r}, not b'TFL3'."
        )


def _text(name):
    return name.decode() if isinstance(name, bytes) else name or ""
