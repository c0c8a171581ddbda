"""Folders and manifests to labeled, split clips; the scan; one message for each mistake."""

import collections
import dataclasses
import os

import numpy as np
import pytest
import soundfile

from tf_data_pipelines.clips import check_trained
from tf_data_pipelines.fbank import log_mel
from tf_data_pipelines.listing import sound_files
from tf_data_pipelines.settings import FbankSettings
from tf_data_pipelines.sources import (
    Clip,
    Source,
    WaveformSource,
    load_source,
    scan_source,
)

RATE = 16000


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def folder_of(root, **counts):
    """One folder per class with that many files; `load_source` never opens them."""
    for name, count in counts.items():
        touch(*(root / name / f"{i}.wav" for i in range(count)))
    return root


def manifest_of(root, text, files=("a.wav", "b.wav", "c.wav"), name="clips.csv"):
    touch(*(root / file for file in files))
    (root / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return root / name


def table(source):
    """{(class, split): clips}."""
    return collections.Counter(
        (source.classes[label], clip.split) for clip in source.clips for label in clip.labels
    )


def test_folder_of_classes(tmp_path):
    folder_of(tmp_path, dog=11, cat=3, axolotl=1)
    touch(tmp_path / "_background_noise_" / "x.wav", tmp_path / ".git" / "x.wav")
    touch(tmp_path / "cat" / ".hidden.wav", tmp_path / "cat" / "notes.txt", tmp_path / "README")
    touch(tmp_path / "cat" / "speaker" / "deep.FLAC")
    source = load_source(str(tmp_path))
    assert source.classes == ("axolotl", "cat", "dog") and not source.multi_label
    assert len(source) == 16 and len({clip.path for clip in source.clips}) == 16
    for clip in source.clips:
        assert source.classes[clip.labels[0]] in clip.path


def test_drawn_splits_keep_every_class(tmp_path):
    counts = {"a": 1, "b": 2, "c": 3, "d": 10, "e": 101}
    source = load_source(folder_of(tmp_path, **counts), validation=0.2, test=0.1)
    found = table(source)
    assert [found[n, "train"] for n in counts] == [1, 2, 1, 7, 71]
    assert [found[n, "validation"] for n in counts] == [0, 0, 1, 2, 20]
    assert [found[n, "test"] for n in counts] == [0, 0, 1, 1, 10]
    assert {c.split for c in load_source(tmp_path, validation=0, test=0).clips} == {"train"}
    large = table(load_source(tmp_path, validation=0.5, test=0.49))
    assert all(large[name, "train"] >= 1 for name in counts)


def test_draw_depends_on_seed_and_names_only(tmp_path):
    first = load_source(folder_of(tmp_path / "one", a=20, b=20))
    moved = tmp_path / "two"
    for i in reversed(range(20)):  # another place, files created in another order
        touch(moved / "b" / f"{i}.wav", moved / "a" / f"{i}.wav")
    splits = [clip.split for clip in first.clips]
    assert splits == [clip.split for clip in load_source(moved).clips]
    assert splits != [clip.split for clip in load_source(moved, seed=2).clips]
    folder_of(moved, c=20)  # a new class leaves the others where they are
    assert splits == [clip.split for clip in load_source(moved).clips[:40]]


def test_split_folders(tmp_path):
    folder_of(tmp_path / "train", dog=3, cat=2)
    folder_of(tmp_path / "Val", dog=1)
    folder_of(tmp_path / "test", dog=1, cat=1)
    source = load_source(tmp_path)
    assert table(source) == {
        ("dog", "train"): 3,
        ("cat", "train"): 2,
        ("dog", "validation"): 1,
        ("dog", "test"): 1,
        ("cat", "test"): 1,
    }
    part = source.split("test")
    assert len(part) == 2 and part.classes == source.classes
    with pytest.raises(ValueError, match=r"'dev' has no clips; present are .*'train' \(5 clips\)"):
        source.split("dev")


def test_sound_files_of_folders(tmp_path):
    folder_of(tmp_path / "data", b=2, a=1)
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "empty").mkdir()
    alone = tmp_path / "x.txt"
    found = sound_files([alone, str(tmp_path / "data"), tmp_path / "data" / "empty"])
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["x.txt", "data/a/0.wav", "data/b/0.wav", "data/b/1.wav", "data/empty"]


