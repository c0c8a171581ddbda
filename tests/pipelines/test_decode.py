"""Properties of decoding, and one message for each kind of bad file."""

import struct

import numpy as np
import pytest
import soundfile
import tensorflow as tf

from tf_data_pipelines import audio, decode
from tf_data_pipelines.audio import (
    AudioError,
    announced_seconds,
    pad_waveforms,
    read_audio,
    read_waveforms,
    stream_audio,
)
from tf_data_pipelines.decode import decode_audio
from tf_data_pipelines.wav import decode_wav_bytes

RATE = 16000
FORMATS = [
    ("wav", "PCM_U8", 2**-7),
    ("wav", "PCM_16", 2**-15),
    ("wav", "PCM_24", 1e-6),
    ("wav", "PCM_32", 1e-6),
    ("wav", "FLOAT", 1e-6),
    ("wav", "DOUBLE", 1e-6),
    ("flac", "PCM_16", 2**-15),
    ("flac", "PCM_24", 1e-6),
    ("aiff", "PCM_16", 2**-15),
    ("ogg", "VORBIS", 0.03),
    ("ogg", "OPUS", 0.05),
    ("mp3", "MPEG_LAYER_III", 0.03),
]


def tone(rate=RATE, seconds=0.5, hertz=441.0, channels=1):
    """float64 (samples, channels): a sine at 0.5, each further channel half as loud."""
    times = np.arange(round(rate * seconds)) / rate
    return 0.5 * np.sin(2 * np.pi * hertz * times)[:, None] * 0.5 ** np.arange(channels)


def write(path, samples=None, rate=RATE, **kwargs):
    soundfile.write(path, tone(rate) if samples is None else samples, rate, **kwargs)
    return str(path)


def through_map(paths, sample_rate=RATE, scanned=False):
    """The clips after tf.data's parallel map, and the dataset's static shape."""
    dataset = tf.data.Dataset.from_tensor_slices(paths)
    dataset = dataset.map(
        lambda path: decode_audio(path, sample_rate, scanned=scanned), num_parallel_calls=2
    )
    return list(dataset.as_numpy_iterator()), dataset.element_spec.shape.as_list()


def riff(*chunks, size=None):
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def chunk(name, body, size=None):
    return name + struct.pack("<I", len(body) if size is None else size) + body


FMT = chunk(b"fmt ", struct.pack("<HHIIHH", *(1, 1, RATE, 2 * RATE, 2, 16)))
PCM = (1000 * np.sin(np.arange(1009))).astype("<i2")


@pytest.mark.parametrize(("extension", "subtype", "tolerance"), FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_keep_the_samples(tmp_path, extension, *, subtype, tolerance, channels):
    samples = tone(channels=channels)
    path = write(tmp_path / f"a.{extension}", samples, subtype=subtype)
    wave = read_audio(path)
    assert wave.dtype == np.float32 and wave.shape == (len(samples),)
    margin = 200  # lossy codecs smear the ends
    error = np.abs(wave - samples.mean(1))
    assert error[margin:-margin].max() <= tolerance


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_keeps_frequency_amplitude_and_length(tmp_path, rate):
    wave = read_audio(write(tmp_path / "a.wav", tone(rate, seconds=1.0), rate, subtype="FLOAT"))
    assert abs(len(wave) - RATE) <= 1
    inner = slice(400, 15600)
    assert np.abs(wave[inner] - tone(RATE, 1.0)[inner, 0]).max() < 1e-3


def test_three_channels_are_averaged(tmp_path):
    path = write(tmp_path / "a.wav", tone(channels=3), subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path), tone()[:, 0] * 1.75 / 3, atol=1e-6)


def test_content_decides_the_format(tmp_path):
    path = write(tmp_path / "a.wav", format="FLAC")
    np.testing.assert_array_equal(decode_audio(path), read_audio(path))
    np.testing.assert_allclose(read_audio(path), tone()[:, 0], atol=2**-15)


