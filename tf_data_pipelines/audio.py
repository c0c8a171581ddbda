"""Sound files to mono float32 waveforms at one sample rate, in Python: soundfile and soxr.

`read_audio` is the reference that every other decoder equals; every unusable file raises an
`AudioError`. It may read a part of a long file, also of one in an HDF5 file (hdf5.py).
`read_waveforms` gives many files as one array, `stream_audio` gives recordings of hours in blocks.
No TensorFlow here: exported models are run without it.
"""

import functools
import io
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import soundfile
import soxr

from tf_data_pipelines.hdf5 import read_recording, recording_length
from tf_data_pipelines.hints import PathLike
from tf_data_pipelines.parts import HDF5, AudioError, is_whole, part_frames, part_name
from tf_data_pipelines.settings import MAX_PEAK

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")
MIN_SAMPLES = 400  # one 25 ms analysis window at 16 kHz

BLOCK_FRAMES = 1 << 20  # frames that soundfile decodes at a time
MP3_SLACK = 3 * 1152  # libsndfile guesses the length of an MP3 without a Xing header
STREAMED = 0x7FFF0000  # sizes from here on are a pipe's placeholder, not a promise
OGG_HEADER = 27  # bytes before the lengths in the header of a page; the last is their number
MAX_CHUNKS = 256  # chunks of a WAV that are searched; a file of empty ones would take minutes


def read_audio(
    path: PathLike,
    sample_rate: int = 16000,
    *,
    min_samples: int = MIN_SAMPLES,
    start: float = 0.0,
    stop: float | None = None,
) -> np.ndarray:
    """Decode one sound file, or a part of it, to mono at `sample_rate`.

    The content of a file decides its format. Of a part only the part is decoded, except in an
    MP3, where what is before it is decoded too.

    Args:
        path: file name with one of AUDIO_EXTENSIONS; the file may have any rate, sample
            format and number of channels. Or an HDF5 file and the recording in it,
            "EPIC-KITCHENS-100_audio.hdf5/P01_01", see hdf5.py.
        sample_rate: sample rate of the result in Hz; soxr resamples files of another rate.
        min_samples: smallest number of samples of the result.
        start: second of the file at which the part begins.
        stop: second of the file at which the part ends; None for the end of the file. A part
            may end up to END_SLACK seconds behind its file and is then shorter.

    Returns:
        float32 (samples,), the average of the channels, full scale at 1.

    Raises:
        AudioError: the file is missing, a folder, of unknown extension, empty, not audio,
            truncated or silent, has NaN, infinite or huge samples, or has under `min_samples`;
            or the part lies beyond the end of the file.
    """
    path = os.fspath(path)
    if is_whole(path, start, stop):
        with _open(path) as file:
            contents = file.read()
        return decode_contents(path, contents, sample_rate, min_samples=min_samples)
    if HDF5 in path:
        samples, rate = read_recording(path, start, stop)
    else:
        with _mended_stream(path) as stream:
            samples, rate = _decode(path, stream, start, stop)
    name = part_name(path, start, stop)
    return _finished(name, samples, rate, sample_rate=sample_rate, min_samples=min_samples)


def read_waveforms(paths: Iterable[PathLike], samples: int, sample_rate: int = 16000) -> np.ndarray:
    """Decode sound files to one array: longer ones are cut, shorter ones end in zeros.

    Args:
        paths: file names, see `read_audio`.
        samples: number of samples of every waveform.
        sample_rate: sample rate of the result in Hz.

    Returns:
        float32 (clips, samples).

    Raises:
        AudioError: a file cannot be used, see `read_audio`.
    """
    return pad_waveforms([read_audio(path, sample_rate)[:samples] for path in paths], samples)


def pad_waveforms(waveforms: Sequence[np.ndarray], samples: int | None = None) -> np.ndarray:
    """One array of waveforms of any lengths: longer ones are cut, shorter ones end in zeros.

    Args:
        waveforms: list of float (samples,) arrays.
        samples: number of samples of every waveform; None for those of the longest.

    Returns:
        float32 (clips, samples).
    """
    if samples is None:
        samples = max(map(len, waveforms), default=0)
    padded = np.zeros((len(waveforms), samples), "float32")
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = waveform[:samples]
    return padded


