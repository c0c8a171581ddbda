"""16-bit PCM WAV files to waveforms with TensorFlow's operations alone, inside a graph.

Such a graph runs where there is no Python: on tf.data service workers and in served models.
"""

import struct

import numpy as np
import tensorflow as tf

from tf_data_pipelines.audio import MAX_CHUNKS, STREAMED
from tf_data_pipelines.resample import RATES, can_resample, resample

SILENT = "The WAV is silent: all its samples are equal; expected sound."


def decode_wav(path, sample_rate=16000):
    """Read and decode a 16-bit PCM WAV file that is at `sample_rate` already.

    Args:
        path: file name, a scalar string tensor or str.
        sample_rate: sample rate in Hz that the file must have.

    Returns:
        float32 (samples,), the same samples as `read_audio`; empty for any other file.

    Raises:
        tf.errors.NotFoundError: the file does not exist.
    """
    return pcm16_or_empty(tf.io.read_file(path), sample_rate)


def pcm16_or_empty(contents, sample_rate):
    """`decode_wav` of the bytes of a file."""
    return tf.cond(
        _is_pcm16(contents, sample_rate),
        lambda: _decode_pcm16(contents),
        lambda: tf.zeros([0]),
    )


def decode_wav_bytes(contents, sample_rate=16000, max_seconds=60.0):
    """Decode a 16-bit PCM WAV to mono in a graph that is served; no file can make it raise.

    It accepts any rate that `can_resample` accepts, any number of channels, a plain or a
    WAVE_FORMAT_EXTENSIBLE header, other chunks around the samples, and sizes that a pipe left
    open. Silence is refused before it is resampled, which would change its ends.

    Args:
        contents: bytes of the file, a scalar string tensor.
        sample_rate: sample rate of the result in Hz; `resample` brings other rates to it.
        max_seconds: longest sound that is decoded, in seconds.

    Returns:
        waveform float32 (samples,), the average of the channels, full scale at 1; and error, a
        scalar string that says what came and what was expected. It is "" for a good file; with
        an error there are no samples.
    """
    header = _read_header(contents)
    frames, channels = header["frames"], header["channels"]
    error = _header_problem(contents, header, sample_rate, max_seconds)

    def decode():
        start, size = header["data"] + 8, tf.cast(frames, tf.int32) * 2 * channels
        # (frames * channels,) -> (frames, channels)
        samples = tf.io.decode_raw(tf.strings.substr(contents, start, size), tf.int16)
        samples = tf.reshape(samples, [-1, channels])
        waveform = tf.reduce_mean(tf.cast(samples, tf.float32) / 2**15, 1)
        silent = tf.equal(tf.reduce_max(waveform), tf.reduce_min(waveform))
        return tf.cond(
            silent,
            lambda: (tf.zeros([0]), tf.constant(SILENT)),
            lambda: (resample(waveform, header["rate"], sample_rate), tf.constant("")),
        )

    waveform, error = tf.cond(tf.equal(error, ""), decode, lambda: (tf.zeros([0]), error))
    return tf.ensure_shape(waveform, [None]), error


def _read_header(contents):
    """What the chunks of a WAV say, a dictionary of scalars; nonsense for other contents."""
    form, data = find_chunk(contents, b"fmt "), find_chunk(contents, b"data")
    tag, channels, bits, subtype = (
        tf.cast(number_at(contents, form + at, 2), tf.int32) for at in (8, 10, 22, 32)
    )
    tag = tf.where(tf.equal(tag, 0xFFFE), subtype, tag)  # WAVE_FORMAT_EXTENSIBLE
    present = tf.cast(tf.strings.length(contents) - data - 8, tf.int64)
    riff, size = number_at(contents, 4, 4), number_at(contents, data + 4, 4)
    streamed = (size >= STREAMED) | (tf.equal(size, 0) & (riff <= tf.cast(data, tf.int64)))
    size = tf.where(streamed, present, size)
    behind = find_chunk(contents, b"data", tf.cast(data, tf.int64) + 8 + size + size % 2)
    return {
        "form": form,  # byte at which the chunk "fmt " begins
        "data": data,  # byte at which the chunk "data" begins
        "second": behind,  # byte at which another one begins
        "tag": tag,
        "channels": channels,
        "bits": bits,
        "rate": number_at(contents, form + 12, 4),
        "size": size,  # bytes of samples that the header promises
        "present": present,  # bytes of samples that came
        "frames": size // tf.cast(2 * tf.maximum(channels, 1), tf.int64),
    }


