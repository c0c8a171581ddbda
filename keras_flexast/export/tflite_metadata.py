"""TFLite Metadata of an audio classifier: its input, its labels and its description in one file.

The `.tflite` carries a flatbuffer that describes its tensors (MediaPipe and the Task Library
read it), and ends in a ZIP with `labels.txt` and `artifact.json`: `unzip model.tflite` extracts
them, and interpreters ignore them.

Source: metadata_schema.fbs of tflite-support and MediaPipe, version 1.5.0.
"""

import io
import zipfile

import flatbuffers
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table

from keras_flexast.inference.artifacts import artifact_texts, read_texts
from keras_flexast.inference.runtimes import DESCRIPTION, LABELS

ENTRY = "TFLITE_METADATA"
IDENTIFIER = b"M001"
# Numbers in the schema's enumerations. AudioProperties came with 1.3.0.
DESCRIPTIONS, TENSOR_AXIS_LABELS = np.int8(1), np.int8(2)
FEATURE_PROPERTIES, AUDIO_PROPERTIES = np.uint8(1), np.uint8(4)
PARSER_VERSIONS = {"waveform": "1.3.0", "features": "1.0.0"}


def attach_metadata(
    content,
    labels,
    *,
    artifact,
    sample_rate,
    input="waveform",
    name="keras_flexast",
    description="",
    version="",
    author="",
    license="",
):
    """Give a `.tflite` metadata, in place of any that it has. It needs TensorFlow.

    Args:
        content: bytes of a model whose subgraphs have one output (1, classes), and one input or
            two, of which the second is `length`.
        labels: class names in the order of the scores.
        artifact: dictionary of `describe_artifact`, the content of artifact.json.
        sample_rate: sample rate of the sound in Hz, also where the input is "features".
        input: "waveform", mono in [-1, 1]; or "features", a normalized log-mel spectrogram.
        name, description, version, author, license: texts about the model.

    Returns:
        bytes.

    Raises:
        ValueError: content is no TFLite model, has other inputs or outputs, or another number
            of classes than labels.
    """
    model = unpack_model(content)
    for graph in model.subgraphs:
        outputs = [graph.tensors[index].shape.tolist() for index in graph.outputs]
        if len(graph.inputs) not in (1, 2) or outputs != [[1, len(labels)]]:
            raise ValueError(
                f"subgraph {_text(graph.name)!r} has {len(graph.inputs)} inputs and outputs of the "
                f"shapes {outputs}; expected one input, or two with `length`, and one output "
                f"(1, {len(labels)}) for {len(labels)} labels."
            )
    inputs = [_input_fields(input, sample_rate), _length_fields()]
    root = {
        0: name,
        1: description,
        2: version,
        3: [
            {0: _text(graph.name), 2: inputs[: len(graph.inputs)], 3: [_output_fields()]}
            for graph in model.subgraphs
        ],
        4: author,
        5: license,
        6: [{0: DESCRIPTION, 1: "Filterbank, patch sizes and precision.", 2: DESCRIPTIONS}],
        7: PARSER_VERSIONS[input],
    }
    builder = flatbuffers.Builder(1024)
    builder.Finish(_write(builder, root), IDENTIFIER)
    set_entry(model, ENTRY, builder.Output())
    tail = io.BytesIO()
    tail.write(pack_model(model))
    with zipfile.ZipFile(tail, "a") as archive:  # not compressed, for MediaPipe maps it; dated 1980
        for file, text in artifact_texts(labels, artifact).items():
            archive.writestr(zipfile.ZipInfo(file), text)
    return tail.getvalue()


def _input_fields(input, sample_rate):
    """TensorMetadata of the input, {field: value}."""
    if input == "waveform":
        audio = {0: np.uint32(sample_rate), 1: np.uint32(1)}  # one channel
        text, content = f"Mono sound at {sample_rate} Hz, -1 to 1.", {0: AUDIO_PROPERTIES, 1: audio}
    else:
        text = f"Log-mel spectrogram, normalized as in {DESCRIPTION}: (1, frames, mel_bins)."
        content = {0: FEATURE_PROPERTIES, 1: {}}
    return {0: input, 1: text, 3: content}


def _length_fields():
    """TensorMetadata of the second input, {field: value}."""
    text = "Number of samples that count, from the first on; the others are not heard."
    return {0: "length", 1: text, 3: {0: FEATURE_PROPERTIES, 1: {}}}


def _output_fields():
    """TensorMetadata of the scores, {field: value}."""
    labels = {0: LABELS, 1: "Class names in the order of the scores.", 2: TENSOR_AXIS_LABELS}
    return {
        0: "scores",
        1: "Score of each class, 0 to 1.",
        3: {0: FEATURE_PROPERTIES, 1: {}},
        5: {0: np.ones(1, "float32"), 1: np.zeros(1, "float32")},  # largest, smallest
        6: [labels],
    }


def read_metadata(content):
    """Read what `attach_metadata` wrote. It needs no TensorFlow.

    Args:
        content: bytes of a `.tflite`.

    Returns:
        dictionary of `name`, `description`, `version`, `author`, `license`,
        `min_parser_version`, `labels` (tuple), `artifact` (dictionary, from artifact.json) and
        `subgraphs`: for each one its `name`, and its `input` and `output` with `name` and
        `description`. The input of a waveform also has `sample_rate` (Hz) and `channels`; the
        output has `labels`, the name of their file, `min` and `max`.

    Raises:
        ValueError: content is no TFLite model, or has no such metadata.
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
        texts = {file: archive.read(file).decode() for file in (LABELS, DESCRIPTION)}
    labels, artifact = read_texts(texts)
    return {
        "name": root.text(0),
        "description": root.text(1),
        "version": root.text(2),
        "author": root.text(4),
        "license": root.text(5),
        "min_parser_version": root.text(7),
        "labels": labels,
        "artifact": artifact,
        "subgraphs": [
            {
                "name": graph.text(0),
                "input": _read_tensor(graph.tables(2)[0]),
                "inputs": [tensor.text(0) for tensor in graph.tables(2)],
                "output": _read_tensor(graph.tables(3)[0]),
            }
            for graph in root.tables(3)
        ],
    }


def unpack_model(content):
    """Bytes of a `.tflite` as TensorFlow's ModelT, without the ZIP at their end."""
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
    """Put bytes under a name into the metadata of a ModelT, in place of those there."""
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
    """A Buffer whose bytes start at a multiple of 16, as schema.fbs requires.

    The generated Pack does not align them, and kernels on ARM may rely on it.
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
    # Children first: a flatbuffer cannot build a table inside another one.
    placed = {
        field: one if type(one) in scalars else _write(builder, one) for field, one in value.items()
    }
    builder.StartObject(max(value, default=-1) + 1)
    for field, one in placed.items():
        prepend = scalars.get(type(one), builder.PrependUOffsetTRelativeSlot)
        prepend(field, int(one), 0)
    return builder.EndObject()


class _Reader:
    """A table of a flatbuffer; its fields are read by number."""

    def __init__(self, content, position):
        self.table = Table(content, position)

    @classmethod
    def root(cls, content):
        return cls(content, int.from_bytes(content[:4], "little"))

    def _place(self, field):
        """Position of a field's value; None if the field is missing."""
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
