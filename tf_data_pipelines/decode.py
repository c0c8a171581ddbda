"""Sound files to waveforms inside a TensorFlow graph, with the samples of `audio.read_audio`.

16-bit WAV is decoded by TensorFlow alone (wav.py), scanned FLAC and Ogg Vorbis by tensorflow-io
where its native operations run, everything else by `read_audio`.
"""

import functools
import os
import re
import warnings

import numpy as np
import tensorflow as tf

from tf_data_pipelines.audio import MIN_SAMPLES, check_extension, decode_contents, read_audio
from tf_data_pipelines.parts import HDF5
from tf_data_pipelines.wav import has_at, number_at, pcm16_or_empty

IN_HDF5 = f"(?s).*{re.escape(HDF5)}.*"  # paths of recordings in HDF5 files


def decode_audio(
    path: str | tf.Tensor,
    sample_rate: int = 16000,
    *,
    scanned: bool = False,
    start: float | tf.Tensor = 0.0,
    stop: float | tf.Tensor | None = None,
) -> tf.Tensor:
    """`read_audio` for eager code and for tf.data's `map`, with the same samples.

    `decode_wav` decodes 16-bit PCM WAV at `sample_rate`. tensorflow-io decodes scanned FLAC
    and Ogg Vorbis at `sample_rate` where its native operations run. Its resampler differs
    from soxr (relative error 0.7 on a sine), and its MP3 decoder differs from libsndfile's
    after a damaged frame, so other rates and MP3 go to `read_audio`; parts of files too.

    Args:
        path: file name, a scalar string tensor or str.
        sample_rate: sample rate of the result in Hz.
        scanned: whether `read_audio` has accepted the file before, as in a ScannedSource. Only
            then tensorflow-io is used, which never returns from some damaged files, and
            silence is not checked again.
        start: second of the file at which the part begins, float or scalar float64 tensor.
        stop: second at which it ends, like `start`; infinity or None for the end of the file.

    Returns:
        float32 (samples,), static shape (None,).

    Raises:
        AudioError: the file cannot be used. Inside a graph it becomes a
            tf.errors.InvalidArgumentError with the same text.
        tf.errors.NotFoundError: the file does not exist.
    """
    in_hdf5 = isinstance(path, str) and HDF5 in path
    path = tf.convert_to_tensor(os.fsencode(path) if isinstance(path, str) else path, tf.string)
    always_whole = isinstance(start, int | float) and start == 0 and stop is None
    if always_whole and not in_hdf5:
        return _decode_whole(path, sample_rate, scanned)
    start = tf.cast(start, tf.float64)
    stop = tf.cast(np.inf if stop is None else stop, tf.float64)
    whole = tf.equal(start, 0) & tf.math.is_inf(stop)
    wave = tf.cond(
        whole & ~tf.strings.regex_full_match(path, IN_HDF5),
        lambda: _decode_whole(path, sample_rate, scanned),
        lambda: tf.numpy_function(
            functools.partial(_read_part, sample_rate=sample_rate),
            [path, start, stop],
            tf.float32,
            stateful=False,
        ),
    )
    return tf.ensure_shape(wave, [None])


def _read_part(path, start, stop, sample_rate):
    """`read_audio` of a part of a file; a stop of infinity is the end of the file."""
    path = os.fsdecode(np.asarray(path, object).item())
    start, stop = float(start), None if np.isinf(stop) else float(stop)
    return read_audio(path, sample_rate, start=start, stop=stop)


def _decode_whole(path, sample_rate, scanned):
    """`decode_audio` of a file that is a clip."""
    contents = tf.io.read_file(path)
    wave = pcm16_or_empty(contents, sample_rate)
    audio = _tensorflow_io() if scanned else None
    if audio is not None:
        for matches, decode in (
            (_is_flac(contents, sample_rate), functools.partial(_decode_flac, audio)),
            (_is_vorbis(contents, sample_rate), audio.decode_vorbis),
        ):
            wave = tf.cond(
                matches,
                lambda decode=decode: tf.reduce_mean(decode(contents), 1),
                lambda wave=wave: wave,
            )
    # read_audio gets what no native branch decoded, and explains what it refuses.
    usable = tf.size(wave) >= MIN_SAMPLES
    if not scanned:
        usable = usable & (tf.reduce_max(wave) > tf.reduce_min(wave))
    wave = tf.cond(
        usable,
        lambda: wave,
        lambda: tf.numpy_function(
            functools.partial(_decode_bytes, sample_rate=sample_rate),
            [path, contents],
            tf.float32,
            stateful=False,
        ),
    )
    return tf.ensure_shape(wave, [None])


def _decode_bytes(path, contents, sample_rate):
    """`read_audio` of bytes that are read already, so that remote file systems work too."""
    # Scalars come as bytes from a graph and as arrays eagerly; "object" keeps zeros at the end.
    path, contents = (np.asarray(value, object).item() for value in (path, contents))
    path = os.fsdecode(path)
    check_extension(path)
    return decode_contents(path, contents, sample_rate)


@functools.cache
def _tensorflow_io():
    """tensorflow_io.audio where its native operations run, else None.

    It imports with any TensorFlow but is compiled for one, so this function tries an
    operation. Only its operations on bytes are used: parallel map calls share the handle
    behind IOTensor.from_audio and mix up files.
    """
    with warnings.catch_warnings(), tf.init_scope():
        warnings.simplefilter("ignore")
        try:
            import tensorflow_io

            ramp = np.arange(64, dtype=np.int16)[:, None]
            flac = tensorflow_io.audio.encode_flac(tf.constant(ramp), rate=16000)
            decoded = tensorflow_io.audio.decode_flac(flac, dtype=tf.int16)
            return tensorflow_io.audio if np.array_equal(decoded, ramp) else None
        except (ImportError, NotImplementedError, AttributeError, OSError, tf.errors.OpError):
            return None


def _is_flac(contents, sample_rate):
    """Whether the bytes are a 16- or 24-bit FLAC at `sample_rate`."""
    rate, bits = _flac_format(contents)
    known_bits = tf.equal(bits, 16) | tf.equal(bits, 24)
    return has_at(contents, 0, b"fLaC") & tf.equal(rate, sample_rate) & known_bits


def _flac_format(contents):
    """Rate in Hz and bits, from STREAMINFO: 20 bits rate, 3 channels - 1, 5 bits - 1."""
    packed = number_at(contents, 18, 4, "big")
    return packed // 2**12, packed // 2**4 % 32 + 1


def _decode_flac(audio, contents):
    return tf.cond(
        tf.equal(_flac_format(contents)[1], 16),
        lambda: tf.cast(audio.decode_flac(contents, dtype=tf.int16), tf.float32) / 2**15,
        lambda: tf.cast(audio.decode_flac(contents, dtype=tf.int32), tf.float32) / 2**31,
    )


def _is_vorbis(contents, sample_rate):
    return has_at(contents, 28, b"\x01vorbis") & tf.equal(number_at(contents, 40, 4), sample_rate)