def _header_problem(contents, header, sample_rate, max_seconds):
    """Why `decode_wav_bytes` refuses the contents, a scalar string; "" where it accepts them."""
    length = tf.strings.length(contents)
    tag, bits, channels = header["tag"], header["bits"], header["channels"]
    rate, size, present = header["rate"], header["size"], header["present"]
    seconds = tf.cast(header["frames"], tf.float32) / tf.cast(tf.maximum(rate, 1), tf.float32)
    pcm16 = tf.equal(tag, 1) & tf.equal(bits, 16) & (channels > 0)
    return first_problem(
        (tf.equal(length, 0), "The WAV is empty (0 bytes); expected 16-bit PCM."),
        (
            ~(has_at(contents, 0, b"RIFF") & has_at(contents, 8, b"WAVE")),
            ("The ", length, " bytes are not a WAV: they do not begin with RIFF and WAVE."),
        ),
        (
            header["form"] >= length,
            "The WAV has no 'fmt ' chunk; expected one, and then 'data'.",
        ),
        (
            ~pcm16,
            ("The WAV has format ", tag, ", ", bits, " bits and ", channels, " channels; expected "
             "format 1 (PCM), 16 bits and one channel or more."),
        ),
        (
            header["data"] >= length,
            "The WAV has no 'data' chunk; it is truncated or damaged.",
        ),
        (
            size > present,
            ("The WAV is truncated: its header promises ", size, " bytes of samples, ", present,
             " came."),
        ),
        (header["second"] < length, "The WAV has two 'data' chunks; expected one."),
        (
            ~can_resample(rate, sample_rate),
            ("The WAV has ", rate, f" Hz; expected {RATES[0]} to {RATES[1]} in a simple ratio to "
             f"{sample_rate}, such as 16000, 22050, 44100 or 48000."),
        ),
        (
            seconds > max_seconds,
            ("The WAV lasts ", seconds, f" s; at most {max_seconds:g} s are accepted."),
        ),
    )  # fmt: skip


def first_problem(*problems):
    """The message of the first condition that is true, "" where none is.

    Args:
        *problems: (bool tensor, message) pairs, tensors of one shape. A message is a string,
            or a tuple of strings and numeric tensors to be joined.

    Returns:
        string tensor of the shape of the conditions.
    """
    error = tf.zeros_like(problems[0][0], tf.string)
    for holds, message in reversed(problems):
        if not isinstance(message, str):
            message = tf.strings.join(
                [part if isinstance(part, str) else _as_text(part) for part in message]
            )
        error = tf.where(holds, message, error)
    return error


def _as_text(number):
    return tf.strings.as_string(number, precision=2 if number.dtype.is_floating else -1)


def number_at(contents, at, size, order="little"):
    """The unsigned integer of `size` bytes at byte `at`, int64; bytes past the end count as 0."""
    piece = tf.strings.substr(contents, tf.minimum(at, tf.strings.length(contents)), size)
    digits = tf.io.decode_raw(piece, tf.uint8, fixed_length=size)
    weights = 256 ** np.arange(size)[:: 1 if order == "little" else -1]
    return tf.reduce_sum(tf.cast(digits, tf.int64) * weights)


def has_at(contents, at, word):
    """Whether a scalar string has `word` at byte `at`."""
    at = tf.minimum(at, tf.strings.length(contents))
    return tf.equal(tf.strings.substr(contents, at, len(word)), word)


def find_chunk(contents, name, start=12):
    """Byte at which the first chunk of a RIFF file with this name begins, int32.

    It is the length of the contents where none of the MAX_CHUNKS from byte `start` on, an int or
    an int64 scalar, has this name.
    """
    length = tf.strings.length(contents)
    start = tf.minimum(tf.cast(start, tf.int64), tf.cast(length, tf.int64))

    def searching(at):
        return (at + 8 <= length) & ~has_at(contents, at, name)

    def following(at):
        size = number_at(contents, at + 4, 4)
        return [
            tf.cast(tf.minimum(tf.cast(at, tf.int64) + 8 + size + size % 2, 2**31 - 9), tf.int32)
        ]

    (at,) = tf.while_loop(
        searching, following, [tf.cast(start, tf.int32)], maximum_iterations=MAX_CHUNKS
    )
    return tf.where(has_at(contents, at, name), at, length)


def _is_pcm16(contents, sample_rate):
    # One comparison of nine 4-byte words: an operation costs as much on two bytes as on these.
    layout, ones4, ones2 = "<4s4x4s4s4xHHI4xHH", b"\xff" * 4, 2**16 - 1
    fields = (b"RIFF", b"WAVE", b"fmt ", 1, 0, sample_rate, 0, 16)  # 1: PCM
    masks = (ones4, ones4, ones4, ones2, 0, 2**32 - 1, 0, ones2)
    header, mask = struct.pack(layout, *fields), struct.pack(layout, *masks)
    words = tf.io.decode_raw(contents, tf.int32, fixed_length=len(header))
    matches = tf.bitwise.bitwise_and(words, np.frombuffer(mask, "<i4"))
    matches = tf.reduce_all(tf.equal(matches, np.frombuffer(header, "<i4")))
    return matches & (words[5] >= 2**16)  # one channel at least


def _decode_pcm16(contents):
    """float32 (samples,); empty where the sizes do not add up, which `read_audio` explains.

    tf.audio.decode_wav refuses a chunk of odd size and bytes after the last chunk. Both are
    common, so this function reads the chunks itself.
    """
    length = tf.strings.length(contents)
    at = find_chunk(contents, b"data")
    size = number_at(contents, at + 4, 4)
    end = tf.cast(at, tf.int64) + 8 + size
    second = find_chunk(contents, b"data", end + size % 2)
    whole = (end <= tf.cast(length, tf.int64)) & tf.equal(second, length)
    channels = tf.cast(number_at(contents, 22, 2), tf.int32)
    frames = tf.where(whole, tf.cast(size, tf.int32) // (2 * channels), 0)
    start = tf.minimum(at + 8, length)
    samples = tf.io.decode_raw(tf.strings.substr(contents, start, frames * 2 * channels), tf.int16)
    # (frames * channels,) -> (frames, channels)
    samples = tf.reshape(tf.cast(samples, tf.float32) / 2**15, [frames, channels])
    return tf.reduce_mean(samples, 1)
