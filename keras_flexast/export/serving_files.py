"""What TensorFlow Serving reads beside the SavedModel: configuration and warm-up requests."""

import functools
import re
import struct
import warnings

import numpy as np

from tf_data_pipelines.settings import DataWarning

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # of the server; it refuses a request of more clips
WAIT_MICROS = 2000  # microseconds that a request waits for others to fill the batch
WAITING_BATCHES = 8  # of one signature; the server refuses further requests at once
BATCH_THREADS = 4  # batches at work, each with the tokens of one group of clips in memory
LOADED_VERSIONS = 2  # a new one is ready before the label moves to it
WARM_UP_SECONDS = 1.0
STABLE = re.compile(r'(key\s*:\s*"stable"[\s,;]*value\s*:\s*)(\d+)\b')
WARM_UP_RATE = 44100  # Hz, so that the resampler is warm too


def models_config(name, version):
    """Text of models.config.

    Args:
        name: name of the model in requests.
        version: version that the label "stable" names.
    """
    return f"""model_config_list {{
  config {{
    name: "{name}"
    base_path: "/models/{name}"
    model_platform: "tensorflow"
    model_version_policy {{ latest {{ num_versions: {LOADED_VERSIONS} }} }}
    version_labels {{ key: "stable" value: {version} }}
  }}
}}
"""


def updated_config(folder, name, version):
    """Text of models.config for the next version in a folder; what a user wrote into it stays.

    Of a text that is there, only the version of the model's label "stable" changes; where the
    text pins versions, and not this one, a warning says that nothing changes.

    Raises:
        ValueError: the text cannot be read, or the model has no such label in it.
    """
    path = folder / "models.config"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    other, stable = re.search(r'name: "(.+)"', text), STABLE.search(text)
    if not text or (other and stable and text == models_config(other[1], stable[2])):
        return models_config(name, version)
    model = _models(path, text).get(name)
    if model is not None and model.model_version_policy.HasField("specific"):
        pinned = list(model.model_version_policy.specific.versions)
        if version not in pinned:
            warnings.warn(
                f"{path} pins {name!r} to version(s) {', '.join(map(str, pinned))} and stays as it "
                f"is, so version {version} is not served. Add it there, and move the label.",
                DataWarning,
                stacklevel=3,
            )
            return text
    for found in STABLE.finditer(text):
        moved = f"{text[: found.start(2)]}{version}{text[found.end(2) :]}"
        if _is_moved(_models(path, text), _models(path, moved), name, version):
            return moved
    raise ValueError(
        f'{path} was edited and must configure {name!r} with the label "stable", which moves to '
        f'version {version}: name: "{name}" and version_labels {{ key: "stable" value: {version} '
        f"}}. Add them, or move the file away; then a new one is written."
    )


def _is_moved(before, after, name, version):
    """Whether two configurations differ in the version of one model's label alone."""
    if name not in before or "stable" not in before[name].version_labels:
        return False
    before[name].version_labels["stable"] = version
    return before == after


def labeled_versions(folder, name):
    """Versions that models.config names for a model, and a server may hold: a set of ints."""
    path = folder / "models.config"
    model = _models(path, path.read_text(encoding="utf-8")).get(name) if path.exists() else None
    if model is None:
        return set()
    return {*model.version_labels.values(), *model.model_version_policy.specific.versions}


def _models(path, text):
    """{name: ModelConfig} of the text of a models.config."""
    from google.protobuf import text_format

    config = _config_class()()
    try:
        text_format.Parse(text, config, allow_unknown_field=True)
    except (text_format.ParseError, RecursionError) as error:
        raise ValueError(
            f"{path} is no configuration of TensorFlow Serving ({error}). Mend it, or move it "
            f"away; then a new one is written."
        ) from None
    return {model.name: model for model in config.model_config_list.config}


