"""Prepared data sets: clips as 16-bit PCM in shards of TFRecords, and one JSON about them.

FOLDER/dataset.json           classes, splits, counts, hours, mean and std, lengths, checksums
FOLDER/train-00000.tfrecord   tf.train.Example of each clip: id, pcm (int16 mono), labels, seconds

`prepare.prepare_data` writes them. Clips are read by TensorFlow alone, a few shards at a time, so
no memory grows with the data set but that of lengths and labels: a few bytes for a clip.
"""

import base64
import collections.abc
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from typing import NamedTuple

import numpy as np

from tf_data_pipelines.clips import Clip, ScannedSource, Source
from tf_data_pipelines.listing import some_of
from tf_data_pipelines.settings import FbankSettings, check_flag, check_names, check_positive

VERSION = 1
INDEX = "dataset.json"
BLOCK_BYTES = 64 << 20  # of the shards whose clips are shuffled together
MEASURED_CLIPS = 512  # for the mean and deviation of another filterbank
FULL_SCALE = 2**15
DAMAGES = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, zlib.error)


def is_prepared(folder):
    """Whether a folder holds a prepared data set."""
    return os.path.isfile(os.path.join(folder, INDEX))


def read_prepared(folder, settings, classes=None):
    """The clips of a prepared data set; only its JSON is read, and the sizes of its shards.

    Args:
        folder: folder that `prepare_data` wrote.
        settings: FbankSettings. Where they are not those of the preparation, the mean and
            deviation are measured on MEASURED_CLIPS of the clips.
        classes: class names in the order of a trained model; None for those of the data.

    Returns:
        ScannedSource; its clips are Records.

    Raises:
        ValueError: the JSON is damaged or of another version, a shard is missing or has another
            size, the sample rate is not that of `settings`, or `classes` lacks a class.
    """
    folder = pathlib.Path(folder)
    facts = _checked(folder)
    if settings.sample_rate != facts["sample_rate"]:
        raise ValueError(
            f"{folder} is prepared at {facts['sample_rate']} Hz, and {settings.sample_rate} Hz are "
            f"needed. Prepare it again with sample_rate={settings.sample_rate} (--sample-rate)."
        )
    present = tuple(facts["classes"])
    classes = present if classes is None else tuple(classes)
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise ValueError(
            f"{folder} has the class(es) {some_of(unknown)}, which are not among "
            f"{', '.join(classes)}. Prepare the data without them, or train a model with them."
        )
    try:
        clips = Records.of(folder, facts, [classes.index(name) for name in present])
    except DAMAGES:
        raise _damaged(folder) from None
    scanned = ScannedSource(
        Source(clips, classes, facts["multi_label"]),
        clips.samples / facts["sample_rate"],
        rejected=tuple((name, reason) for name, reason in facts["rejected"]),
        mean=facts["mean"],
        std=facts["std"],
        graph_only=True,
    )
    return scanned if facts["fbank"] == front_end(settings) else _measured(scanned, settings)


def front_end(settings):
    """The FbankSettings on which the mean and deviation depend, a dictionary."""
    return {k: v for k, v in settings.to_dict().items() if k not in ("mean", "std")}


def _measured(scanned, settings):
    """The same clips with the mean and deviation of another filterbank."""
    from tf_data_pipelines.fbank import log_mel

    clips = scanned.source.clips
    of_training = np.flatnonzero(clips.split_names == "train")
    chosen = of_training if len(of_training) else np.arange(len(clips))
    chosen = chosen[:: max(1, -(-len(chosen) // MEASURED_CLIPS))]
    values = np.concatenate(
        [np.ravel(log_mel(clips[int(i)].read(settings.sample_rate), settings)) for i in chosen]
    ).astype("float64")
    return dataclasses.replace(scanned, mean=float(values.mean()), std=float(values.std()))


def _checked(folder):
    """The JSON of a prepared folder, after its shards were found to be there."""
    path = folder / INDEX
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["version"]
        if version == VERSION:
            check_positive("sample_rate", facts["sample_rate"], int)
            check_names(path, facts["classes"])
            check_flag("multi_label", facts["multi_label"])
            FbankSettings(mean=facts["mean"], std=facts["std"])
            sizes = {shard["name"]: shard["bytes"] for shard in facts["shards"]}
            facts["fbank"].items(), dict(facts["rejected"]), "".join(sizes)  # of these types
    except DAMAGES:
        raise _damaged(folder) from None
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version}; this program reads {VERSION}. Prepare the data again."
        )
    for name, expected in sizes.items():
        place = folder / name
        size = place.stat().st_size if place.exists() else None
        if size != expected:
            raise ValueError(
                f"{place} {'is missing' if size is None else f'has {size:,} bytes'}; expected "
                f"{expected:,} bytes. Copy it again, or prepare the data again."
            )
    return facts


def _damaged(folder):
    return ValueError(f"{folder / INDEX} is damaged. Copy it again, or prepare the data again.")


def verify(folder, progress=False):
    """Read every shard of a prepared folder and compare its checksum.

    Raises:
        ValueError: a shard was changed; the message names it.
    """
    import rich.progress

    folder, facts = pathlib.Path(folder), _checked(pathlib.Path(folder))
    shards = facts["shards"]
    for shard in rich.progress.track(shards, "Verifying") if progress else shards:
        if checksum(folder / shard["name"]) != shard["sha256"]:
            raise ValueError(
                f"{folder / shard['name']} was changed: its checksum is not that of {INDEX}. Copy "
                f"it again, or prepare the data again."
            )


def checksum(path):
    """SHA-256 of a file as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def damage_named(data):
    """Turn TensorFlow's error for a damaged record of prepared data into one that names the shard.

    Args:
        data: ScannedSource, WaveformSource, or whatever else is read in the body.
    """
    try:
        yield
    except Exception as error:
        clips = getattr(getattr(data, "source", None), "clips", None)
        if type(error).__name__ == "DataLossError" and isinstance(clips, Records):
            verify(clips.folder)
        raise


def to_text(numbers):
    """int32 numbers as text for JSON: zlib, then base64."""
    data = np.ascontiguousarray(numbers, "<i4").tobytes()
    return base64.b64encode(zlib.compress(data, 9)).decode()


def from_text(text):
    """What `to_text` was given, int32 (numbers,)."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i4")


