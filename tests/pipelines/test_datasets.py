"""Published data sets are read from the folders, lists and names that they are published with."""

import collections
import os
import pathlib
import warnings
from contextlib import nullcontext

import h5py
import numpy as np
import pytest
import soundfile
import tensorflow as tf
from published import (
    EPIC_TRAIN,
    EPIC_VALIDATION,
    MAKERS,
    MIDS,
    RATE,
    ast,
    audioset,
    epic_sounds,
    esc50,
    fill,
    lines,
    speech_commands,
    vggsound,
    voxceleb1,
    write_sounds,
)

from tf_data_pipelines.datasets import LAYOUTS, read_esc50
from tf_data_pipelines.datasets.lists import Row, draw_validation
from tf_data_pipelines.pipeline import load_waveforms
from tf_data_pipelines.prepare import prepare_data
from tf_data_pipelines.settings import LAYOUT_NAMES, DataWarning, FbankSettings
from tf_data_pipelines.sources import load_source, read_data


def table(source):
    """{name of the file: (class names, split)}."""
    return {
        os.path.basename(clip.path): (
            [source.classes[label] for label in clip.labels],
            clip.split,
        )
        for clip in source.clips
    }


def splits(source):
    return collections.Counter(clip.split for clip in source.clips)


def loaded(root, **options):
    """`load_source` that may not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        return load_source(root, **options)


@pytest.mark.parametrize("layout", MAKERS)
def test_a_published_folder_is_told_by_itself(tmp_path, layout):
    root = MAKERS[layout](tmp_path)
    source = loaded(root)
    assert source == loaded(root, layout=layout) and source.missing == ()
    assert {clip.split for clip in source.clips} >= {"train", "validation"}
    model = [*reversed(source.classes), "another"]
    turned = loaded(root, classes=model)
    for clip, other in zip(source.clips, turned.clips, strict=True):
        names = {source.classes[label] for label in clip.labels}
        assert names == {model[label] for label in other.labels} and clip.name == other.name
        assert list(other.labels) == sorted(other.labels)
    with pytest.raises(ValueError, match=r"which are not among"):
        load_source(root, classes=["another"])


@pytest.mark.parametrize("layout", [name for name in MAKERS if name != "speech-commands"])
def test_class_folders_beside_lists_are_the_users_own(tmp_path, layout):
    root = MAKERS[layout](tmp_path)
    fill(root, {"Dog/1.wav": None, "Rain/deep/2.wav": None})
    for name in ("meta", "audio", "wav", "P01", "P02", "balanced_train_segments", "eval_segments"):
        if (root / name).exists():
            (root / name).rename(root / f"_{name}")
    if (root / "unbalanced_train_segments").exists():
        (root / "unbalanced_train_segments").rename(root / "_unbalanced")
    moved = layout == "esc50"  # its list
    with nullcontext() if moved else pytest.warns(DataWarning, match="lists are not read"):
        assert load_source(root, validation=0, test=0).classes == ("Dog", "Rain")


def test_a_clip_in_two_splits_is_refused_and_a_repeat_is_not_counted(tmp_path):
    root = voxceleb1(tmp_path)
    text = (root / "iden_split.txt").read_text()
    (root / "iden_split.txt").write_text(text + text.splitlines()[0] + "\n")
    assert len(loaded(root)) == 6
    (root / "iden_split.txt").write_text(text + lines("3 id10002/1zcIwhmdeo4/00001.wav"))
    with pytest.raises(ValueError, match=r"00001\.wav for train and for test\. Remove one"):
        load_source(root)


def test_audioset_in_folders_with_short_names(tmp_path):
    root = audioset(tmp_path)
    for old, new in (("balanced_train_segments", "bal_train"), ("eval_segments", "eval")):
        (root / old).rename(root / new)
    (root / "unbalanced_train_segments").rename(root / "unbal_train")
    assert len(loaded(root)) == 22


def test_names_that_are_no_utf8_are_read(tmp_path):
    root = tmp_path / os.fsdecode(b"so\xffunds")
    for number in range(8):
        sound = np.random.default_rng(number).normal(0, 0.1, 8000)
        path = root / f"class{number % 2}" / os.fsdecode(b"x\xff%d.wav" % number)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            soundfile.write(file, sound, RATE, format="WAV")
    prepare_data(root, tmp_path / os.fsdecode(b"out\xff"))
    for data in (root, tmp_path / os.fsdecode(b"out\xff")):
        found = read_data(data, FbankSettings(), shares=(0, 0))
        assert len(found.source) == 8 and found.graph_only
        waveforms = load_waveforms(found, RATE)
        assert {int(tf.size(clip["waveform"])) for clip in waveforms} == {8000}


def test_an_unknown_layout_is_refused_with_the_names(tmp_path):
    fill(tmp_path, {"a/1.wav": None, "b/2.wav": None})
    assert load_source(tmp_path).classes == ("a", "b")
    with pytest.raises(ValueError, match=r"layout='esc'.* Choose one of 'esc50', .*'ast'"):
        load_source(tmp_path, layout="esc")
    with pytest.raises(FileNotFoundError, match=r"esc50\.csv does not exist"):
        load_source(tmp_path, layout="esc50")
    with pytest.raises(ValueError, match=r"is empty: .*speech-commands, audioset"):
        load_source(fill(tmp_path / "none", {"notes.txt": None}))
    vggsound(esc50(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"several data sets: esc50, vggsound"):
        load_source(tmp_path / "two")


def test_esc50_has_classes_by_target_and_folds_as_splits(tmp_path):
    root = esc50(tmp_path)
    source = loaded(root)
    assert source.classes == ("dog", "axe") and not source.multi_label
    assert table(source)["4-1043-A-3.wav"] == (["axe"], "validation")
    assert table(source)["5-1050-A-0.wav"] == (["dog"], "test")
    assert splits(source) == {"train": 6, "validation": 2, "test": 2}
    for layout, test, validation in (("esc50", 5, 4), ("esc50-fold3", 3, 2), ("esc50-fold1", 1, 5)):
        folds = {clip.split: set() for clip in source.clips}
        for clip in load_source(root, layout=layout).clips:
            folds[clip.split].add(int(os.path.basename(clip.path)[0]))
        assert folds["test"] == {test} and folds["validation"] == {validation}
        assert folds["train"] == {1, 2, 3, 4, 5} - {test, validation}
    other = read_esc50(root, test_fold=1, validation_fold=2)
    assert table(other)["1-1010-A-0.wav"] == (["dog"], "test")
    assert table(other)["5-1050-A-0.wav"] == (["dog"], "train")
    for folds, message in (((6, 1), "test_fold=6"), ((2, 2), "both 2; choose two different")):
        with pytest.raises(ValueError, match=message):
            read_esc50(root, *folds)


def test_speech_commands_trains_on_what_no_list_names(tmp_path):
    source = loaded(speech_commands(tmp_path))
    assert source.classes == ("bed", "yes")
    assert splits(source) == {"train": 2, "validation": 2, "test": 2}
    assert {clip.split for clip in source.clips if "a1" in clip.path} == {"train"}
    assert not any("_background_noise_" in clip.path for clip in source.clips)


def test_audioset_finds_the_three_forms_of_names(tmp_path):
    source = loaded(audioset(tmp_path))
    assert source.classes == tuple(MIDS.values()) and source.multi_label
    assert len(source) == 22 and all(clip.whole for clip in source.clips)
    assert splits(source) == {"train": 19, "validation": 2, "test": 1}
    found = table(source)
    assert found["--4gqARaEJE_0.000.flac"] == (["Speech", "Domestic animals, pets"], "test")
    assert found["-aPJHxphWEs_30000_40000.flac"] == (["Domestic animals, pets"], "train")
    assert found["Y00xxxxxxxx0.wav"][0] == ["Speech", "Gargling"]


def test_vggsound_reads_quoted_labels_and_padded_names(tmp_path):
    source = loaded(vggsound(tmp_path))
    assert source.classes == ("cat, wild", "people marching")
    assert splits(source) == {"train": 19, "validation": 2, "test": 1}
    found = table(source)
    assert found["--x_000250.wav"] == (["cat, wild"], "test")
    assert found["--0PQM4-hqg_000030.wav"] == (["cat, wild"], "train")


def test_voxceleb1_has_speakers_and_three_splits(tmp_path):
    source = loaded(voxceleb1(tmp_path))
    assert source.classes == ("id10001", "id10002")
    assert splits(source) == {"train": 2, "validation": 2, "test": 2}
    assert table(source)["00003.wav"][1] == "test"


def test_epic_sounds_are_parts_of_videos(tmp_path):
    source = loaded(epic_sounds(tmp_path))
    assert source.classes == ("water", "rustle")
    assert [(clip.start, clip.stop) for clip in source.clips] == [(0.25, 1), (1, 1.5), (0.5, 1)]
    assert [clip.split for clip in source.clips] == ["train", "train", "validation"]
    assert source.clips[0].name == f"{tmp_path / 'P01' / 'P01_01.wav'}, 0.25 to 1.00 s"


def test_epic_sounds_without_samples_are_the_same(tmp_path):
    def older(text):
        rows = (line.split(",") for line in text.replace('"tap, off"', "tap").splitlines())
        return lines(*(",".join(row[:5] + row[7:]) for row in rows))

    new = epic_sounds(tmp_path / "new")
    old = epic_sounds(tmp_path / "old", older(EPIC_TRAIN), older(EPIC_VALIDATION))
    parts = [
        [(clip.start, clip.stop, clip.labels) for clip in loaded(root).clips] for root in (new, old)
    ]
    assert parts[0] == parts[1]


def test_epic_sounds_are_read_from_hdf5(tmp_path):
    root = epic_sounds(tmp_path)
    (root / "P01" / "P01_01.wav").unlink()
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 36000).astype("float32")
    with h5py.File(root / "EPIC-KITCHENS-100_audio.hdf5", "w") as file:
        file.create_dataset("P01_01", data=noise)
    source = loaded(root)
    assert source.clips[0].path == f"{root}/EPIC-KITCHENS-100_audio.hdf5/P01_01"
    np.testing.assert_array_equal(source.clips[1].read(24000), noise[24000:])
    assert source.clips[2].path.endswith("P02_03.flac")  # a video that the file lacks


def test_ast_manifests_carry_classes_splits_and_weights(tmp_path):
    root = ast(tmp_path) / "datafiles"
    source = loaded(root)
    assert source.classes == tuple(MIDS.values()) and source.multi_label
    assert splits(source) == {"train": 19, "validation": 2, "test": 1}
    found = table(source)
    assert found["both.flac"] == (["Speech", "Domestic animals, pets"], "train")
    assert found["test.flac"] == (["Gargling"], "test")
    assert [clip.weight for clip in source.clips] == [*np.arange(21) / 8, 1.0]
    alone = loaded(root / "eval_data.json")
    assert splits(alone) == {"test": 1} and alone.classes == source.classes
    (tmp_path / "class_labels_indices.csv").unlink()
    assert loaded(root).classes == tuple(sorted(MIDS))


def test_weights_and_missing_clips_stay_in_shards(tmp_path):
    write_sounds(ast(tmp_path / "data"))
    (tmp_path / "data" / "audio" / "3.flac").unlink()
    prepare_data(tmp_path / "data" / "datafiles", tmp_path / "out")
    source = read_data(tmp_path / "out", FbankSettings()).source
    (missing,) = source.missing
    assert missing.endswith("3.flac")
    weights = {clip.id: clip.weight for clip in source.clips}
    expected = {f"../audio/{n}.flac": n / 8 for n in range(20) if n != 3}
    assert weights == {**expected, "../audio/both.flac": 2.5, "../audio/test.flac": 1.0}


def test_the_drawn_validation_depends_on_names_only():
    rows = [Row(f"{n:03}_0", "x", ("ab"[n % 2],), "train") for n in range(199)]
    drawn = {row.name for row in draw_validation(rows) if row.split == "validation"}
    assert len(drawn) == 20
    gone = [row._replace(path=None) for row in reversed(rows)]
    assert {row.name for row in draw_validation(gone) if row.split == "validation"} == drawn
    video = [*rows, *(row._replace(name=f"{row.name[:3]}_9") for row in rows)]
    together = draw_validation(video, lambda row: row.name[:3])
    assert [row.split for row in together[:199]] == [row.split for row in together[199:]]
    rare = [row._replace(labels=(row.name,)) for row in rows]
    assert all(row.split == "train" for row in draw_validation(rare))


def test_missing_clips_are_counted(tmp_path):
    root = voxceleb1(tmp_path)
    (root / "wav" / "id10001" / "1zcIwhmdeo4" / "00001.wav").unlink()
    source = loaded(root)
    assert source.missing == ("id10001/1zcIwhmdeo4/00001.wav",) and len(source) == 5
    assert source.split("test").missing == source.missing
    for path in (root / "wav").rglob("0000[12].wav"):
        path.unlink()
    with pytest.warns(DataWarning, match=r"lacks 4 of the 6 clips .*2 of 2 train.* 0 of 2 test"):
        assert len(load_source(root)) == 2
    for path in (root / "wav").rglob("*.wav"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has none of the 6 clips .*such as 'id10002"):
        load_source(root)


def test_the_layouts_that_can_be_typed_are_those_that_are_read():
    assert tuple(LAYOUTS) == LAYOUT_NAMES


def test_clips_go_from_a_published_folder_to_statistics(tmp_path):
    root, rng = epic_sounds(tmp_path), np.random.default_rng(2)
    soundfile.write(root / "P01" / "P01_01.wav", rng.normal(0, 0.1, RATE + RATE // 5), RATE)
    (root / "P02" / "P02_03.flac").unlink()
    with pytest.warns(DataWarning) as caught:
        found = read_data(root, FbankSettings(), layout="epic-sounds")
    message = str(caught[-1].message)
    assert "1 clips that the lists of the data set name are not on the disk" in message
    assert message.splitlines()[0].count("'P02_03_0'") == 1 and len(found.source) == 2
    assert found.summary()["missing"] == 1 and not found.graph_only
    np.testing.assert_allclose(found.durations, [0.75, 0.2])


@pytest.mark.parametrize(
    ("layout", "name", "old", "new", "message"),
    [
        ("esc50", "meta/esc50.csv", "target,", "t,", r"no column 'target'.* it has 'filename'"),
        ("esc50", "meta/esc50.csv", "A-0.wav,1", "A-0.wav,2", "'1-1010-A-0.wav' does not fit fold"),
        ("esc50", "meta/esc50.csv", "A-0.wav,1", "A-0.wav,9", "line 2: fold=9 must be a whole"),
        ("esc50", "meta/esc50.csv", ",0,dog", ",0,axe", "'axe' has target 3, on lines above 0"),
        ("esc50", "meta/esc50.csv", "1,0,dog", "1,zero,dog", "target is 'zero', expected a number"),
        ("esc50", "meta/esc50.csv", ",dog,True,1,A", "", "line 2 has 3 values, expected 7"),
        (
            "speech-commands",
            "testing_list.txt",
            "bed/c3",
            "dgo/c3",
            "1 clips of words",
        ),
        ("speech-commands", "testing_list.txt", "bed/c3", "bed/b2", "is in validation_list.txt al"),
        ("audioset", "class_labels_indices.csv", "/m/068hy", "/m/0", "label '/m/068hy' is not in"),
        ("audioset", "class_labels_indices.csv", "1,/m", "0,/m", "have both the number 0"),
        ("audioset", "class_labels_indices.csv", "mid,", "id,", "no column 'mid'"),
        ("audioset", "eval_segments.csv", " 0.000", " soon", "line 4: start_seconds is 'soon'"),
        ("audioset", "eval_segments.csv", ' "/m/068hy,/m/09x0r"', "", "positive_labels is empty"),
        ("audioset", "eval_segments.csv", ', "/m/068hy,/m/09x0r"', "", "line 4 has 3 values"),
        ("audioset", "eval_segments.csv", "/m/068hy,/m/09x0r", " , ", "line 4: there is no label"),
        ("vggsound", "vggsound.csv", ",test", ",tset", "line 22: the split is 'tset'"),
        ("vggsound", "vggsound.csv", '"cat, wild",test', "cat, wild,test", "line 22 has 5 values"),
        ("voxceleb1", "iden_split.txt", "1 id10002", "4 id10002", "line 1 is '4 id10002/1zc"),
        ("voxceleb1", "iden_split.txt", "1 id10002", "<html>", "line 1 is '<html>/1zc"),
        ("epic-sounds", "EPIC_Sounds_train.csv", ",class_id", ",id", "no column 'class_id'"),
        ("epic-sounds", "EPIC_Sounds_train.csv", "water,0", "water,1", "have both the number 1"),
        ("epic-sounds", "EPIC_Sounds_train.csv", "rustle,1", "rustle,2", "class_id 1, on other li"),
        ("epic-sounds", "EPIC_Sounds_train.csv", "6000,", "6k,", "start_sample is '6k'"),
        ("epic-sounds", "EPIC_Sounds_train.csv", "00:00:00.250,00:00:01.000,6000", "1,2,", "HH:MM"),
        ("epic-sounds", "EPIC-KITCHENS-100_audio.hdf5", "", "<html>", "cannot be opened as HDF5"),
        ("ast", "eval_data.json", '"wav"', '"file"', "eval_data.json clip 1 has no text 'wav'"),
        ("ast", "eval_data.json", "/t/dd00088", "/t/0", "clip 1: the label '/t/0' is not in"),
        ("ast", "eval_data.json", "]}", "", "eval_data.json is not JSON"),
        ("ast", "eval_data.json", "test.flac", "3.flac", "3.flac is in another manifest too"),
        (
            "ast",
            "bal_train_data_weight.csv",
            "0.000000000000000000e+00\n",
            "",
            "has 20 weights,.* 21",
        ),
        ("ast", "bal_train_data_weight.csv", "0.0000", "much", "is no list of weights"),
    ],
)
def test_a_damaged_list_is_one_clear_error(tmp_path, layout, name, old, new, message):
    root = MAKERS[layout](tmp_path)
    path = root / name
    text = path.read_text() if path.exists() else ""
    assert old in text
    path.write_text(text.replace(old, new, 1) if old else new)
    with pytest.raises(ValueError, match=message):
        data = path if path.suffix == ".json" and '"wav"' not in path.read_text() else root
        load_source(data, layout=layout)


def test_a_list_that_is_no_text_is_named(tmp_path):
    root = vggsound(tmp_path)
    pathlib.Path(root / "vggsound.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"vggsound\.csv is not UTF-8 text"):
        load_source(root)
    with pytest.raises(ValueError, match=r"notes\.json is not JSON"):
        load_source(fill(tmp_path, {"notes.json": "hello"}) / "notes.json")
    with pytest.raises(ValueError, match=r"notes\.json has no list of clips"):
        load_source(fill(tmp_path, {"notes.json": "[1]"}) / "notes.json")
