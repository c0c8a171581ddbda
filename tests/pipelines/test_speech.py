"""Generated speech: sane audio, repeatable corpora, voices held out."""

import collections
import hashlib
import json
import sys

import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader")

from tf_data_pipelines import speech

SIZES = {"clips": 130, "test_clips": 40, "validation_clips": 30}
COUNTS = {"train": 130, "test": 40, "validation": 30}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return speech.make_corpus(tmp_path_factory.mktemp("speech") / "digits", **SIZES, seed=3)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(soundfile.read(path)[0].tobytes()).hexdigest()
        for path in files(folder)
        if path.suffix != ".json"
    }


def variants(folder, split):
    return {path.stem.partition("+")[2].rpartition("_")[0] for path in files(folder / split)}


def test_speak_is_finite_and_sane():
    waveform, sample_rate = speech.speak("seven")
    assert sample_rate == 22050 and waveform.dtype == np.float32 and waveform.ndim == 1
    assert np.isfinite(waveform).all() and 0.05 < np.abs(waveform).max() <= 1
    assert 0.25 < len(waveform) / sample_rate < 1.0


def test_ends_are_trimmed_to_the_margin():
    waveform, sample_rate = speech.speak("nine")
    loud = np.flatnonzero(np.abs(waveform) > np.abs(waveform).max() * 10 ** (speech.TRIM_DB / 20))
    margin = round(speech.MARGIN_SECONDS * sample_rate)
    assert loud[0] <= margin and len(waveform) - 1 - loud[-1] <= margin


def test_faster_is_shorter():
    lengths = [len(speech.speak("seven", rate=rate)[0]) for rate in (110, 175, 300)]
    assert lengths[0] > lengths[1] > lengths[2]


def test_higher_pitch_moves_the_fundamental():
    def period(pitch):
        waveform, _ = speech.speak("nine", pitch=pitch, pitch_range=0)
        middle = waveform[len(waveform) // 2 :][:2048]
        return 50 + np.correlate(middle, middle, "full")[2047 + 50 : 2047 + 400].argmax()

    assert period(80) < period(20)


@pytest.mark.parametrize("voice", ["martian", "en-us+nosuch", "en-us+", "martian+f3"])
def test_unknown_voice_is_named(voice):
    with pytest.raises(ValueError, match=voice.replace("+", r"\+")):
        speech.speak("one", voice=voice)


@pytest.mark.parametrize(
    "arguments", [{"rate": 20}, {"pitch": 100}, {"pitch_range": -1}, {"text": ""}]
)
def test_wrong_arguments_are_named(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        speech.speak(**{"text": "one", **arguments})


def test_every_accent_speaks_differently():
    names = speech.voices()
    assert len(set(names)) == len(names) > 400
    said = {speech.speak("four", voice=accent)[0].tobytes() for accent in speech.ACCENTS}
    assert len(said) == len(speech.ACCENTS)


def test_same_seed_gives_the_same_samples(corpus, tmp_path):
    again = speech.make_corpus(tmp_path / "a" / "again", **SIZES, seed=3)
    assert digests(again) == digests(corpus)
    other = speech.make_corpus(tmp_path / "other", **SIZES, seed=4)
    assert digests(other) != digests(corpus)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="rand() is not found there")
@pytest.mark.parametrize("voice", ["en-us+f3", "en-us+Reed", "en-gb+caleb"])
def test_engines_of_a_seed_say_the_same(voice):
    numbers = {"rate": 170, "pitch": 50, "pitch_range": 50}
    one, two = speech.Engine(5), speech.Engine(5)
    for _ in range(2):
        first, second = (engine.speak("happy", voice, **numbers) for engine in (one, two))
        np.testing.assert_array_equal(first, second)


def test_variants_are_held_out(corpus):
    recorded = json.loads((corpus / "corpus.json").read_text())["variants"]
    heard = {split: variants(corpus, split) for split in COUNTS}
    for split, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert heard[split] and not heard[split] & heard[other]
        assert not set(recorded[split]) & set(recorded[other])
    everything = {voice.partition("+")[2] for voice in speech.voices()}
    assert set().union(*recorded.values()) == everything
    assert 0.55 * len(everything) < len(recorded["train"]) < 0.75 * len(everything)


def test_words_are_balanced_for_every_voice(corpus):
    for split, count in COUNTS.items():
        said = collections.Counter(path.parent.name for path in files(corpus / split))
        assert said == dict.fromkeys(speech.DIGITS, count // 10)
        spoken = collections.defaultdict(list)
        for path in files(corpus / split):
            spoken[path.stem.rpartition("_")[0]].append(path.parent.name)
        assert all(sorted(words) == sorted(speech.DIGITS) for words in spoken.values())


def test_files_decode_and_are_not_all_wav(corpus):
    suffixes = collections.Counter()
    for split in COUNTS:
        for path in files(corpus / split):
            waveform, sample_rate = soundfile.read(path, dtype="float32")
            assert sample_rate == 22050 and waveform.ndim == 1 and np.isfinite(waveform).all()
            assert 0.3 <= len(waveform) / sample_rate < 1.5
            assert 0.2 < np.abs(waveform).max() <= 1.1  # -12 dB is 0.25
            suffixes[path.suffix] += 1
    assert len(suffixes) >= 3 and suffixes[".wav"] > 0.8 * sum(suffixes.values())


def test_second_call_returns_at_once(corpus, monkeypatch):
    monkeypatch.setattr(speech, "Engine", None)
    assert speech.make_corpus(corpus, **SIZES, seed=3) == corpus


def test_foreign_folder_is_left_alone(corpus, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="another folder"):
        speech.make_corpus(tmp_path, **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(FileExistsError, match="these arguments"):
        speech.make_corpus(corpus, **SIZES, seed=5)


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "_encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        speech.make_corpus(tmp_path / "digits", **SIZES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [(), ("a", "a"), ("a/b",), ("..",), ("",)])
def test_wrong_words(words, tmp_path):
    with pytest.raises(ValueError, match="words"):
        speech.make_corpus(tmp_path / "digits", words=words)
