"""The generated sets of the experiments: published layouts, repeated exactly, nothing shared."""

import csv
import hashlib
import importlib.util
import pathlib

import pytest
import soundfile

pytest.importorskip("espeakng_loader")

from tf_data_pipelines import FbankSettings, load_source, read_data

PLACE = pathlib.Path(__file__).parents[1] / "examples" / "experiments" / "speech_sets.py"
COUNTS = {"train": 2, "validation": 1, "test": 1}  # clips of each class


def load():
    spec = importlib.util.spec_from_file_location("speech_sets", PLACE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


speech_sets = load()
speech_sets.BABBLE_SENTENCES = 8  # the sets are tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return {name: speech_sets.make_set(name, folder, **COUNTS, seed=3) for name in speech_sets.SETS}


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def rows_of(folder):
    with open(folder / speech_sets.LIST, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_split(rows, value):
    return [{value(row) for row in rows if row["split"] == split} for split in speech_sets.SPLITS]


def disjoint(sets):
    return all(sets) and sum(map(len, sets)) == len(set().union(*sets))


@pytest.mark.parametrize("name", ["words", "speakers"])
def test_a_set_is_read_in_its_layout(made, name):
    source = load_source(made[name])
    speakers = [f"id{10001 + index}" for index in range(speech_sets.SPEAKERS)]
    assert list(source.classes) == {"words": sorted(speech_sets.WORDS), "speakers": speakers}[name]
    for split, count in COUNTS.items():
        labels = [clip.labels for clip in source.clips if clip.split == split]
        assert sorted(labels) == [(c,) for c in range(len(source.classes)) for _ in range(count)]
    assert len(read_data(made[name], FbankSettings(), split="test").source.clips) == 24


@pytest.mark.parametrize("name", ["words", "speakers"])
def test_clips_are_short_files_of_16_khz(made, name):
    low, high = {"words": (0.5, 1.6), "speakers": (0.8, 20)}[name]
    for row in rows_of(made[name]):
        info = soundfile.info(made[name] / row["path"])
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert low <= info.duration <= high


@pytest.mark.parametrize("name", ["words", "speakers"])
def test_a_seed_repeats_every_byte(made, name, tmp_path):
    first = digests(made[name])
    assert digests(speech_sets.make_set(name, tmp_path / "same", **COUNTS, seed=3)) == first
    other = digests(
        speech_sets.make_set(name, tmp_path / "other", train=1, validation=0, test=0, seed=4)
    )
    sounds = {value for path, value in first.items() if path.endswith(".wav")}
    assert not sounds & set(other.values())


def test_a_complete_set_is_left_alone_and_another_is_refused(made, monkeypatch):
    monkeypatch.setattr(speech_sets, "Engine", None)
    assert speech_sets.make_words(made["words"], **COUNTS, seed=3) == made["words"]
    with pytest.raises(FileExistsError, match="not the set of these arguments"):
        speech_sets.make_words(made["words"], **COUNTS, seed=4)


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(speech_sets, "_mix", None)
    with pytest.raises(TypeError):
        speech_sets.make_set("words", tmp_path, **COUNTS)
    assert not list(tmp_path.iterdir())


def test_words_share_no_voice_between_splits(made):
    rows = rows_of(made["words"])
    assert disjoint(by_split(rows, lambda row: row["voice"].partition("+")[2]))
    assert disjoint(by_split(rows, lambda row: row["path"].partition("/")[2][:8]))


def test_speakers_share_no_sentence_between_splits(made):
    rows = rows_of(made["speakers"])
    starts = tuple(f" {place} " for place in speech_sets.PLACES)

    def core(sentence):
        return min((sentence.partition(start)[0] for start in starts), key=len)

    said = [
        {
            core(s.strip(". "))
            for row in rows
            if row["split"] == split
            for s in row["text"].split(".")
        }
        - {""}
        for split in speech_sets.SPLITS
    ]
    assert disjoint(said)
    assert len({row["voice"] for row in rows}) == speech_sets.SPEAKERS