@dataclasses.dataclass(frozen=True)
class RecordClip(Clip):
    """A clip in a shard; `path` is that of the shard, `record` its place in it."""

    record: int = 0
    sample_rate: int = 16000

    @property
    def name(self):
        return f"{self.path}, record {self.record}"

    def read(self, sample_rate=16000, **_):
        """float32 (samples,) at the sample rate of the preparation, full scale at 1."""
        import tensorflow as tf

        if sample_rate != self.sample_rate:
            raise ValueError(
                f"{self.path} is prepared at {self.sample_rate} Hz, not {sample_rate}."
            )
        records = tf.data.TFRecordDataset(self.path).skip(self.record).take(1)
        try:
            return decode_record(records.get_single_element()).numpy()
        except tf.errors.DataLossError:
            raise ValueError(
                f"{self.path} was changed: record {self.record} is damaged. Copy the shard again, "
                f"or prepare the data again."
            ) from None

    def announced_seconds(self):
        return len(self.read(self.sample_rate)) / self.sample_rate


@dataclasses.dataclass(frozen=True, eq=False)
class Records(collections.abc.Sequence):
    """The clips of a prepared data set, or some of them; a RecordClip is made when asked for.

    Args:
        folder: folder of the shards.
        shards: tuple of (name, split, number of clips) of all shards.
        shard: int32 (clips,), the shard of each clip, ascending.
        record: int32 (clips,), its place in the shard, ascending in each.
        samples: int32 (clips,).
        labels: int32 (labels,), those of all clips, one clip after the other.
        ends: int64 (clips,), where in `labels` each clip ends.
        sample_rate: sample rate of the samples in Hz.
    """

    folder: pathlib.Path
    shards: tuple[tuple[str, str, int], ...]
    shard: np.ndarray
    record: np.ndarray
    samples: np.ndarray
    labels: np.ndarray
    ends: np.ndarray
    sample_rate: int

    @classmethod
    def of(cls, folder, facts, classes):
        """The clips that the JSON describes; classes[i] is the label of its class i."""
        shards = facts["shards"]
        samples = [from_text(shard["samples"]) for shard in shards]
        sizes = [len(part) for part in samples]
        counts = np.concatenate([from_text(shard["label_counts"]) for shard in shards])
        labels = np.concatenate([from_text(shard["labels"]) for shard in shards])
        if len(counts) != sum(sizes) or counts.sum() != len(labels) or counts.min() < 1:
            raise ValueError("the labels are not those of the clips")
        return cls(
            folder=folder,
            shards=tuple(
                (shard["name"], shard["split"], size)
                for shard, size in zip(shards, sizes, strict=True)
            ),
            shard=np.repeat(np.arange(len(shards), dtype="int32"), sizes),
            record=np.concatenate([np.arange(size, dtype="int32") for size in sizes]),
            samples=np.concatenate(samples),
            labels=np.asarray(classes, "int32")[labels],
            ends=np.cumsum(counts, dtype="int64"),
            sample_rate=facts["sample_rate"],
        )

    def __len__(self):
        return len(self.shard)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        index = range(len(self))[index]  # negative ones too; IndexError past the end
        name, split, _ = self.shards[self.shard[index]]
        return RecordClip(
            str(self.folder / name),
            self.labels_of(index),
            split,
            record=int(self.record[index]),
            sample_rate=self.sample_rate,
        )

    def labels_of(self, index):
        """Labels of a clip, a tuple of ints, ascending."""
        start = self.ends[index - 1] if index else 0
        return tuple(sorted(map(int, self.labels[start : self.ends[index]])))

    @property
    def split_names(self):
        """Split of every clip, str (clips,)."""
        return np.array([split for _, split, _ in self.shards])[self.shard]

    def select(self, places):
        """The clips at these places, ascending, as Records."""
        counts = np.diff(self.ends, prepend=0)
        kept = np.zeros(len(self), bool)
        kept[places] = True
        return dataclasses.replace(
            self,
            shard=self.shard[kept],
            record=self.record[kept],
            samples=self.samples[kept],
            labels=self.labels[np.repeat(kept, counts)],
            ends=np.cumsum(counts[kept]),
        )