def stream_audio(path: PathLike, sample_rate: int = 16000) -> tuple[float, Iterator[np.ndarray]]:
    """`read_audio` in blocks, in memory that does not grow with the recording.

    Only a WAV whose header has no length, as a pipe writes it, is read as a whole.

    Args:
        path: file name, see `read_audio`.
        sample_rate: sample rate of the result in Hz.

    Returns:
        seconds as the file announces them, and an iterator over float32 (samples,) blocks;
        joined together they are the waveform of `read_audio`.

    Raises:
        AudioError: the file cannot be used, see `read_audio`, which the iterator may find
            late. Silent and short files are accepted.
    """
    path = os.fspath(path)
    stream = _mended_stream(path)
    file = _sound_file(path, stream)

    def blocks():
        resampler = None
        if file.samplerate != sample_rate:
            resampler = soxr.ResampleStream(
                file.samplerate, sample_rate, num_channels=1, dtype="float32", quality="HQ"
            )
        with stream, file:
            for block in _channel_blocks(path, file, stream):
                wave = _mix(path, block)
                yield wave if resampler is None else resampler.resample_chunk(wave)
            if resampler is not None:
                yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)

    return file.frames / file.samplerate, blocks()


def announced_seconds(path, start=0.0, stop=None):
    """How long a sound file says it lasts; nothing is decoded, so it takes no time or memory.

    Args:
        path: file name, see `read_audio`.
        start, stop: seconds of a part, see `read_audio`.

    Returns:
        seconds, of a part its own; of an MP3 that does not say it, a guess.

    Raises:
        AudioError: the file cannot be opened, or the part lies beyond its end, see `read_audio`.
    """
    path = os.fspath(path)
    if HDF5 in path:
        frames, rate = recording_length(path)
    else:
        with _mended_stream(path) as stream, _sound_file(path, stream) as file:
            frames, rate = file.frames, file.samplerate
    if start == 0 and stop is None:
        return frames / rate
    first, last = part_frames(path, start, stop, frames=frames, rate=rate)
    return (last - first) / rate