def test_eager_and_map_agree_with_read_audio(tmp_path):
    paths = []
    for extension, subtype, _ in FORMATS:
        for channels, rate in ((1, RATE), (2, RATE), (2, 48000)):
            path = tmp_path / f"{subtype}{channels}{rate}.{extension}"
            paths.append(write(path, tone(rate, channels=channels), rate, subtype=subtype))
    mapped, shape = through_map(paths, scanned=True)
    assert shape == [None]
    for path, wave in zip(paths, mapped, strict=True):
        np.testing.assert_array_equal(decode_audio(path, scanned=True), wave)
        np.testing.assert_array_equal(decode_audio(path), read_audio(path))
        # tensorflow-io's Vorbis rounds differently from libsndfile's
        np.testing.assert_allclose(wave, read_audio(path), atol=2e-6, err_msg=path)


@pytest.mark.parametrize("sample_rate", [8000, 22050])
def test_other_sample_rates(tmp_path, sample_rate):
    paths = [write(tmp_path / name) for name in ("a.wav", "a.flac")]
    paths.append(write(tmp_path / "b.wav", tone(sample_rate), sample_rate))
    for path, wave in zip(paths, through_map(paths, sample_rate)[0], strict=True):
        np.testing.assert_array_equal(wave, read_audio(path, sample_rate))
        assert len(wave) == sample_rate // 2


@pytest.mark.parametrize(
    "contents",
    [
        riff(FMT, chunk(b"data", PCM.tobytes())),
        riff(FMT, chunk(b"LIST", b"abcdef"), chunk(b"data", PCM.tobytes())),
        riff(FMT, chunk(b"LIST", b"abcde", 5) + b"\0", chunk(b"data", PCM.tobytes())),
        riff(FMT, chunk(b"data", PCM.tobytes()), chunk(b"LIST", b"abcd")),
        riff(FMT, chunk(b"data", PCM.tobytes())) + b"xyz",
        riff(FMT, chunk(b"data", PCM.tobytes(), 0), size=0),
        riff(FMT, chunk(b"data", PCM.tobytes(), 0), size=36),
        riff(FMT, chunk(b"data", PCM.tobytes(), 0xFFFFFFFF), size=0xFFFFFFFF),
        riff(FMT, chunk(b"data", PCM.tobytes(), 0x7FFFF000), size=0x7FFFF024),
    ],
    ids=[
        "plain",
        "list",
        "odd_list",
        "tail",
        "garbage",
        "stream0",
        "stream36",
        "streamF",
        "stream7",
    ],
)
def test_wav_chunks_and_streamed_sizes(tmp_path, contents):
    path = tmp_path / "a.wav"
    path.write_bytes(contents)
    np.testing.assert_array_equal(read_audio(path), PCM / np.float32(2**15))
    np.testing.assert_array_equal(decode_audio(str(path)), PCM / np.float32(2**15))


