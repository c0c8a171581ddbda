"""What TensorFlow Serving reads beside the SavedModel: configuration and warm-up requests."""

import re
import struct

import numpy as np

BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # of the server; it refuses a request of more clips
WAIT_MICROS = 2000  # microseconds that a request waits for others to fill the batch
WAITING_BATCHES = 8  # of one signature; the server refuses further requests at once
BATCH_THREADS = 4  # batches at work, each with the tokens of one group of clips in memory
LOADED_VERSIONS = 2  # a new one is ready before the label moves to it
WARM_UP_SECONDS = 1.0
STABLE = re.compile(r'(key\s*:\s*"stable"[\s,;]*value\s*:\s*)(\d+)')
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

    Raises:
        ValueError: the models.config that is there was edited, and does not name the model and
            one label "stable" for it.
    """
    path = folder / "models.config"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    model, stable = re.search(r'name: "(.+)"', text), STABLE.search(text)
    if not text or (model and stable and text == models_config(model[1], stable[2])):
        return models_config(name, version)
    moved, count = STABLE.subn(rf"\g<1>{version}", text)
    if count != 1 or f'name: "{name}"' not in text:
        raise ValueError(
            f'{path} was edited and must configure the model name: "{name}" with one label '
            f'"stable", which moves to version {version}: version_labels {{ key: "stable" value: '
            f"{version} }}. Add them, or move the file away; then a new one is written."
        )
    return moved


def labeled_versions(folder):
    """Versions that models.config in a folder names, and a server may hold: a set of ints."""
    path = folder / "models.config"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return {int(number) for number in re.findall(r"\b(?:value|versions)\s*:\s*(\d+)", text)}


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