def test_a_class_may_be_called_test(tmp_path):
    assert load_source(folder_of(tmp_path, test=2, music=2)).classes == ("music", "test")


def test_classes_of_a_model_fix_the_order(tmp_path):
    folder_of(tmp_path, dog=2)
    source = load_source(tmp_path, classes=["wolf", "dog", "cat"])
    assert source.classes == ("wolf", "dog", "cat")
    assert {clip.labels for clip in source.clips} == {(1,)}
    with pytest.raises(ValueError, match=r"'dog', which are not among wolf, cat"):
        load_source(tmp_path, classes=["wolf", "cat"])


def test_manifest(tmp_path):
    text = "\ufefffilename,fold,Category,split\r\n\r\na.wav,1,dog,train\r\n"
    text += 'sub/b.wav,2,cat,dev\r\n,,,\r\n"c, d.wav",3,dog,TEST\r\n'
    path = manifest_of(tmp_path, text, ["a.wav", "sub/b.wav", "c, d.wav"])
    assert load_source(path) == Source(
        (
            Clip(str(tmp_path / "a.wav"), (1,), "train"),
            Clip(str(tmp_path / "sub/b.wav"), (0,), "validation"),
            Clip(str(tmp_path / "c, d.wav"), (1,), "test"),
        ),
        ("cat", "dog"),
        False,
    )


def test_manifest_without_splits_is_drawn(tmp_path):
    names = [f"{i}.wav" for i in range(20)]
    rows = "".join(f"{name},{'ab'[i % 2]},\n" for i, name in enumerate(names))
    source = load_source(manifest_of(tmp_path, "path,label,split\n" + rows, names))
    found = table(source)
    assert [found["a", s] for s in ("train", "validation", "test")] == [8, 1, 1]


def test_multi_label_manifest(tmp_path):
    path = manifest_of(tmp_path, "wav,label\na.wav,rain; wind\nb.wav,rain\nc.wav,wind;rain;rain\n")
    source = load_source(path)
    assert source.multi_label and source.classes == ("rain", "wind")
    assert [clip.labels for clip in source.clips] == [(0, 1), (0,), (0, 1)]
    assert all(table(source)[name, "train"] for name in source.classes)
    single = manifest_of(tmp_path, "path,labels\na.wav,rain\nb.wav,wind\n", name="one.csv")
    assert load_source(single).multi_label


def test_targets_are_indices_or_indicators():
    clips = [Clip(f"{labels}", labels, "train") for labels in ((2,), (0,), (1,))]
    single = Source(tuple(clips), ("a", "b", "c"), False).targets()
    assert single.dtype == np.int32 and single.tolist() == [2, 0, 1]
    clips += [Clip("two", (0, 2), "train"), Clip("none", (), "train")]
    several = Source(tuple(clips), ("a", "b", "c"), True).targets()
    assert several.dtype == np.float32
    assert several.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_multi_label_draw_trains_every_class(tmp_path):
    rng = np.random.default_rng(3)
    names = [f"{i}.wav" for i in range(97)]
    labels = [";".join(rng.choice(list("abcdefg"), rng.integers(1, 4), False)) for _ in names]
    rows = "".join(f"{n},{label}\n" for n, label in zip(names, labels, strict=True))
    found = table(load_source(manifest_of(tmp_path, "path,label\n" + rows, names)))
    for name in "abcdefg":
        assert found[name, "train"] > found[name, "validation"] > 0 < found[name, "test"]


