"""Prepared data sets: clips as 16-bit PCM in shards of TFRecords, and one JSON about them.

FOLDER/dataset.json           classes, splits, counts, hours, mean and std, lengths, checksums
FOLDER/train-00000.tfrecord   tf.train.Example of each clip: id, pcm (int16 mono), labels, seconds

`prepare.prepare_data` writes them. Clips are read by TensorFlow alone, a few shards at a time, so
no memory grows with the data set but that of lengths, labels and ids: some 50 bytes for a clip.
"""

import base64
import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import zlib
from typing import NamedTuple

import numpy as np

from tf_data_pipelines.clips import Clip, ScannedSource, Source, measured_splits
from tf_data_pipelines.listing import SPLITS, some_of
from tf_data_pipelines.settings import FbankSettings, check_flag, check_names, check_positive

VERSION = 2
INDEX = "dataset.json"
MEASURED_CLIPS = 512  # for the mean and deviation of another filterbank
FULL_SCALE = 2**15
WEIGHT = "<f8"  # dtype of the weights in the JSON
# TensorFlow's errors for a shard that is another one than was prepared.
CHANGED = ("DataLossError", "InvalidArgumentError", "FailedPreconditionError", "NotFoundError")
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
    try:
        clips = Records.of(folder, facts)
    except DAMAGES:
        raise _damaged(folder) from None
    stored = facts["classes"]
    classes = tuple(stored if classes is None else classes)
    unknown = [stored[label] for label in np.unique(clips.labels) if stored[label] not in classes]
    if unknown:
        raise ValueError(
            f"{folder} has the class(es) {some_of(unknown)}, which are not among "
            f"{', '.join(classes)}. Prepare the data without them, or train a model with them."
        )
    index = {name: label for label, name in enumerate(classes)}
    labels = np.array([index.get(name, -1) for name in stored], "int32")[clips.labels]
    clips = dataclasses.replace(clips, labels=labels)
    scanned = ScannedSource(
        Source(clips, classes, facts["multi_label"], missing=tuple(facts["missing"])),
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
    from tf_data_pipelines.fbank import log_mel_sums, mean_and_std

    clips = scanned.source.clips
    chosen = np.flatnonzero(np.isin(clips.split_names, [*measured_splits(scanned.source)]))
    chosen = chosen[:: max(1, -(-len(chosen) // MEASURED_CLIPS))]
    sums = log_mel_sums(settings)
    mean, std = mean_and_std(sums(clips[int(i)].read(settings.sample_rate)) for i in chosen)
    return dataclasses.replace(scanned, mean=mean, std=std)


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
            _check_types(facts)
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


def _check_types(facts):
    """Raise one of DAMAGES where a part of the JSON is no such thing."""
    pairs = facts["rejected"]
    texts = [*facts["missing"], *(text for pair in pairs for text in pair)]
    whole = (
        isinstance(facts["classes"], list)
        and isinstance(facts["fbank"], dict)
        and all(isinstance(text, str) for text in texts)
        and all(len(pair) == 2 for pair in pairs)
        and len({shard["name"] for shard in facts["shards"]}) == len(facts["shards"]) > 0
    )
    for shard in facts["shards"]:
        whole = whole and isinstance(shard["bytes"], int) and shard["split"] in SPLITS
        whole = whole and re.fullmatch(r"[\w-]{1,64}\.tfrecord", shard["name"]) is not None
    if not whole:
        raise ValueError("a part is of another type")


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
    """Turn TensorFlow's error for a changed shard of prepared data into one that names it.

    Args:
        data: ScannedSource, WaveformSource, or whatever else is read in the body.
    """
    try:
        yield
    except Exception as error:
        clips = getattr(getattr(data, "source", None), "clips", None)
        if type(error).__name__ in CHANGED and isinstance(clips, Records):
            verify(clips.folder)
        raise


def ids_to_text(ids):
    """Ids as text for JSON: UTF-8 between zeros, which no file name has; zlib, then base64."""
    data = "\0".join(ids).encode(errors="surrogateescape")
    return base64.b64encode(zlib.compress(data, 9)).decode()


@functools.lru_cache(8)
def ids_from_text(text):
    """What `ids_to_text` was given, a list; those of the last few shards stay in memory."""
    data = zlib.decompress(base64.b64decode(text))
    return data.decode(errors="surrogateescape").split("\0")


def to_text(numbers, dtype="<i4"):
    """Numbers as text for JSON: zlib, then base64."""
    data = np.ascontiguousarray(numbers, dtype).tobytes()
    return base64.b64encode(zlib.compress(data, 9)).decode()


def from_text(text, dtype="<i4"):
    """What `to_text` was given, an array (numbers,)."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype)


@dataclasses.dataclass(frozen=True)
class RecordClip(Clip):
    """A clip in a shard.

    Args:
        path: path of the shard.
        record: place in the shard.
        id: what the clip was called when it was prepared: its path below the data, and its part.
        sample_rate: sample rate of the samples in Hz.
    """

    record: int = 0
    id: str = ""
    sample_rate: int = 16000

    @property
    def name(self):
        return f"{self.id} ({self.path}, record {self.record})"

    def read(self, sample_rate=16000, **_):
        """float32 (samples,) at the sample rate of the preparation, full scale at 1."""
        import tensorflow as tf

        if sample_rate != self.sample_rate:
            raise ValueError(
                f"{self.path} is prepared at {self.sample_rate} Hz, not {sample_rate}."
            )
        records = tf.data.TFRecordDataset(os.fsencode(self.path)).skip(self.record).take(1)
        try:
            waveform, id = decode_record(records.get_single_element())
        except tf.errors.OpError:
            waveform, id = None, b""
        if waveform is None or id.numpy() != os.fsencode(self.id):
            raise ValueError(
                f"{self.path} was changed: record {self.record} is damaged. Copy the shard again, "
                f"or prepare the data again."
            )
        return waveform.numpy()

    def announced_seconds(self):
        return len(self.read(self.sample_rate)) / self.sample_rate


class Shard(NamedTuple):
    """A file of a prepared data set; `clips` and `bytes` are how many it has."""

    name: str
    split: str
    clips: int
    bytes: int


class _ShardClips(NamedTuple):
    """What the JSON says of the clips of a shard."""

    samples: np.ndarray
    label_counts: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, shard):
        found = cls(
            *(from_text(shard[name]) for name in ("samples", "label_counts", "labels")),
            from_text(shard["weights"], WEIGHT),
        )
        clips = len(found.samples)
        fits = clips == len(found.label_counts) == len(found.weights) == shard["clips"] > 0
        fits = fits and len(ids_from_text(shard["ids"])) == clips
        if not fits or found.label_counts.sum() != len(found.labels):
            raise ValueError("the numbers are not those of the clips")
        if min(found.samples.min(), found.label_counts.min()) < 1 or found.weights.min() < 0:
            raise ValueError("a clip has no samples or no label")
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Records(collections.abc.Sequence):
    """The clips of a prepared data set, or some of them; a RecordClip is made when asked for.

    Args:
        folder: folder of the shards.
        shards: tuple of all Shards.
        ids: tuple of the ids in each shard, as `ids_to_text` gives them.
        shard: int32 (clips,), the shard of each clip, ascending.
        record: int32 (clips,), its place in the shard, ascending in each.
        samples: int32 (clips,).
        labels: int32 (labels,), those of all clips, one clip after the other.
        ends: int64 (clips,), where in `labels` each clip ends.
        weights: float64 (clips,), see Clip.
        sample_rate: sample rate of the samples in Hz.
    """

    folder: pathlib.Path
    shards: tuple[Shard, ...]
    ids: tuple[str, ...]
    shard: np.ndarray
    record: np.ndarray
    samples: np.ndarray
    labels: np.ndarray
    ends: np.ndarray
    weights: np.ndarray
    sample_rate: int

    @classmethod
    def of(cls, folder, facts):
        """The clips that the JSON describes, with labels that index its classes."""
        shards = facts["shards"]
        parts = [_ShardClips.of(shard) for shard in shards]
        sizes = [len(part.samples) for part in parts]
        samples, counts, labels, weights = map(np.concatenate, zip(*parts, strict=True))
        several = counts.max() > 1 and not facts["multi_label"]
        if labels.min() < 0 or labels.max() >= len(facts["classes"]) or several:
            raise ValueError("the labels are not those of the data set")
        return cls(
            folder=folder,
            shards=tuple(
                Shard(shard["name"], shard["split"], size, shard["bytes"])
                for shard, size in zip(shards, sizes, strict=True)
            ),
            ids=tuple(shard["ids"] for shard in shards),
            shard=np.repeat(np.arange(len(shards), dtype="int32"), sizes),
            record=np.concatenate([np.arange(size, dtype="int32") for size in sizes]),
            samples=samples,
            labels=labels,
            ends=np.cumsum(counts, dtype="int64"),
            weights=weights,
            sample_rate=facts["sample_rate"],
        )

    def __len__(self):
        return len(self.shard)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        index = range(len(self))[index]  # negative ones too; IndexError past the end
        shard = self.shards[self.shard[index]]
        return RecordClip(
            str(self.folder / shard.name),
            self.labels_of(index),
            shard.split,
            weight=float(self.weights[index]),
            record=int(self.record[index]),
            id=ids_from_text(self.ids[self.shard[index]])[self.record[index]],
            sample_rate=self.sample_rate,
        )

    def keys(self):
        """A number that tells each clip's id from others, int64 (clips,), see `record_key`."""
        import tensorflow as tf

        keys = np.zeros(len(self), "int64")
        for shard in np.unique(self.shard):
            ids = [os.fsencode(id) for id in ids_from_text(self.ids[shard])]
            of_shard = self.shard == shard
            keys[of_shard] = record_key(tf.constant(ids)).numpy()[self.record[of_shard]]
        return keys

    def labels_of(self, index):
        """Labels of a clip, a tuple of ints, ascending."""
        start = self.ends[index - 1] if index else 0
        return tuple(sorted(map(int, self.labels[start : self.ends[index]])))

    @property
    def split_names(self):
        """Split of every clip, str (clips,)."""
        return np.array([shard.split for shard in self.shards])[self.shard]

    def label_counts(self):
        """{(label, split): number of clips}, as of Source."""
        names, of_shard = np.unique([one.split for one in self.shards], return_inverse=True)
        shard = np.repeat(self.shard, np.diff(self.ends, prepend=0))
        counts = np.bincount(self.labels * len(names) + of_shard[shard])
        pairs = (divmod(int(place), len(names)) for place in np.flatnonzero(counts))
        counts = counts[counts > 0].tolist()
        return {
            (label, str(names[split])): count
            for (label, split), count in zip(pairs, counts, strict=True)
        }

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
            weights=self.weights[kept],
        )


def decode_record(record):
    """Waveform float32 (samples,) and id, string (), of the bytes of a record, in a graph."""
    import tensorflow as tf

    text = tf.io.FixedLenFeature([], tf.string)
    found = tf.io.parse_single_example(record, {"pcm": text, "id": text})
    return tf.cast(tf.io.decode_raw(found["pcm"], tf.int16), tf.float32) / FULL_SCALE, found["id"]


def record_key(ids):
    """Numbers that tell ids apart, int64, from a string tensor, in a graph."""
    import tensorflow as tf

    return tf.strings.to_hash_bucket_fast(ids, 2**63 - 1)