@functools.cache
def _config_class():
    """The message ModelServerConfig, with the fields that matter here.

    Source: TensorFlow Serving, config/model_server_config.proto and
    sources/storage_path/file_system_storage_path_source.proto.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="models_config.proto", syntax="proto3")

    def message(parent, name, fields):
        made = parent.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            is_message = isinstance(kind, str)
            made.field.add(
                name=field,
                number=number,
                type=kinds.TYPE_MESSAGE if is_message else kind,
                type_name=f".{kind}" if is_message else None,
                label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL,
            )
        return made

    number, text = kinds.TYPE_INT64, kinds.TYPE_STRING
    message(file.message_type, "Specific", [("versions", number, True)])
    message(file.message_type, "Policy", [("specific", "Specific", False)])
    model = message(
        file.message_type,
        "ModelConfig",
        [
            ("name", text, False),
            ("model_version_policy", "Policy", False),
            ("version_labels", "ModelConfig.VersionLabelsEntry", True),
        ],
    )
    pair = [("key", text, False), ("value", number, False)]
    entry = message(model.nested_type, "VersionLabelsEntry", pair)
    entry.options.map_entry = True
    message(file.message_type, "ModelConfigList", [("config", "ModelConfig", True)])
    message(file.message_type, "Config", [("model_config_list", "ModelConfigList", False)])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Config"))


def batching_config():
    """Text of batching.config."""
    sizes = "".join(f"allowed_batch_sizes: {size}\n" for size in BATCH_SIZES)
    return f"""max_batch_size {{ value: {BATCH_SIZES[-1]} }}
batch_timeout_micros {{ value: {WAIT_MICROS} }}
max_enqueued_batches {{ value: {WAITING_BATCHES} }}
num_batch_threads {{ value: {BATCH_THREADS} }}
{sizes}pad_variable_length_inputs: true
"""


def write_warm_up(folder, name, *, requests, sample_rate, seconds):
    """Write one request for each signature, which the server answers before it reports ready.

    Args:
        folder: folder of the SavedModel; the requests go into its assets.extra.
        name: name of the model in requests.
        requests: {signature: names of its inputs}, of "waveform", "length" and "wav_bytes".
        sample_rate: sample rate of the waveform in Hz.
        seconds: length of the longest clip that the model accepts.
    """
    import tensorflow as tf

    examples = _examples(sample_rate, min(WARM_UP_SECONDS, seconds))
    extra = folder / "assets.extra"
    extra.mkdir()
    with tf.io.TFRecordWriter(str(extra / "tf_serving_warmup_requests")) as records:
        for signature, names in requests.items():
            inputs = {key: examples[key] for key in names}
            records.write(_prediction_log(name, signature, inputs))


def _examples(sample_rate, seconds):
    """A tone of 440 Hz as each input, {name: TensorProto}."""
    import tensorflow as tf

    rates = {"waveform": sample_rate, "wav_bytes": WARM_UP_RATE}
    tones = {
        name: np.sin(np.arange(int(seconds * rate)) * (440 * 2 * np.pi / rate))
        for name, rate in rates.items()
    }
    waveform = tones["waveform"].astype("float32")
    pcm16 = (tones["wav_bytes"] * 2**14).astype("<i2").tobytes()
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + len(pcm16), b"WAVE"),
        *(b"fmt ", 16, 1, 1, WARM_UP_RATE, 2 * WARM_UP_RATE, 2, 16),
        *(b"data", len(pcm16)),
    )
    return {
        "waveform": tf.make_tensor_proto(waveform[None]),
        "length": tf.make_tensor_proto(np.array([len(waveform)], "int32")),
        "wav_bytes": tf.make_tensor_proto([header + pcm16]),
    }


def _prediction_log(name, signature, inputs):
    """Bytes of a tensorflow.serving.PredictionLog with one predict request.

    It is written field by field, because the package with these messages is large and not needed
    otherwise.

    Source: TensorFlow Serving, apis/prediction_log.proto, predict.proto and model.proto.
    """
    spec = _field(1, name.encode()) + _field(3, signature.encode())  # name, signature_name
    request = _field(1, spec)
    for key, tensor in inputs.items():  # a map is a repeated message of key and value
        request += _field(2, _field(1, key.encode()) + _field(2, tensor.SerializeToString()))
    return _field(6, _field(1, request))  # predict_log, its request


def _field(number, payload):
    """One length-delimited field of a protocol buffer."""
    size, prefix = len(payload), bytearray([number << 3 | 2])
    while size > 127:
        prefix.append(size & 127 | 128)
        size >>= 7
    return bytes(prefix) + bytes([size]) + payload