def _mended_stream(path):
    """A sound file opened for reading bytes, in memory where the sizes in its header are mended."""
    with _open(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise AudioError(f"{path} is empty (0 bytes). Restore or remove it.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
            mended = _mend_wav(path, contents)
            return _open(path) if mended is contents else io.BytesIO(mended)


def _open(path):
    """A sound file opened for reading bytes."""
    if os.path.isdir(path):
        raise AudioError(f"{path} is a folder without sound files; expected a sound file.")
    if os.path.exists(path):
        check_extension(path)
    try:
        return open(path, "rb")
    except (FileNotFoundError, ValueError):  # a name with a null byte
        raise AudioError(
            f"{path} does not exist. Check the path, or the manifest's folder."
        ) from None
    except OSError as error:
        raise AudioError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from None


def check_extension(path):
    if not path.lower().endswith(AUDIO_EXTENSIONS):
        raise AudioError(
            f"{path} has none of the known extensions {', '.join(AUDIO_EXTENSIONS)}. Convert "
            f"it, for example with `ffmpeg -i in.m4a -ar 16000 -ac 1 out.wav`."
        )


def decode_contents(
    path, contents, sample_rate=16000, *, min_samples=MIN_SAMPLES, start=0.0, stop=None
):
    """`read_audio` of the bytes of a file; its path is for messages."""
    if not contents:
        raise AudioError(f"{path} is empty (0 bytes). Restore or remove it.")
    samples, rate = _decode(path, io.BytesIO(_mend_wav(path, contents)), start, stop)
    name = part_name(path, start, stop)
    return _finished(name, samples, rate, sample_rate=sample_rate, min_samples=min_samples)


def _decode(path, stream, start, stop):
    """float32 (frames, channels) of a file or of a part, and their rate in Hz."""
    with _sound_file(path, stream) as file:
        if is_whole(path, start, stop):
            blocks = list(_channel_blocks(path, file, stream))
        else:
            blocks = [_part_samples(path, file, start, stop)]
        none = np.zeros([0, file.channels], np.float32)
        return blocks[0] if len(blocks) == 1 else np.concatenate([*blocks, none]), file.samplerate


def _part_samples(path, file, start, stop):
    """float32 (frames, channels) of a part."""
    first, last = part_frames(path, start, stop, frames=file.frames, rate=file.samplerate)
    try:
        if file.format == "MP3" or not file.seekable():  # seeking in an MP3 is not exact
            while file.tell() < first and len(file.read(min(BLOCK_FRAMES, first - file.tell()))):
                pass
        else:
            file.seek(first)
        samples = file.read(last - first, "float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{part_name(path, start, stop)}, cannot be decoded: {error.error_string} The file is "
            f"truncated or damaged. Copy it again, or remove it."
        ) from None
    if len(samples) < last - first:
        raise AudioError(
            f"{part_name(path, start, stop)}, is truncated or damaged after {len(samples):,} of "
            f"{last - first:,} frames. Copy the file again, or remove it."
        )
    return samples


def _finished(path, samples, rate, *, sample_rate, min_samples):
    """float32 (frames, channels) of any rate to what `read_audio` gives."""
    channels, wave = samples.shape[1], _mix(path, samples)
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
    """float32 (frames, channels) to their average (frames,); NaN, infinity and huge raise."""
    # Channel by channel, which is ten times as fast as a mean along so short an axis.
    wave = functools.reduce(np.add, samples.T)
    wave = wave / np.float32(samples.shape[1]) if samples.shape[1] > 1 else wave
    peak = max(wave.max(initial=0), -wave.min(initial=0))  # NaN where there is one
    if not np.isfinite(peak):
        finite = np.isfinite(wave)
        raise AudioError(
            f"{path} has {wave.size - finite.sum():,} NaN or infinite of {wave.size:,} samples; "
            f"expected finite numbers in [-1, 1]. Write it again, or remove it."
        )
    if peak > MAX_PEAK:  # the power of a frame would overflow from about 1e18
        raise AudioError(
            f"{path} has samples up to {peak:.3g}; expected numbers in [-1, 1], and at most "
            f"{MAX_PEAK:g}. Divide it by its full scale (32768 for 16-bit integers), or remove it."
        )
    return wave


def _sound_file(path, stream):
    _check_ogg(path, stream)
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


def _check_ogg(path, stream):
    """Raise where an Ogg ends inside a page; libsndfile takes such a beginning for the whole."""
    size, at = stream.seek(0, io.SEEK_END), 0
    while at < size:
        stream.seek(at)
        header = stream.read(OGG_HEADER)
        if not b"OggS".startswith(header[:4]):
            break  # libsndfile says what it thinks of it
        lengths = stream.read(header[-1]) if len(header) == OGG_HEADER else b""
        at += OGG_HEADER + len(lengths) + sum(lengths)
        if len(header) < OGG_HEADER or len(lengths) < header[-1] or at > size:
            raise AudioError(
                f"{path} is truncated: its last page is not whole. Copy it again, or remove it."
            )
    stream.seek(0)


def _channel_blocks(path, file, stream):
    """Yield the samples as float32 (frames, channels); a truncated file raises at its end."""
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
    """The bytes, with the true sizes in the header of a streamed WAV; a truncated WAV raises."""
    if contents[:4] != b"RIFF" or contents[8:12] != b"WAVE":
        return contents
    at = _data_chunk(contents, 12)
    if at is None:
        return contents  # soundfile says so
    riff, size = (struct.unpack_from("<I", contents, place)[0] for place in (4, at + 4))
    present = len(contents) - at - 8
    if size >= STREAMED or (size == 0 and riff <= at):  # the sizes were never filled in
        sizes = struct.pack("<I", len(contents) - 8), struct.pack("<I", present)
        return contents[:4] + sizes[0] + contents[8 : at + 4] + sizes[1] + contents[at + 8 :]
    if size > present:
        raise AudioError(
            f"{path} is truncated: its header promises {size:,} bytes of samples, the file "
            f"has {present:,}. Copy it again, or remove it."
        )
    if _data_chunk(contents, at + 8 + size + size % 2) is not None:
        raise AudioError(
            f"{path} has two 'data' chunks; expected one, with all samples. Write it again, for "
            f"example with ffmpeg, or remove it."
        )
    return contents


def _data_chunk(contents, at):
    """Byte at which a chunk "data" begins, of the MAX_CHUNKS from byte `at` on; None without."""
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(contents):
            break
        if contents[at : at + 4] == b"data":
            return at
        size = struct.unpack_from("<I", contents, at + 4)[0]
        at += 8 + size + size % 2
    return None
