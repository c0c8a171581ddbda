"""Sound files to mono float32 waveforms at one sample rate, in Python and in tf.data.

`read_audio` is the reference: soundfile decodes, soxr resamples, every unusable file
raises an `AudioError`. `stream_audio` gives the same samples in blocks, for recordings of
hours. `decode_audio` gives the same samples inside a graph: 16-bit WAV
with TensorFlow alone, scanned FLAC and Ogg Vorbis with tensorflow-io where its native
operations run, everything else through `read_audio`.
"""

import functools
import io
import mmap
import os
import struct
import warnings

import numpy as np
import soundfile
import soxr
import tensorflow as tf

from tf_data_pipelines.resample import RATES, can_resample, resample

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")
MIN_SAMPLES = 400  # one 25 ms analysis window at 16 kHz

STREAMED = 0x7FFF0000  # a size from here on is a pipe's placeholder, not a promise
BLOCK_FRAMES = 1 << 20
MAX_CHUNKS = 256  # of a WAV that are looked at; a file of empty ones would take minutes
MP3_SLACK = 3 * 1152  # libsndfile guesses the length of an MP3 without a Xing header


class AudioError(ValueError):
    """One sound file that cannot be used; says which, what came and the way out."""


def read_audio(path, sample_rate=16000, min_samples=MIN_SAMPLES):
    """Decode one sound file to mono at `sample_rate`; its content decides the format.

    Args:
        path: file with one of AUDIO_EXTENSIONS; any rate, sample format and channels.
        sample_rate: Hz of the result; soxr's high quality where it differs.
        min_samples: fewest samples of the result.

    Returns:
        float32 (samples,), the average of the channels, full scale at 1.

    Raises:
        AudioError: missing, a folder, unknown extension, empty, not audio, truncated,
            with NaN or infinite samples, all silent, or under `min_samples`.
    """
    path = os.fspath(path)
    with _open(path) as file:
        contents = file.read()
    return _decode(path, contents, sample_rate, min_samples)


def decode_wav(path, sample_rate=16000):
    """A 16-bit PCM WAV at `sample_rate`, decoded by TensorFlow's own operations alone.

    So the graph also runs where there is no Python, as on tf.data service workers.

    Args:
        path: scalar string, or string tensor.
        sample_rate: Hz.

    Returns:
        float32 (samples,), as `read_audio`; empty for any other file.

    Raises:
        tf.errors.NotFoundError: no such file.
    """
    return _decode_wav(tf.io.read_file(path), sample_rate)


def _decode_wav(contents, sample_rate):
    return tf.cond(
        _is_pcm16(contents, sample_rate),
        lambda: _decode_pcm16(contents),
        functools.partial(tf.zeros, [0]),
    )


