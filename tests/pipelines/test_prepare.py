"""Shards: the clips of the files, whoever is killed; trainings that begin anywhere."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import tensorflow as tf

from tf_data_pipelines import prepare
from tf_data_pipelines.audio import read_audio
from tf_data_pipelines.blocks import stored_clips, training_blocks
from tf_data_pipelines.pipeline import evaluation_batches, training_batches
from tf_data_pipelines.prepare import prepare_data
from tf_data_pipelines.settings import (
    AugmentSettings,
    DataWarning,
    FbankSettings,
    PackSettings,
    PatchSettings,
)
from tf_data_pipelines.shards import (
    INDEX,
    damage_named,
    to_text,
    verify,
)
from tf_data_pipelines.sources import WaveformSource, read_data

FBANK = FbankSettings(mel_bins=64)
PATCHES = PatchSettings((8, 16, (16, 24)), frame_shifts_ms=(10.0, 20.0), grid=(4, 64))
PACKING = PackSettings(rows=2, row_length=1600, segments=6)
CLIPS = 30


def write_sounds(folder, clips=CLIPS):
    """Noise of 0.2 to 2 s, 16-bit WAV at 16 kHz, in three classes."""
    rng = np.random.default_rng(0)
    for number in range(clips):
        path = folder / f"class{number % 3}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, rng.integers(3200, 32000)), 16000)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_sounds(tmp_path_factory.mktemp("data") / "sounds")


@pytest.fixture(scope="module")
def prepared(sounds):
    prepare_data(sounds, sounds.parent / "shards", clips_per_shard=4)
    return sounds.parent / "shards"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_batches(first, second):
    for one, other in zip(first, second, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def test_a_prepared_clip_is_that_of_its_file(sounds, prepared):
    files, stored = read_data(sounds, FBANK), read_data(prepared, FBANK)
    assert stored.source.classes == files.source.classes and stored.graph_only
    assert len(stored.source) == CLIPS
    by_length = {len(clip.read()): clip for clip in files.source.clips}
    records = stored_clips(stored.source.clips).as_numpy_iterator()
    for clip, seconds, record in zip(stored.source.clips, stored.durations, records, strict=True):
        samples = clip.read()
        origin = by_length[len(samples)]
        np.testing.assert_array_equal(samples, read_audio(origin.path))
        assert (clip.labels, clip.split) == (origin.labels, origin.split)
        assert seconds == len(samples) / 16000
        features = tf.io.parse_single_example(
            record["record"],
            {
                "id": tf.io.FixedLenFeature([], tf.string),
                "labels": tf.io.FixedLenFeature([1], tf.int64),
                "seconds": tf.io.FixedLenFeature([], tf.float32),
            },
        )
        assert features["id"].numpy().decode() == os.path.relpath(origin.path, sounds)
        assert tuple(features["labels"].numpy()) == clip.labels
        assert features["seconds"].numpy() == np.float32(seconds)
    verify(prepared)


def test_facts_are_those_of_the_files(sounds, prepared):
    files, stored = read_data(sounds, FbankSettings()), read_data(prepared, FbankSettings())
    for name, value in files.summary().items():
        if name in ("mean", "std", "hours"):
            assert stored.summary()[name] == pytest.approx(value, abs=1e-4), name
        else:
            assert stored.summary()[name] == value, name
    other = read_data(prepared, FBANK)  # is measured when it is read
    assert other.mean == pytest.approx(read_data(sounds, FBANK).mean, abs=1e-4)


@pytest.mark.parametrize("split", [None, "train"])
def test_evaluation_has_every_clip_once(sounds, prepared, split):
    def found(data):
        data = read_data(data, FBANK, split=split)
        fixed = dataclasses.replace(PATCHES, patch_sizes=(16,), frame_shifts_ms=())
        clips = {}
        for inputs, labels, weights, ids in evaluation_batches(
            data, FBANK, patches=fixed, packing=PACKING
        ).as_numpy_iterator():
            for row, slot in np.argwhere(weights > 0):
                tokens = inputs["tokens"][row][inputs["segment_ids"][row] == slot + 1]
                clips[round(data.durations[ids[row, slot]] * 16000)] = tokens, labels[row, slot]
        return clips

    expected, clips = found(sounds), found(prepared)
    assert expected.keys() == clips.keys()
    for key, (tokens, label) in expected.items():
        np.testing.assert_allclose(clips[key][0], tokens, rtol=0, atol=1e-5)
        assert clips[key][1] == label


def test_several_labels_and_the_classes_of_a_model(tmp_path, sounds):
    names = sorted(path.relative_to(sounds.parent) for path in sounds.rglob("*.wav"))
    labels = ["a;b", "b", "a;c"]
    rows = [f"{name},{labels[i % 3]},train\n" for i, name in enumerate(names)]
    (sounds.parent / "many.csv").write_text("path,labels,split\n" + "".join(rows))
    prepare_data(sounds.parent / "many.csv", tmp_path / "out", clips_per_shard=7)
    data = read_data(tmp_path / "out", FBANK, classes=("z", "c", "b", "a"))
    patches = dataclasses.replace(PATCHES, frame_shifts_ms=())
    batches = training_batches(data, FBANK, patches=patches, packing=PACKING)
    rows = {
        tuple(row)
        for _, labels, weights in batches.take(9).as_numpy_iterator()
        for row in labels[weights > 0]
    }
    assert rows == {(0, 0, 1, 1), (0, 0, 1, 0), (0, 1, 0, 1)}
    with pytest.raises(ValueError, match="has the class\\(es\\) 'b', which are not among a, c"):
        read_data(tmp_path / "out", FBANK, classes=("a", "c"))


def test_blocks_have_every_clip_once_an_epoch_from_any_place(prepared, monkeypatch):
    monkeypatch.setattr("tf_data_pipelines.blocks.BLOCK_BYTES", 300_000)  # a few shards
    clips = read_data(prepared, FBANK, split="train").source.clips
    count = len(clips)
    order = list(training_blocks(clips, 5).take(3 * count).as_numpy_iterator())
    epochs = [[clip["clip_id"] for clip in order[e * count : (e + 1) * count]] for e in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    stored = {clip["clip_id"]: clip["record"] for clip in stored_clips(clips).as_numpy_iterator()}
    assert all(clip["record"] == stored[clip["clip_id"]] for clip in order)
    assert [clip["place"] for clip in order] == list(range(3 * count))
    for start in (1, 7, count, 2 * count - 1):
        later = training_blocks(clips, 5, start).take(9).as_numpy_iterator()
        assert list(later) == order[start : start + 9]


AUGMENT = AugmentSettings(
    fill_ms=500, noise_snr_db=(20, 30), freq_mask=8, crop_ms=900, mixup=0.5, token_dropout=0.3,
    balanced=True,
)  # fmt: skip
DRAWS = {"patch_weights": (1, 2, 1), "clips_per_draw": 3, "pool_frames": (1, 2)}


@pytest.mark.parametrize(
    ("kind", "augment", "packing"),
    [
        ("memory", AUGMENT, PackSettings(2, 256, 6, overlong="crop")),
        ("files", None, PACKING),
        ("shards", AUGMENT, PACKING),
    ],
    ids=["memory", "files", "shards"],
)
def test_a_training_that_begins_later_sees_what_an_unbroken_one_sees(
    sounds, prepared, kind, augment, packing
):
    if kind == "memory":
        rng = np.random.default_rng(0)
        sizes = rng.integers(3000, 30000, 9)
        data = WaveformSource([rng.normal(0, 0.1, size).astype("float32") for size in sizes])
    else:
        data = read_data(sounds if kind == "files" else prepared, FBANK, split="train")

    patches = dataclasses.replace(PATCHES, **(DRAWS if augment else {}))

    def batches(start):
        return training_batches(
            data, FBANK, patches=patches, packing=packing, augment=augment, start=start
        ).as_numpy_iterator()

    unbroken = batches(0)
    expected = [next(unbroken) for _ in range(12)]
    for start in (1, 9) if kind == "memory" else (9,):
        later = batches(start)
        same_batches([next(later), next(later)], expected[start : start + 2])


KILLED = """
import sys
from tf_data_pipelines.prepare import prepare_data
prepare_data(sys.argv[1], sys.argv[2], clips_per_shard=2)
"""


def test_after_a_kill_it_goes_on_to_the_same_bytes(tmp_path, sounds):
    prepare_data(sounds, tmp_path / "whole", clips_per_shard=2)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", KILLED, sounds, out])
    while process.poll() is None and not list(partial.glob("*.tfrecord")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists() and not out.exists()
    with pytest.raises(FileExistsError, match="was begun with other data or options"):
        prepare_data(sounds, out, clips_per_shard=3)
    prepare_data(sounds, out, clips_per_shard=2)
    assert content(out) == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def no_room(*_):
    raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")


def test_a_full_disk_leaves_what_is_done(tmp_path, sounds, monkeypatch):
    prepare_data(sounds, tmp_path / "whole", clips_per_shard=4)
    written, replace = [], os.replace

    def full(source, target):
        if str(target).endswith(".tfrecord"):
            if len(written) == 3:
                raise OSError(28, "No space left on device", str(target))
            written.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        prepare_data(sounds, tmp_path / "out", clips_per_shard=4)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(tf.io.TFRecordWriter, "write", no_room)
        with pytest.raises(OSError, match=r"out\.partial cannot be written: there is no room"):
            prepare_data(sounds, tmp_path / "out", clips_per_shard=4)
    assert len(list((tmp_path / "out.partial").glob("*.tfrecord"))) == 3
    prepare_data(sounds, tmp_path / "out", clips_per_shard=4)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_preparations_of_one_folder(tmp_path, sounds):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with open(partial / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process prepares"):
            prepare_data(sounds, tmp_path / "out")
    (partial / "lock").unlink()
    for name in ("notes.txt", "plan.json", "dataset.json", "lock"):
        (partial / name).write_text("[7]")
        (partial / "thesis.json").write_text("mine")
        with pytest.raises(FileExistsError, match="is in the way"):
            prepare_data(sounds, tmp_path / "out")
        assert set(os.listdir(partial)) == {name, "thesis.json"}
        assert (partial / name).read_text() == "[7]"
        (partial / name).unlink()
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError, match="there exists already"):
        prepare_data(sounds, tmp_path / "there")
    (tmp_path / "there").unlink()
    with pytest.raises(ValueError, match="lies in the data"):
        prepare_data(sounds, sounds / "shards")
    with pytest.raises(ValueError, match="sample_rate=10 must be"):
        prepare_data(sounds, tmp_path / "new", sample_rate=10)
    assert os.listdir(tmp_path) == ["out.partial"]


def test_clips_that_cannot_be_used_are_listed(tmp_path):
    folder = write_sounds(tmp_path / "sounds", 12)
    (folder / "class0" / "0.wav").write_bytes(b"no sound")
    facts = prepare_data(folder, tmp_path / "out")
    ((name, reason),) = facts["rejected"]
    assert name.endswith("0.wav") and "cannot be decoded" in reason
    assert len(read_data(tmp_path / "out", FBANK).source) == 11
    for path in folder.rglob("*.wav"):
        path.write_bytes(b"no sound")
    with pytest.raises(ValueError, match="12 of 12 clips cannot be used"):
        prepare_data(folder, tmp_path / "none")
    write_sounds(folder, 12)
    facts = prepare_data(folder, tmp_path / "none")  # files that were mended are read again
    assert facts["rejected"] == [] and len(read_data(tmp_path / "none", FBANK).source) == 12
    for path in (folder / "class1").iterdir():
        path.write_bytes(b"no sound")
    with pytest.raises(ValueError, match=r"no training clip of 'class1' can be used"):
        prepare_data(folder, tmp_path / "lost")


def test_a_data_set_for_the_test_alone(tmp_path):
    write_sounds(tmp_path / "sounds" / "test", 6)
    write_sounds(tmp_path / "sounds" / "validation", 6)
    prepare_data(tmp_path / "sounds", tmp_path / "out")
    stored, files = (read_data(tmp_path / name, FbankSettings()) for name in ("out", "sounds"))
    assert (stored.mean, stored.std) == pytest.approx((files.mean, files.std), abs=1e-3)


def test_ids_are_paths_below_the_data_also_through_a_link(tmp_path, sounds, monkeypatch):
    (tmp_path / "link").symlink_to(sounds, target_is_directory=True)
    monkeypatch.chdir(sounds.parent)
    for data, out in ((sounds, "a"), (tmp_path / "link", "b"), (sounds.name, "c")):
        prepare_data(data, tmp_path / out)
    assert content(tmp_path / "a") == content(tmp_path / "b") == content(tmp_path / "c")
    names = {clip.name.partition(" (")[0] for clip in read_data(tmp_path / "a", FBANK).source.clips}
    assert names == {f"{path.parent.name}/{path.name}" for path in sounds.rglob("*.wav")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts.update(version=9), "has version 9; this program reads 2"),
        (lambda facts: facts["shards"][0].update(bytes=7), r"has .* bytes; expected 7 bytes"),
        (lambda facts: facts["shards"][0].update(name="n.tfrecord"), "n.tfrecord is missing"),
        (lambda facts: facts["shards"][0].update(name="../x"), "is damaged"),
        (lambda facts: facts["shards"][0].update(bytes="7"), "is damaged"),
        (lambda facts: facts["shards"][0].update(split="x"), "is damaged"),
        (lambda facts: facts["shards"][0].update(labels=to_text([-1] * 24)), "is damaged"),
        (lambda facts: facts["shards"][0].update(samples=to_text([0] * 24)), "is damaged"),
        (lambda facts: facts.update(rejected=[["a", 5]]), "is damaged"),
        (lambda facts: facts.update(classes="abcdefg"), "is damaged"),
        (lambda facts: facts.clear(), "is damaged"),
        (lambda facts: facts.pop("shards"), "is damaged"),
        (lambda facts: facts.update(mean="x"), "is damaged"),
        (lambda facts: facts["shards"][0].update(samples="x"), "is damaged"),
        (lambda facts: facts["classes"].pop(), "is damaged"),
    ],
)
def test_damaged_folders_are_named(tmp_path, sounds, change, message):
    prepare_data(sounds, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / INDEX).read_text())
    change(facts)
    (tmp_path / "out" / INDEX).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / "out", FBANK)


def test_a_changed_shard_is_noticed(tmp_path, sounds):
    prepare_data(sounds, tmp_path / "out")
    path = tmp_path / "out" / "train-00000.tfrecord"
    contents = bytearray(path.read_bytes())
    contents[5000] ^= 1
    path.write_bytes(contents)
    changed = pytest.raises(ValueError, match=r"train-00000\.tfrecord was changed")
    with changed:
        verify(tmp_path / "out")
    with changed:
        read_data(tmp_path / "out", FBANK)  # which reads it, to measure it
    data = read_data(tmp_path / "out", FbankSettings(), split="train")
    with changed, damage_named(data):
        list(stored_clips(data.source.clips))
    with pytest.raises(ValueError, match="prepared at 16000 Hz, and 8000 Hz are needed"):
        read_data(tmp_path / "out", FbankSettings(sample_rate=8000))


def test_a_shard_in_the_place_of_another_is_noticed(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(16):
        path = tmp_path / "sounds" / "train" / f"class{number % 2}" / f"{number:02}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, 4000), 16000)
    prepare_data(tmp_path / "sounds", tmp_path / "out", clips_per_shard=4)
    paths = [tmp_path / "out" / f"train-0000{number}.tfrecord" for number in range(2)]
    assert len({path.stat().st_size for path in paths}) == 1
    contents = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(contents), strict=True):
        path.write_bytes(other)
    data = read_data(tmp_path / "out", FbankSettings())
    settings = {"patches": PatchSettings((16,)), "packing": PACKING}
    changed = r"train-0000[01]\.tfrecord was changed"
    with pytest.raises(ValueError, match=changed):
        data.source.clips[0].read()
    with pytest.raises(ValueError, match=changed), damage_named(data):
        list(evaluation_batches(data, FbankSettings(), **settings))
    with pytest.raises(ValueError, match=changed), damage_named(data):
        next(iter(training_batches(data, FbankSettings(), **settings)))


def test_a_rate_and_a_loud_clip(tmp_path):
    folder = write_sounds(tmp_path / "sounds", 6)
    loud = np.random.default_rng(0).normal(0, 2, 9000)
    soundfile.write(folder / "class0" / "loud.wav", loud, 16000, subtype="FLOAT")
    facts = prepare_data(folder, tmp_path / "out", sample_rate=8000)
    assert facts["clipped"] == 1
    files = read_data(folder, FbankSettings(sample_rate=8000))
    data = read_data(tmp_path / "out", FbankSettings(sample_rate=8000))
    lengths = [sorted(len(clip.read(8000)) for clip in one.source.clips) for one in (files, data)]
    assert lengths[0] == lengths[1]
    hours = sum(split["hours"] for split in facts["splits"].values())
    assert hours == pytest.approx(sum(lengths[0]) / 8000 / 3600)
    with pytest.raises(ValueError, match="is prepared already"):
        prepare_data(tmp_path / "out", tmp_path / "again")


def test_clips_that_are_refused_are_left_out(prepared):
    data = read_data(prepared, FBANK)
    with pytest.warns(DataWarning, match=rf"of {CLIPS} clips are left out:.*\n"):
        found = read_data(prepared, FBANK, refuse=lambda name, s: name if s > 1 else None)
    assert 0 < len(found.source) < CLIPS and found.durations.max() <= 1
    kept = [clip for clip, s in zip(data.source.clips, data.durations, strict=True) if s <= 1]
    assert list(found.source.clips) == kept
    with pytest.raises(ValueError, match="no clip can be used"):
        read_data(prepared, FBANK, refuse=lambda name, s: "no")


def test_files_that_changed_meanwhile_are_read_again(tmp_path, sounds):
    folder = write_sounds(tmp_path / "sounds", 12)
    process = subprocess.Popen([sys.executable, "-c", KILLED, folder, tmp_path / "out"])
    while process.poll() is None and not list((tmp_path / "out.partial").glob("*.tfrecord")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in folder.rglob("*.wav"):
        waveform, rate = soundfile.read(path)
        soundfile.write(path, -waveform, rate)
    (tmp_path / "out.partial" / "train-00000.json").write_text("{")  # as a bad disk leaves it
    prepare_data(folder, tmp_path / "out", clips_per_shard=2)
    prepare_data(folder, tmp_path / "whole", clips_per_shard=2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_long_clips_make_shards_of_fewer(tmp_path, sounds, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 150_000)
    facts = prepare_data(sounds, tmp_path / "out")
    assert 2 < max(shard["clips"] for shard in facts["shards"]) < 8
    assert len(facts["shards"]) > 3 and all(s["bytes"] < 400_000 for s in facts["shards"])


def test_it_goes_on_after_a_kill_in_its_last_moment(tmp_path, sounds):
    prepare_data(sounds, tmp_path / "whole")
    (tmp_path / "whole").rename(tmp_path / "out.partial")  # all but the last step
    with pytest.raises(FileExistsError, match="begun with other data or options"):
        prepare_data(sounds, tmp_path / "out", sample_rate=8000)
    prepare_data(sounds, tmp_path / "out")
    prepare_data(sounds, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