def test_16_bit_wav_needs_no_python(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", tone(channels=2))
    expected = read_audio(path)

    def refuse(*args):
        raise AssertionError("Python was called")

    monkeypatch.setattr(decode, "decode_contents", refuse)
    np.testing.assert_array_equal(through_map([path])[0][0], expected)


def test_tensorflow_io_needs_no_python(tmp_path, monkeypatch):
    if decode._tensorflow_io() is None:
        pytest.skip("tensorflow-io is missing, or compiled for another TensorFlow")
    paths = [
        write(
            tmp_path / f"{subtype}{channels}.{extension}", tone(channels=channels), subtype=subtype
        )
        for extension, subtype, _ in FORMATS
        if (extension, subtype) != ("ogg", "OPUS") and extension in ("flac", "ogg")
        for channels in (1, 2)
    ]
    expected = [read_audio(path) for path in paths]
    monkeypatch.setattr(decode, "decode_contents", None)
    for wave, reference in zip(through_map(paths * 5, scanned=True)[0], expected * 5, strict=True):
        np.testing.assert_allclose(wave, reference, atol=2e-6)


def bad_files(folder):
    """{name: (path, what the message says)}: every kind of file that cannot be used."""
    noise = np.random.default_rng(5).normal(0, 0.1, 5 * RATE)
    bad = {}

    def add(name, message, contents=None, samples=None, **kwargs):
        path = folder / name
        if contents is not None:
            path.write_bytes(contents)
        elif samples is not None:
            write(path, samples, **kwargs)
        bad[name] = str(path), message

    def cut(name, message, share, **kwargs):
        path = folder / name
        write(path, noise, **kwargs)
        whole = path.read_bytes()
        add(name, message, whole[: int(len(whole) * share)])

    add("c.m4a", r"none of the known extensions \.wav, .*ffmpeg", b"some")
    add("empty.wav", r"is empty \(0 bytes\)", b"")
    add("text.wav", "cannot be decoded: Format not recogni.ed.*ffmpeg", b"not a sound " * 50)
    add("short_header.wav", "cannot be decoded", b"RIFF")
    cut("cut.wav", "truncated: its header promises 160,000 bytes.* has 79,978", 0.5)
    cut("cut24.wav", "truncated: its header promises 240,000", 0.5, subtype="PCM_24")
    write(folder / "whole.flac", noise)
    flac = bytearray((folder / "whole.flac").read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # STREAMINFO: 36 bits of length
    add("streamed.flac", "header has no length.*ffmpeg", bytes(flac))
    nan = tone()
    nan[7] = np.nan
    nan[8] = np.inf
    add("nan.wav", "2 NaN or infinite of 8,000 samples", samples=nan, subtype="FLOAT")
    add("huge.wav", r"samples up to 1e\+20; .* at most 16", samples=2e20 * tone(), subtype="FLOAT")
    add("twice.wav", "two 'data' chunks", riff(FMT, *2 * [chunk(b"data", PCM.tobytes())]))
    add("silent.wav", "silent: all 8,000 samples", samples=np.zeros(8000))
    add("constant.flac", "silent.* are 0.25", samples=np.full(8000, 0.25))
    add("constant.wav", "silent.* are 0.25", samples=np.full(8000, 0.25), rate=22050)
    add("antiphase.wav", "silent.*2 channel", samples=tone() * [1, -1], subtype="FLOAT")
    add("short.wav", r"lasts 0\.0249 s \(399 samples.* at least 25 ms", samples=tone()[:399])
    add("short.flac", r"lasts 0\.0063 s \(100 .* at least 25 ms", samples=tone()[1:101])
    add("no_samples.wav", r"lasts 0\.0000 s \(0 samples", samples=np.zeros(0))
    return bad


def test_bad_files_are_named(tmp_path):
    for path, message in bad_files(tmp_path).values():
        with pytest.raises(AudioError, match=message) as caught:
            read_audio(path)
        assert path in str(caught.value)
        with pytest.raises(AudioError, match=message):
            decode_audio(path)
    for name in ("nan.wav", "huge.wav", "silent.wav", "short.wav", "cut.wav", "text.wav", "c.m4a"):
        path, message = bad_files(tmp_path)[name]
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            through_map([path])


@pytest.mark.parametrize("extension", ["flac", "mp3"])
def test_cut_compressed_files_are_refused_by_both(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    write(path, np.random.default_rng(5).normal(0, 0.1, 5 * RATE))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match=rf"a\.{extension} is truncated or .* of 80,000"):
        read_audio(path)
    with pytest.raises(AudioError, match=rf"a\.{extension} is truncated or .* of 80,000"):
        decode_audio(str(path))


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_a_cut_ogg_is_refused_also_in_blocks(tmp_path, codec):
    path = tmp_path / "a.ogg"
    write(path, np.random.default_rng(5).normal(0, 0.1, 5 * RATE), format="OGG", subtype=codec)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 1, whole.rindex(b"OggS") + 26):
        path.write_bytes(whole[:size])
        for read in (read_audio, lambda path: list(stream_audio(path)[1])):
            with pytest.raises(AudioError, match=r"a\.ogg is truncated: its last page"):
                read(path)
    path.write_bytes(whole)
    assert len(read_audio(path)) == 5 * RATE


def test_mp3_of_unknown_length_is_not_cut_silently(tmp_path):
    """libsndfile guesses the length of a variable bit rate MP3 that lost its Xing frame."""
    path = tmp_path / "a.mp3"
    noise = np.random.default_rng(5).normal(0, 0.1, 5 * RATE)
    write(path, noise, bitrate_mode="VARIABLE")
    whole = path.read_bytes()
    path.write_bytes(whole[whole.find(whole[:2], 4) :])
    with pytest.raises(AudioError, match=r"no true length.*ffmpeg"):
        read_audio(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(AudioError, match="gone does not exist"):
        read_audio(tmp_path / "gone")
    with pytest.raises(AudioError, match=r"b\.wav does not exist"):
        read_audio(tmp_path / "b.wav")
    with pytest.raises(AudioError, match="is a folder"):
        read_audio(tmp_path)
    with pytest.raises(tf.errors.NotFoundError, match=r"b\.wav"):
        decode_audio(str(tmp_path / "b.wav"))


def test_min_samples_is_the_shortest_allowed(tmp_path):
    path = write(tmp_path / "a.wav", tone()[:701])
    assert read_audio(path, min_samples=701).shape == (701,)
    with pytest.raises(AudioError, match=r"at least 43\.875 ms \(702 samples"):
        read_audio(path, min_samples=702)


def test_waveforms_are_cut_or_end_in_zeros(tmp_path):
    paths = [
        write(tmp_path / "short.wav", tone()[:701]),
        write(tmp_path / "long.flac", tone()),
        write(tmp_path / "other.wav", tone(48000), 48000),
    ]
    found = read_waveforms(paths, 1009)
    assert found.shape == (3, 1009) and found.dtype == np.float32
    for path, row in zip(paths, found, strict=True):
        whole = read_audio(path)
        np.testing.assert_array_equal(row[: len(whole)], whole[:1009])
        assert not row[len(whole) :].any()
    low = read_waveforms(paths[2:], 1009, 8000)[0]
    np.testing.assert_array_equal(low, read_audio(paths[2], 8000)[:1009])
    with pytest.raises(AudioError, match=r"gone\.wav does not exist"):
        read_waveforms([*paths, tmp_path / "gone.wav"], 1009)


def test_padded_waveforms_are_as_long_as_the_longest():
    waveforms = [np.ones(3), np.arange(5.0), np.zeros(0)]
    expected = [[1, 1, 1, 0, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(pad_waveforms(waveforms), expected)
    np.testing.assert_array_equal(pad_waveforms(waveforms, 2), np.array(expected)[:, :2])
    assert pad_waveforms([], 7).shape == (0, 7) and pad_waveforms([]).shape == (0, 0)


def header(tag=1, channels=1, *, rate=RATE, bits=16, extra=b""):
    align = channels * bits // 8
    fields = tag, channels, rate, rate * align % 2**32, align, bits
    return chunk(b"fmt ", struct.pack("<HHIIHH", *fields) + extra)


# Size of the rest, valid bits, speakers, and a subtype whose first two bytes are the format.
EXTENSIBLE = struct.pack("<HHIH", *(22, 16, 4, 1)) + bytes.fromhex("000000001000800000aa00389b71")
DATA = chunk(b"data", PCM.tobytes())


@pytest.mark.parametrize("rate", [8000, 11025, RATE, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_wav_bytes_in_a_graph_are_those_of_read_audio(tmp_path, rate, channels):
    path = write(tmp_path / "a.wav", tone(rate, channels=channels), rate, subtype="PCM_16")
    contents = (tmp_path / "a.wav").read_bytes()
    waveform, error = tf.function(decode_wav_bytes)(tf.constant(contents))
    assert error == b""
    expected = read_audio(path)
    # The sine begins and ends abruptly, where the resamplers differ most.
    tolerance = 0 if rate == RATE else 2e-3
    np.testing.assert_allclose(waveform, expected, atol=tolerance)
    np.testing.assert_allclose(waveform[400:-400], expected[400:-400], atol=tolerance / 20)


@pytest.mark.parametrize(
    "contents",
    [
        riff(FMT, DATA),
        riff(chunk(b"JUNK", bytes(28)), FMT, chunk(b"LIST", bytes(5)) + b"\0", DATA),
        riff(header(0xFFFE, extra=EXTENSIBLE), DATA),
        riff(FMT, chunk(b"data", PCM.tobytes(), size=0xFFFFFFFF), size=0xFFFFFFFF),
        riff(FMT, chunk(b"data", PCM.tobytes(), size=0), size=0),
        riff(FMT, DATA, chunk(b"LIST", bytes(6))) + b"tail",
    ],
    ids=["plain", "chunks before", "extensible", "streamed", "streamed, zeros", "chunks behind"],
)
def test_wav_bytes_with_any_usual_header(contents):
    waveform, error = decode_wav_bytes(tf.constant(contents))
    assert error == b""
    np.testing.assert_array_equal(waveform, (PCM / 2**15).astype("float32"))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "empty (0 bytes)"),
        (b"hello, this is text", "The 19 bytes are not a WAV"),
        (b"RIFF", "The 4 bytes are not a WAV"),
        (riff(), "no 'fmt ' chunk"),
        (riff(DATA), "no 'fmt ' chunk"),
        (riff(FMT), "no 'data' chunk"),
        (riff(FMT, b"da"), "no 'data' chunk"),
        (riff(*[chunk(b"JUNK", b"")] * 300, FMT, DATA), "no 'fmt ' chunk"),
        (riff(FMT, DATA)[:-1], "promises 2018 bytes of samples, 2017 came"),
        (riff(FMT, DATA)[:40], "truncated"),
        (riff(FMT, DATA, chunk(b"LIST", bytes(6)), DATA), "two 'data' chunks"),
        (riff(header(rate=22050), chunk(b"data", 900 * b"\1\2")), "silent"),
        (riff(header(bits=24), DATA), "format 1, 24 bits and 1 channels; expected format 1"),
        (riff(header(3, bits=32), DATA), "format 3, 32 bits"),
        (riff(header(channels=0), DATA), "0 channels"),
        (riff(header(0xFFFE, extra=EXTENSIBLE.replace(b"\1\0\0\0\0\0", b"\3" + bytes(5))), DATA),
         "format 3, 16 bits"),
        (riff(header(rate=0), DATA), "has 0 Hz; expected 4000 to 192000"),
        (riff(header(rate=44101), DATA), "has 44101 Hz"),
        (riff(header(rate=2**32 - 1), DATA), "has 4294967295 Hz"),
        (riff(header(rate=4000), chunk(b"data", bytes(8002 * 8))), "lasts 8.00 s; at most 8 s"),
    ],
)  # fmt: skip
def test_bad_wav_bytes_are_explained_and_raise_nothing(contents, message):
    waveform, error = tf.function(decode_wav_bytes)(tf.constant(contents), max_seconds=8.0)
    assert message in error.numpy().decode()
    assert waveform.shape == (0,)


@pytest.mark.parametrize("rate", [RATE, 22050, 48000])
@pytest.mark.parametrize("extension", ["wav", "flac", "mp3"])
def test_streamed_blocks_are_the_whole_recording(tmp_path, monkeypatch, rate, extension):
    noise = np.random.default_rng(3).normal(0, 0.1, (rate, 2))
    path = write(tmp_path / f"a.{extension}", noise, rate)
    whole = read_audio(path)
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 4801)
    seconds, blocks = stream_audio(path)
    blocks = list(blocks)
    assert seconds == pytest.approx(1, abs=0.1) and len(blocks) >= rate // 4801
    assert max(map(len, blocks)) < 3 * 4801
    np.testing.assert_allclose(np.concatenate(blocks), whole, rtol=0, atol=1e-6)


def test_the_length_is_told_without_decoding(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"a.{kind}", tone(22050), 22050) for kind in ("wav", "flac", "ogg")]
    streamed = tmp_path / "streamed.wav"
    streamed.write_bytes(riff(FMT, chunk(b"data", PCM.tobytes(), 0xFFFFFFFF), size=0xFFFFFFFF))
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    for path in paths:
        assert announced_seconds(path) == pytest.approx(0.5)
    assert announced_seconds(streamed) == len(PCM) / RATE
    with pytest.raises(AudioError, match=r"gone\.wav does not exist"):
        announced_seconds(tmp_path / "gone.wav")


def test_zeros_behind_the_samples_are_no_chunks(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(riff(FMT, chunk(b"data", PCM.tobytes())) + bytes(4096))
    np.testing.assert_array_equal(read_audio(path), PCM / np.float32(2**15))
    np.testing.assert_array_equal(decode_audio(str(path)), PCM / np.float32(2**15))


def test_streaming_mends_and_refuses_as_reading_does(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(riff(FMT, chunk(b"data", PCM.tobytes(), 0xFFFFFFFF), size=0xFFFFFFFF))
    np.testing.assert_array_equal(np.concatenate(list(stream_audio(path)[1])), read_audio(path))
    fine = "silent.wav", "constant.flac", "constant.wav", "antiphase.wav", "short.wav", "short.flac"
    for name, (path, message) in bad_files(tmp_path).items():
        if name not in (*fine, "no_samples.wav"):
            with pytest.raises(AudioError, match=message):
                list(stream_audio(path)[1])