def stream_audio(path, sample_rate=16000):
    """`read_audio` in blocks, in memory that does not grow with the recording.

    Only a WAV whose header has no length, as a pipe writes it, is read whole.

    Args:
        path, sample_rate: as `read_audio`.

    Returns:
        seconds as the file announces them, and an iterator over float32 (samples,) blocks,
        whose concatenation is `read_audio`'s waveform.

    Raises:
        AudioError: as `read_audio`, now or on the way, but silence and shortness are not
            looked for.
    """
    path = os.fspath(path)
    with _open(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise AudioError(f"{path} is empty (0 bytes). Restore or remove it.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            mended = _mend_wav(path, contents)
            stream = None if mended is contents else io.BytesIO(mended)
    stream = stream or _open(path)
    file = _sound_file(path, stream)

    def blocks():
        resampler = None
        if file.samplerate != sample_rate:
            resampler = soxr.ResampleStream(file.samplerate, sample_rate, 1, "float32", "HQ")
        with stream, file:
            for block in _channel_blocks(path, file, stream):
                wave = _mix(path, block)
                yield wave if resampler is None else resampler.resample_chunk(wave)
            if resampler is not None:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)

    return file.frames / file.samplerate, blocks()


def decode_audio(path, sample_rate=16000, scanned=False):
    """`read_audio` for eager code and for tf.data's `map`, with the same samples.

    A 16-bit PCM WAV at `sample_rate` is `decode_wav`'s. tensorflow-io decodes scanned
    FLAC and Ogg Vorbis at `sample_rate` where its native operations run. Its resampler is
    far from soxr (relative error 0.7 on a sine) and its MP3 decoder from libsndfile's once
    a frame is damaged, so other rates and MP3 go to `read_audio`.

    Args:
        path: scalar string, or string tensor.
        sample_rate: Hz of the result.
        scanned: whether `read_audio` has accepted the file before, as in a ScannedSource; only
            then tensorflow-io decodes, which never returns from some damaged files, and
            silence is not looked for again.

    Returns:
        float32 (samples,), static shape (None,).

    Raises:
        AudioError: eagerly; inside a graph it becomes a tf.errors.InvalidArgumentError
            with the same text.
        tf.errors.NotFoundError: no such file.
    """
    path = tf.convert_to_tensor(path, tf.string)
    contents = tf.io.read_file(path)
    wave = _decode_wav(contents, sample_rate)
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
    # What no native branch took, and what read_audio would refuse, is read_audio's.
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


def decode_wav_bytes(contents, sample_rate=16000, max_seconds=60.0):
    """A 16-bit PCM WAV to mono, for graphs that are served: no Python, and no file can raise.

    Any rate that `can_resample`, any channels, plain or WAVE_FORMAT_EXTENSIBLE header, other
    chunks before the samples, sizes that a pipe left open.

    Args:
        contents: scalar string, the bytes of the file.
        sample_rate: Hz of the result; `resample` where it differs.
        max_seconds: the longest sound that is decoded.

    Returns:
        waveform float32 (samples,), the average of the channels, full scale at 1; and error, a
        scalar string: what came and what was expected, or "" and only then are there samples.
    """
    length = tf.strings.length(contents)
    form, data = _find_chunk(contents, b"fmt "), _find_chunk(contents, b"data")
    tag, channels, bits, subtype = (
        tf.cast(_number(contents, form + at, 2), tf.int32) for at in (8, 10, 22, 32)
    )
    tag = tf.where(tf.equal(tag, 0xFFFE), subtype, tag)  # WAVE_FORMAT_EXTENSIBLE
    rate, riff = _number(contents, form + 12, 4), _number(contents, 4, 4)
    present = tf.cast(length - data - 8, tf.int64)
    size = _number(contents, data + 4, 4)
    streamed = (size >= STREAMED) | (tf.equal(size, 0) & (riff <= tf.cast(data, tf.int64)))
    size = tf.where(streamed, present, size)
    frames = size // tf.cast(2 * tf.maximum(channels, 1), tf.int64)
    seconds = tf.cast(frames, tf.float32) / tf.cast(tf.maximum(rate, 1), tf.float32)
    pcm16 = tf.equal(tag, 1) & tf.equal(bits, 16) & (channels > 0)
    error = first_problem(
        (tf.equal(length, 0), "The WAV is empty (0 bytes); expected 16-bit PCM."),
        (
            ~(_has(contents, 0, b"RIFF") & _has(contents, 8, b"WAVE")),
            ("The ", length, " bytes are not a WAV: they do not begin with RIFF and WAVE."),
        ),
        (form >= length, "The WAV has no 'fmt ' chunk; expected one, and then 'data'."),
        (
            ~pcm16,
            ("The WAV has format ", tag, ", ", bits, " bits and ", channels, " channels; expected "
             "format 1 (PCM), 16 bits and one channel or more."),
        ),
        (data >= length, "The WAV has no 'data' chunk; it is truncated or damaged."),
        (
            size > present,
            ("The WAV is truncated: its header promises ", size, " bytes of samples, ", present,
             " came."),
        ),
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

    def decode():
        place = tf.strings.substr(contents, data + 8, tf.cast(frames, tf.int32) * 2 * channels)
        # (frames * channels,) -> (frames, channels)
        samples = tf.reshape(tf.io.decode_raw(place, tf.int16), [-1, channels])
        waveform = tf.reduce_mean(tf.cast(samples, tf.float32) / 2**15, 1)
        return resample(waveform, rate, sample_rate)

    waveform = tf.cond(tf.equal(error, ""), decode, lambda: tf.zeros([0]))
    return tf.ensure_shape(waveform, [None]), error


def first_problem(*problems):
    """The message of the first condition that holds, "" where none does.

    Args:
        *problems: (bool tensor, message) pairs of one shape; a message is a string or a tuple
            of strings and numeric tensors to be joined.

    Returns:
        string tensor of the conditions' shape.
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


def _open(path):
    """A sound file opened for reading bytes."""
    if os.path.isdir(path):
        raise AudioError(f"{path} is a folder; expected one sound file.")
    _check_extension(path)
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise AudioError(
            f"{path} does not exist. Check the path, or the manifest's folder."
        ) from None
    except OSError as error:
        raise AudioError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from None


def _decode_bytes(path, contents, sample_rate):
    """`read_audio` of bytes already read, so that remote file systems work too."""
    # Scalars come as bytes from a graph and as arrays eagerly; "object" keeps last zeros.
    path, contents = (np.asarray(value, object).item() for value in (path, contents))
    path = os.fsdecode(path)
    _check_extension(path)
    return _decode(path, contents, sample_rate, MIN_SAMPLES)


def _check_extension(path):
    if not path.lower().endswith(AUDIO_EXTENSIONS):
        raise AudioError(
            f"{path} has none of the known extensions {', '.join(AUDIO_EXTENSIONS)}. Convert "
            f"it, for example with `ffmpeg -i in.m4a -ar 16000 -ac 1 out.wav`."
        )


def _decode(path, contents, sample_rate, min_samples):
    if not contents:
        raise AudioError(f"{path} is empty (0 bytes). Restore or remove it.")
    stream = io.BytesIO(_mend_wav(path, contents))
    with _sound_file(path, stream) as file:
        blocks = list(_channel_blocks(path, file, stream))
        rate, channels = file.samplerate, file.channels
    wave = _mix(path, np.concatenate(blocks or [np.zeros([0, channels], np.float32)]))
    if wave.size and wave.min() == wave.max():
        raise AudioError(
            f"{path} is silent: all {wave.size:,} samples, averaged over {channels} channel(s), "
            f"are {wave[0]:g}. Record it again, or remove it."
        )
    if rate != sample_rate:
        wave = soxr.resample(wave, rate, sample_rate, quality="HQ")
    if wave.size < min_samples:
        raise AudioError(
            f"{path} lasts {wave.size / sample_rate:.4f} s ({wave.size:,} samples at "
            f"{sample_rate} Hz); at least {1000 * min_samples / sample_rate:g} ms "
            f"({min_samples:,} samples) are needed. Pad it with background sound, or remove it."
        )
    return np.ascontiguousarray(wave, np.float32)


def _mix(path, samples):
    """float32 (frames, channels) as their finite average (frames,)."""
    wave = samples[:, 0] if samples.shape[1] == 1 else samples.mean(1, dtype=np.float32)
    finite = np.isfinite(wave)
    if not finite.all():
        raise AudioError(
            f"{path} has {wave.size - finite.sum():,} NaN or infinite of {wave.size:,} samples; "
            f"expected finite numbers in [-1, 1]. Write it again, or remove it."
        )
    return wave


def _sound_file(path, stream):
    try:
        file = soundfile.SoundFile(stream)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path} cannot be decoded: {error.error_string.strip()} Expected WAV, FLAC, Ogg, "
            f"MP3, Opus or AIFF content; convert it with ffmpeg, or remove it."
        ) from None
    if file.frames > 1 << 62:
        raise AudioError(
            f"{path} is a streamed {file.format} whose header has no length. Write it "
            f"again with `ffmpeg -i in.flac out.flac`."
        )
    return file


def _channel_blocks(path, file, stream):
    """All samples, float32 (frames, channels) blocks; a truncated file raises at its end."""
    announced, decoded = file.frames, 0
    try:
        while len(block := file.read(BLOCK_FRAMES, "float32", always_2d=True)):
            decoded += len(block)
            yield block
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{path} is truncated or damaged after {decoded:,} of "
            f"{announced:,} frames: {error.error_string} Copy it again, or remove it."
        ) from None
    slack = MP3_SLACK if file.format == "MP3" else 0
    read, size = stream.tell(), stream.seek(0, io.SEEK_END)
    unread = size - read if file.format == "MP3" else 0
    if decoded < announced - slack or unread > max(size // 10, 4096):
        raise AudioError(
            f"{path} is truncated or has no true length: {decoded:,} of {announced:,} "
            f"frames decoded, {unread:,} bytes unread. Copy it again, or write it again "
            f"with ffmpeg."
        )


def _mend_wav(path, contents):
    """The bytes, with true sizes in a streamed WAV's header; a truncated one raises."""
    if contents[:4] != b"RIFF" or contents[8:12] != b"WAVE":
        return contents
    at = 12
    while contents[at : at + 4] != b"data":
        if at + 8 > len(contents):
            return contents  # no data chunk: soundfile says so
        size = struct.unpack_from("<I", contents, at + 4)[0]
        at += 8 + size + size % 2
    if at + 8 > len(contents):
        return contents
    riff, size = (
        struct.unpack_from("<I", contents, 4)[0],
        struct.unpack_from("<I", contents, at + 4)[0],
    )
    present = len(contents) - at - 8
    if size >= STREAMED or (size == 0 and riff <= at):  # the sizes were never filled in
        sizes = struct.pack("<I", len(contents) - 8), struct.pack("<I", present)
        return contents[:4] + sizes[0] + contents[8 : at + 4] + sizes[1] + contents[at + 8 :]
    if size > present:
        raise AudioError(
            f"{path} is truncated: its header promises {size:,} bytes of samples, the file "
            f"has {present:,}. Copy it again, or remove it."
        )
    return contents


def _number(contents, at, size, order="little"):
    """The unsigned integer of `size` bytes inside a scalar string, int64; zeros past its end."""
    piece = tf.strings.substr(contents, tf.minimum(at, tf.strings.length(contents)), size)
    digits = tf.io.decode_raw(piece, tf.uint8, fixed_length=size)
    weights = 256 ** np.arange(size)[:: 1 if order == "little" else -1]
    return tf.reduce_sum(tf.cast(digits, tf.int64) * weights)


def _has(contents, at, word):
    """Whether a scalar string holds `word` at byte `at`."""
    at = tf.minimum(at, tf.strings.length(contents))
    return tf.equal(tf.strings.substr(contents, at, len(word)), word)


def _is_pcm16(contents, sample_rate):
    # One comparison of nine 4-byte words: an operation costs as much on two bytes as on these.
    layout, ones4, ones2 = "<4s4x4s4s4xHHI4xHH", b"\xff" * 4, 2**16 - 1
    header = struct.pack(layout, b"RIFF", b"WAVE", b"fmt ", 1, 0, sample_rate, 0, 16)  # 1: PCM
    mask = struct.pack(layout, ones4, ones4, ones4, ones2, 0, 2**32 - 1, 0, ones2)
    words = tf.io.decode_raw(contents, tf.int32, fixed_length=len(header))
    matches = tf.bitwise.bitwise_and(words, np.frombuffer(mask, "<i4"))
    matches = tf.reduce_all(tf.equal(matches, np.frombuffer(header, "<i4")))
    return matches & (words[5] >= 2**16)  # one channel at least


def _find_chunk(contents, name):
    """Byte at which the first chunk of a RIFF file with this name begins, int32.

    The length of the contents where there is none among the first MAX_CHUNKS.
    """
    length = tf.strings.length(contents)

    def searching(at):
        return (at + 8 <= length) & ~_has(contents, at, name)

    def following(at):
        size = _number(contents, at + 4, 4)
        return [
            tf.cast(tf.minimum(tf.cast(at, tf.int64) + 8 + size + size % 2, 2**31 - 9), tf.int32)
        ]

    (at,) = tf.while_loop(searching, following, [tf.constant(12)], maximum_iterations=MAX_CHUNKS)
    return tf.where(_has(contents, at, name), at, length)


def _decode_pcm16(contents):
    """float32 (samples,); empty where the sizes do not add up, which read_audio explains.

    tf.audio.decode_wav refuses a chunk of odd size and bytes after the last chunk, both
    common, so the chunks are walked here.
    """
    length = tf.strings.length(contents)
    at = _find_chunk(contents, b"data")
    size = _number(contents, at + 4, 4)
    whole = tf.cast(at, tf.int64) + 8 + size <= tf.cast(length, tf.int64)
    channels = tf.cast(_number(contents, 22, 2), tf.int32)
    frames = tf.where(whole, tf.cast(size, tf.int32) // (2 * channels), 0)
    start = tf.minimum(at + 8, length)
    samples = tf.io.decode_raw(tf.strings.substr(contents, start, frames * 2 * channels), tf.int16)
    # (frames * channels,) -> (frames, channels)
    samples = tf.reshape(tf.cast(samples, tf.float32) / 2**15, [frames, channels])
    return tf.reduce_mean(samples, 1)


@functools.cache
def _tensorflow_io():
    """tensorflow_io.audio where its native operations run, else None.

    It imports with any TensorFlow but is compiled for one, so an operation is tried.
    Only its operations on bytes are used: the handle behind IOTensor.from_audio is shared
    by parallel map calls and mixes up files.
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
    """A 16- or 24-bit FLAC at `sample_rate`."""
    rate, bits = _flac_format(contents)
    known_bits = tf.equal(bits, 16) | tf.equal(bits, 24)
    return _has(contents, 0, b"fLaC") & tf.equal(rate, sample_rate) & known_bits


def _flac_format(contents):
    """Rate in Hz and bits from STREAMINFO: 20 bits rate, 3 channels - 1, 5 bits - 1."""
    packed = _number(contents, 18, 4, "big")
    return packed // 2**12, packed // 2**4 % 32 + 1


def _decode_flac(audio, contents):
    return tf.cond(
        tf.equal(_flac_format(contents)[1], 16),
        lambda: tf.cast(audio.decode_flac(contents, dtype=tf.int16), tf.float32) / 2**15,
        lambda: tf.cast(audio.decode_flac(contents, dtype=tf.int32), tf.float32) / 2**31,
    )


def _is_vorbis(contents, sample_rate):
    return _has(contents, 28, b"\x01vorbis") & tf.equal(_number(contents, 40, 4), sample_rate)