def test_folder_mistakes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* does not exist.*one folder per class"):
        load_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is empty: no class folders.*data/dog"):
        load_source(tmp_path / "empty")
    touch(tmp_path / "flat" / "a.wav", tmp_path / "flat" / "b.wav")
    with pytest.raises(ValueError, match=r"2 sound file\(s\) directly in it, such as 'a\.wav'"):
        load_source(tmp_path / "flat")
    folder_of(tmp_path / "hole", dog=1)
    touch(tmp_path / "hole" / "cat" / "a.m4a")
    with pytest.raises(ValueError, match=r"class folder .*cat has no sound file .*remove"):
        load_source(tmp_path / "hole")
    with pytest.raises(ValueError, match=r"has one class, 'dog'.* at least 2"):
        load_source(folder_of(tmp_path / "single", dog=2))
    folder_of(tmp_path / "mixed" / "train", dog=1, cat=1)
    with pytest.raises(ValueError, match=r"split folders \('train'\) beside 'extra'"):
        load_source(folder_of(tmp_path / "mixed", extra=1))
    touch(tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"list\.txt' is neither a folder nor a \.csv"):
        load_source(tmp_path / "list.txt")
    for name in ("two\nlines", os.fsdecode(b"caf\xe9")):
        with pytest.raises(ValueError, match=r"has the class name .*; expected one line of UTF-8"):
            load_source(folder_of(tmp_path / name, **{name: 1, "other": 1}))
    with pytest.raises(ValueError, match=r"validation=0\.5 and test=0\.5 .*below 1"):
        load_source(tmp_path / "single", validation=0.5, test=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("name,label\na.wav,x\n", r"no column 'path' \(or filename.*it has 'name', 'label'"),
        ("path;label\na.wav;x\n", "no column 'path'.*it has 'path;label'.*commas"),
        ("path,target\na.wav,1\n", r"no column 'label' \(or labels, category.*'target'"),
        ("path,label\n\n", "has no rows"),
        ("path,label\na.wav,x\n\nb.wav,\n", "line 4: label is empty"),
        ("path,label\na.wav,x\nb.wav\n", "line 3: label is empty"),
        ("path,labels\na.wav,; ;\n", "line 2: labels is empty"),
        ("path,label\n,x\n", "line 2: path is empty"),
        ("path,label,split\na.wav,x,train\nb.wav,y,fold1\n", "line 3: split 'fold1' is unknown"),
        ("path,label,split\na.wav,x,train\nb.wav,y,\n", "line 3: split '' is unknown"),
        ("path,label\na.wav,x\n./a.wav,y\n", r"line 3: .*a\.wav is on line 2 already.*';'"),
        ("path,label\na.wav,x\nb.wav,x\n", "has one class, 'x'"),
        ("path,label\na.wav,caf\xe9\n".encode("latin-1"), "is not UTF-8 text"),
        ("path,label\na.wav,x\nb.wav,y,loud\n", "line 3 has 3 values for 2 columns.*';'"),
        ("path,label,label\na.wav,x,y\n", "has two columns 'label'"),
        ('path,label\na.wav,x\nb.wav,"y\nc.wav,z\n', "line 3 is not CSV: a quote is not closed"),
        ('path,label\na.wav,"x\nb.wav,y"\nc.wav,z\n', "line 2: label has more than one line"),
        ('path,label\na.wav,"x\nb.wav,"y\n', "line 2 is not CSV: .* close each quote"),
        ("path,labels\na.wav,x;y\u2028z\n", "class name 'y.u2028z'; expected one line"),
    ],
)
def test_manifest_mistakes(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_source(manifest_of(tmp_path, text))


def test_manifest_names_missing_files(tmp_path):
    rows = "".join(f"gone{i}.wav,x\n" for i in range(7))
    path = manifest_of(tmp_path, "path,label\na.wav,y\n" + rows)
    with pytest.raises(FileNotFoundError, match=r"7 file\(s\).*line 3: .*gone0.* and 2 more"):
        load_source(path)


def sounds(root, seconds, bad=()):
    """Classes a and b in turn, all for training, noise; `bad` positions are text."""
    rng = np.random.default_rng(11)
    clips = []
    for i, length in enumerate(seconds):
        path = root / f"{i}.wav"
        if i in bad:
            path.write_bytes(b"not a sound")
        else:
            soundfile.write(path, rng.normal(0, 0.1 / (i + 1), round(RATE * length)), RATE)
        clips.append(Clip(str(path), (i % 2,), "train"))
    return Source(tuple(clips), ("a", "b"), False)


def test_scan_measures_every_value(tmp_path):
    from tf_data_pipelines.audio import read_audio

    source = sounds(tmp_path, [0.3, 0.1, 0.7])
    settings = FbankSettings(mel_bins=37)
    found = scan_source(source, settings, progress=True)
    values = [log_mel(read_audio(clip.path), settings).numpy().ravel() for clip in source.clips]
    values = np.concatenate(values).astype("float64")
    assert found.source == source and found.rejected == () and found.warning() is None
    np.testing.assert_allclose(found.durations, [0.3, 0.1, 0.7])
    np.testing.assert_allclose([found.mean, found.std], [values.mean(), values.std()], rtol=1e-5)


def test_scan_measures_training_clips_only(tmp_path):
    source = sounds(tmp_path, [0.3, 0.1, 0.7])
    clips = list(source.clips)
    clips[2] = dataclasses.replace(clips[2], split="test")
    mixed = scan_source(dataclasses.replace(source, clips=tuple(clips)), FbankSettings())
    alone = scan_source(dataclasses.replace(source, clips=tuple(clips[:2])), FbankSettings())
    assert (mixed.mean, mixed.std) == (alone.mean, alone.std)
    assert len(mixed.durations) == 3


def test_scan_drops_and_names_bad_clips(tmp_path):
    source = sounds(tmp_path, [0.1] * 20, bad=range(3, 10))
    found = scan_source(source, FbankSettings())
    assert found.source.clips == source.clips[:3] + source.clips[10:]
    assert found.source.classes == source.classes and len(found.durations) == 13
    assert [path for path, _ in found.rejected] == [c.path for c in source.clips[3:10]]
    warning = found.warning()
    assert warning.startswith("7 of 20 clips are left out") and warning.endswith("and 2 more.")
    assert "3.wav cannot be decoded" in warning and "8.wav" not in warning


def test_scan_refuses_too_little(tmp_path):
    settings = FbankSettings()
    with pytest.raises(ValueError, match=r"3 of 3 clips cannot be used:\n.*0\.wav"):
        scan_source(sounds(tmp_path, [0.1] * 3, bad=range(3)), settings)
    source = sounds(tmp_path, [0.1] * 5, bad=(0, 1, 2))
    with pytest.raises(ValueError, match=r"3 of 5 clips .*more than max_rejected=0\.5"):
        scan_source(source, settings)
    assert len(scan_source(source, settings, max_rejected=0.6).source) == 2
    with pytest.raises(ValueError, match=r"no training clip of 'b' can be used.*\n.*1\.wav"):
        scan_source(sounds(tmp_path, [0.1] * 5, bad=(1, 3)), settings)


def test_a_class_without_clips_of_a_split_is_named(tmp_path):
    source = sounds(tmp_path, [0.1] * 6, bad=(3,))  # a, b, a, b, a, b
    splits = ("train", "train", "test", "test", "train", "train")
    clips = zip(source.clips, splits, strict=True)
    source = dataclasses.replace(
        source, clips=tuple(dataclasses.replace(clip, split=split) for clip, split in clips)
    )
    found = scan_source(source, FbankSettings())
    assert found.emptied == (("b", "test"),)
    assert "no clip is left of 'b (test)'. Replace these files" in found.warning()
    assert scan_source(found.source, FbankSettings()).emptied == ()


def test_a_class_without_training_clips_is_refused():
    clips = [Clip("0", (0,), "train"), Clip("1", (1,), "train"), Clip("2", (2,), "test")]
    source = Source(tuple(clips), ("a", "b", "c", "never"), False)
    with pytest.raises(ValueError, match="no training clip of 'c', only clips for validation or"):
        check_trained(source)
    check_trained(dataclasses.replace(source, clips=tuple(clips[:2])))


def test_waveforms_in_memory_have_durations_and_names():
    source = WaveformSource([np.zeros(400), np.ones(8000, "float32")], sample_rate=8000)
    np.testing.assert_allclose(source.durations, [0.05, 1.0])
    assert source.clip_name(1) == "waveforms[1]"
    assert [waveform.dtype for waveform in source.waveforms] == [np.float32, np.float32]


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        ([], "waveforms is empty; give at least one"),
        ([np.zeros(5), np.zeros((2, 5))], r"waveforms\[1\] has .* shape \(2, 5\); .*one channel"),
        ([np.zeros(5, "int16")], r"waveforms\[0\] has dtype int16"),
        ([np.array([0.5, np.nan])], "expected finite floats"),
        ([np.array([0.5, 1e20])], r"waveforms\[0\] has samples beyond 16"),
    ],
)
def test_refuses_what_is_no_waveform(waveforms, message):
    with pytest.raises(ValueError, match=message):
        WaveformSource(waveforms)
