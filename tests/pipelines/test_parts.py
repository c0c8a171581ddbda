"""A clip that is a part of a longer file is that stretch of it in every place that reads it."""

import h5py
import numpy as np
import pytest
import soundfile

from tf_data_pipelines.audio import AudioError, announced_seconds, decode_contents, read_audio
from tf_data_pipelines.decode import decode_audio
from tf_data_pipelines.hdf5 import RATE as HDF5_RATE
from tf_data_pipelines.parts import part_name
from tf_data_pipelines.pipeline import load_waveforms
from tf_data_pipelines.settings import FbankSettings
from tf_data_pipelines.sources import Clip, Source, scan_source

RATE = 16000
NOISE = np.random.default_rng(7).uniform(-0.5, 0.5, 3 * RATE)


def recording(path, samples=NOISE, rate=RATE):
    soundfile.write(path, samples, rate)
    return str(path)


def packed(path, **videos):
    with h5py.File(path, "w") as file:
        for name, samples in videos.items():
            file.create_dataset(name, data=samples)
    return str(path)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_a_part_is_a_slice_of_the_file(tmp_path, ending):
    path = recording(tmp_path / f"a.{ending}")
    whole = read_audio(path)
    part = read_audio(path, start=1.25, stop=1.75)
    np.testing.assert_allclose(part, whole[20000:28000], atol=1e-7)
    np.testing.assert_array_equal(decode_audio(path, start=1.25, stop=1.75), part)
    with open(path, "rb") as file:
        same = decode_contents(path, file.read(), start=1.25, stop=1.75)
    np.testing.assert_array_equal(same, part)
    assert announced_seconds(path, 1.25, 1.75) == 0.5
    assert len(read_audio(path, start=2.5)) == len(read_audio(path, start=2.5, stop=3.4)) == 8000


def test_a_part_is_resampled_and_mixed_like_a_file(tmp_path):
    stereo = np.stack([NOISE, NOISE / 2], 1)
    path = recording(tmp_path / "a.wav", stereo, 44100)
    alone = recording(tmp_path / "b.wav", soundfile.read(path)[0][11025:33075], 44100)
    part = read_audio(path, start=0.25, stop=0.75)
    assert part.shape == (8000,)
    np.testing.assert_allclose(part, read_audio(alone), atol=1e-7)


def test_nothing_before_a_part_is_decoded(tmp_path, monkeypatch):
    path, read = recording(tmp_path / "a.flac"), []
    original = soundfile.SoundFile.read

    def counted(self, frames=-1, *args, **kwargs):
        read.append(frames)
        return original(self, frames, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    read_audio(path, start=2.0, stop=2.5)
    assert read == [8000]


def test_a_recording_in_hdf5_is_read_like_a_file(tmp_path):
    samples = NOISE[: 2 * HDF5_RATE].astype("float32")
    integers = np.round(samples * 2**15).astype("int16")
    path = packed(tmp_path / "E.hdf5", P01_01=samples, P01_02=integers)
    np.testing.assert_array_equal(read_audio(f"{path}/P01_01", HDF5_RATE), samples)
    part = read_audio(f"{path}/P01_02", HDF5_RATE, start=0.5, stop=1.25)
    np.testing.assert_array_equal(part, integers[12000:30000] / np.float32(2**15))
    np.testing.assert_array_equal(decode_audio(f"{path}/P01_01"), read_audio(f"{path}/P01_01"))
    assert announced_seconds(f"{path}/P01_01") == 2


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"start": 3.0}, r"a\.wav, from 3\.00 s, lies beyond the end .* lasts 3\.00 s"),
        ({"start": 1.0, "stop": 3.6}, r"a\.wav, 1\.00 to 3\.60 s, lies beyond the end"),
        ({"start": 2.0, "stop": 1.0}, r"2\.00 to 1\.00 s, is no part: expected 0 <= start < stop"),
        ({"start": -1.0}, "is no part"),
        ({"start": 1.0, "stop": 1.01}, r"1\.00 to 1\.01 s lasts 0\.0100 s \(160 samples"),
        ({"start": 0.0, "stop": 0.5}, r"a\.wav, 0\.00 to 0\.50 s is silent"),
    ],
)
def test_an_unusable_part_is_named(tmp_path, part, message):
    samples = NOISE.copy()
    samples[:RATE] = 0
    path = recording(tmp_path / "a.wav", samples)
    with pytest.raises(AudioError, match=message):
        read_audio(path, **part)


def test_an_unusable_hdf5_file_is_named(tmp_path):
    path = packed(tmp_path / "E.hdf5", P01_01=np.zeros((2, 5)), P01_02=np.zeros(5))
    (tmp_path / "text.hdf5").write_text("<html>")
    for name, message in (
        (f"{path}/P09_09", "has no video 'P09_09'; it has 2, such as P01_01, P01_02"),
        (f"{path}/P01_01", r"P01_01 is float64 \(2, 5\); expected the samples of one channel"),
        (f"{tmp_path}/gone.hdf5/P01_01", r"gone\.hdf5 does not exist"),
        (f"{tmp_path}/text.hdf5/P01_01", r"text\.hdf5 cannot be opened as HDF5"),
    ):
        with pytest.raises(AudioError, match=message):
            read_audio(name)


def test_parts_and_files_go_through_one_pipeline(tmp_path):
    path = recording(tmp_path / "a.wav")
    video = packed(tmp_path / "E.hdf5", P01_01=NOISE[: 2 * HDF5_RATE]) + "/P01_01"
    clips = (
        Clip(path, (0,), "train"),
        Clip(path, (1,), "train", start=0.5, stop=1.0),
        Clip(video, (0,), "train"),
        Clip(video, (1,), "train", start=0.25, stop=1.0, weight=2.0),
        Clip(path, (1,), "train", start=2.9, stop=9.0),
    )
    found = scan_source(Source(clips, ("a", "b"), False), FbankSettings())
    assert found.source.clips == clips[:4] and not found.graph_only
    np.testing.assert_allclose(found.durations, [3, 0.5, 2, 0.75])
    assert found.rejected[0][0] == found.rejected[0][1].split(", lies")[0] == clips[4].name
    assert found.clip_name(1) == part_name(path, 0.5, 1.0) == f"{path}, 0.50 to 1.00 s"
    for clip, loaded in zip(clips[:4], load_waveforms(found, RATE), strict=True):
        np.testing.assert_array_equal(loaded["waveform"], clip.read())