def decode_record(record):
    """float32 (samples,) of the bytes of a record, in a graph."""
    import tensorflow as tf

    pcm = tf.io.parse_single_example(record, {"pcm": tf.io.FixedLenFeature([], tf.string)})["pcm"]
    return tf.cast(tf.io.decode_raw(pcm, tf.int16), tf.float32) / FULL_SCALE


def stored_clips(clips):
    """Every clip once, in their order, as a pure TensorFlow graph.

    Args:
        clips: Records.

    Returns:
        Dataset of dictionaries: `record` string (), `clip_id` int64 (), the place in `clips`.
    """
    import tensorflow as tf

    layout = _Layout.of(clips)

    def shard(path, first, count):
        numbers = tf.data.Dataset.range(first, first + count)
        return tf.data.Dataset.zip((numbers, tf.data.TFRecordDataset(path)))

    shards = tf.data.Dataset.from_tensor_slices((layout.paths, layout.firsts, layout.counts))
    ids = tf.constant(layout.ids)
    return (
        shards.flat_map(shard)
        .map(lambda number, record: {"record": record, "clip_id": tf.gather(ids, number)})
        .filter(lambda clip: clip["clip_id"] >= 0)
    )


def training_blocks(clips, seed, start=0, read=True):
    """`draws.training_order` of clips in shards: blocks of a few random shards, each shuffled.

    Args:
        clips: Records.
        seed: random seed of the orders.
        start: number of clips to leave out at the beginning; it may be epochs.
        read: whether to read the shards.

    Returns:
        Dataset of dictionaries as of `training_order`, with `record` string () where it reads.
    """
    import tensorflow as tf

    from tf_data_pipelines.draws import ORDER, fold, shuffled

    layout, total = _Layout.of(clips), len(clips)
    shards = len(layout.counts)
    bytes_of_a_shard = 2 * int(clips.samples.sum(dtype="int64")) / shards
    size = max(1, min(shards, int(BLOCK_BYTES / max(1, bytes_of_a_shard))))  # shards of a block
    blocks = -(-shards // size)

    def block(number):
        epoch, place = number // blocks, size * (number % blocks)
        order = shuffled(shards, fold([seed, ORDER], epoch))
        before = tf.reduce_sum(tf.gather(layout.kept, order[:place]))
        chosen = order[place : place + size]
        firsts, counts = tf.gather(layout.firsts, chosen), tf.gather(layout.counts, chosen)
        ids = tf.gather(layout.ids, tf.ragged.range(firsts, firsts + counts).values)
        kept = tf.reshape(tf.where(ids >= 0), [-1])
        kept = tf.gather(kept, shuffled(tf.size(kept), fold(fold([seed, ORDER], epoch), number)))
        places = epoch * total + before + tf.range(tf.size(kept, tf.int64))
        found = {"place": places, "epoch": 0 * places + epoch, "clip_id": tf.gather(ids, kept)}
        if read:
            records = tf.data.TFRecordDataset(tf.gather(layout.paths, chosen))
            records = records.batch(tf.reduce_sum(counts)).get_single_element()
            found["record"] = tf.gather(records, kept)
        return found

    epoch, inside = divmod(start, total)
    order = shuffled(shards, fold([seed, ORDER], epoch)).numpy()
    ends = np.cumsum(layout.kept[order])[size - 1 :: size]
    first = epoch * blocks + int(np.searchsorted(ends, inside, "right"))
    found = tf.data.Dataset.range(first, tf.int64.max).map(block).prefetch(1).unbatch()
    return found.filter(lambda clip: clip["place"] >= start) if inside else found


class _Layout(NamedTuple):
    """The shards that some clips lie in.

    Args:
        paths: str (shards,).
        firsts: int64 (shards,), number of records in the shards before.
        counts: int64 (shards,), number of records.
        kept: int64 (shards,), number of records that are of the clips.
        ids: int64 (records,), place of each record in the clips; -1 if it is none of them.
    """

    paths: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray
    kept: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, clips):
        used, place, kept = np.unique(clips.shard, return_inverse=True, return_counts=True)
        counts = np.array([clips.shards[shard][2] for shard in used], "int64")
        firsts = np.cumsum(counts) - counts
        ids = np.full(counts.sum(), -1, "int64")
        ids[firsts[place] + clips.record] = np.arange(len(clips))
        paths = np.array([str(clips.folder / clips.shards[shard][0]) for shard in used])
        return cls(paths, firsts, counts, kept=kept.astype("int64"), ids=ids)
