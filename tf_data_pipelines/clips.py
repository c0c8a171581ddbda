"""One sound and many: where it lies, what is heard in it, and what it is used for."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from tf_data_pipelines.audio import MIN_SAMPLES, announced_seconds, read_audio
from tf_data_pipelines.listing import NAMED, some_of
from tf_data_pipelines.parts import is_whole, part_name


@dataclasses.dataclass(frozen=True)
class Clip:
    """One sound: a sound file, or a part of a longer one.

    Args:
        path: file name, or HDF5 file and recording, see `read_audio`.
        labels: indices into the classes of the source, ascending; one index unless the
            source is multi-label.
        split: "train", "validation" or "test".
        start: second of the file at which the clip begins.
        stop: second of the file at which it ends; None for the end of the file.
        weight: how often the clip is wanted against others, as AST's manifests say it, see
            `sampling_weights`.
    """

    path: str
    labels: tuple[int, ...]
    split: str
    _: dataclasses.KW_ONLY
    start: float = 0.0
    stop: float | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Name in messages: the path, and the part if the clip is one."""
        return part_name(self.path, self.start, self.stop)

    @property
    def whole(self) -> bool:
        """Whether the clip is all of a sound file."""
        return is_whole(self.path, self.start, self.stop)

    def read(self, sample_rate: int = 16000, *, min_samples: int = MIN_SAMPLES) -> np.ndarray:
        """`read_audio` of the clip: float32 (samples,); AudioError if it cannot be used."""
        return read_audio(
            self.path, sample_rate, min_samples=min_samples, start=self.start, stop=self.stop
        )

    def announced_seconds(self) -> float:
        """`announced_seconds` of the clip: what the file says; nothing is decoded."""
        return announced_seconds(self.path, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Source:
    """Clips and the classes that their labels index.

    Args:
        clips: tuple of Clip, in the order of the sorted folder or of the manifest; or Records, see
            shards.py.
        classes: tuple of class names; the position of a name is its label.
        multi_label: whether a clip may have several labels.
        missing: names of the clips of all splits that the lists of a published data set name
            and the disk lacks.
    """

    clips: Sequence[Clip]
    classes: tuple[str, ...]
    multi_label: bool
    missing: tuple[str, ...] = ()

    def __len__(self):
        return len(self.clips)

    def targets(self) -> np.ndarray:
        """Labels as training needs them.

        Returns:
            int32 (clips,), the class index of each clip; for a multi-label source float32
            (clips, classes), 1 for each of its classes.
        """
        if not self.multi_label:
            return np.array([clip.labels[0] for clip in self.clips], "int32")
        targets = np.zeros((len(self), len(self.classes)), "float32")
        for row, clip in zip(targets, self.clips, strict=True):
            row[list(clip.labels)] = 1
        return targets

    def label_counts(self) -> dict[tuple[int, str], int]:
        """{(label, split): number of clips}, without those that have none."""
        counts = getattr(self.clips, "label_counts", None)  # of Records
        if counts:
            return counts()
        return collections.Counter((label, c.split) for c in self.clips for label in c.labels)

    @property
    def split_names(self) -> np.ndarray:
        """Split of every clip, str (clips,)."""
        names = getattr(self.clips, "split_names", None)  # of Records
        return np.array([clip.split for clip in self.clips]) if names is None else names

    def split(self, name: str) -> Self:
        """The source with the clips of one split only.

        Raises:
            ValueError: the split has no clips; the message lists the splits present.
        """
        keep = self.split_names == name
        if not keep.any():
            present = collections.Counter(self.split_names.tolist())
            listed = ", ".join(f"{split!r} ({count} clips)" for split, count in present.items())
            raise ValueError(
                f"split {name!r} has no clips; present are {listed or 'none'}. Give clips that "
                f"split in the manifest or a folder {name}/, let splits be drawn from more clips "
                f"or larger shares (--validation, --test), or choose another split (--split)."
            )
        return self.select(keep)

    def select(self, keep: np.ndarray) -> Self:
        """The source with some of its clips, those where `keep`, bool (clips,), is True."""
        select = getattr(self.clips, "select", None)  # of Records
        clips = select(keep) if select else tuple(itertools.compress(self.clips, keep))
        return dataclasses.replace(self, clips=clips)


@dataclasses.dataclass(frozen=True)
class ScannedSource:
    """The usable clips of a source, and what `scan_source` measured in them.

    Args:
        source: Source with the usable clips, in their order, and with all classes.
        durations: float64 (clips,), length of each clip in seconds.
        rejected: tuple of (name, reason) for each unusable clip.
        emptied: tuple of (class name, split) for each class that lost all its clips of a split.
        mean: mean of the log-mel values of the training clips; of all clips where no clip is
            for training.
        std: standard deviation of the same values.
        graph_only: whether `decode_wav` decodes every clip, so that the pipelines run without
            Python.
        most_seconds: seconds of a clip that are heard, see `shortened`; None for all.
    """

    source: Source
    durations: np.ndarray
    _: dataclasses.KW_ONLY
    rejected: tuple[tuple[str, str], ...]
    emptied: tuple[tuple[str, str], ...] = ()
    mean: float
    std: float
    graph_only: bool = False
    most_seconds: float | None = None

    def split(self, name: str) -> Self:
        """The clips of one split, with the same mean and std; ValueError if it has none."""
        source, keep = self.source.split(name), self.source.split_names == name
        return dataclasses.replace(self, source=source, durations=self.durations[keep])

    def shortened(self, seconds: float) -> Self:
        """The same clips without what comes after so many seconds of each, for evaluation."""
        if self.most_seconds is not None:
            seconds = min(seconds, self.most_seconds)
        durations = np.minimum(self.durations, seconds)
        return dataclasses.replace(self, durations=durations, most_seconds=seconds)

    def clip_name(self, clip_id: int) -> str:
        """Name of a clip in messages: its path, and which part of the file it is."""
        return self.source.clips[clip_id].name

    def splits(self) -> list[Self]:
        """The parts of all splits that have clips, a list of ScannedSource; "train" is first."""
        names = sorted(set(self.source.split_names), key=lambda name: (name != "train", name))
        return [self.split(str(name)) for name in names]

    def warning(self) -> str | None:
        """A message that counts and names the rejected and the missing clips; None without any.

        It also names the classes of which no clip is left for validation or test.
        """
        parts, missing = [], self.source.missing
        if missing:
            parts.append(
                f"{len(missing):,} clips that the lists of the data set name are not on the disk, "
                f"such as {some_of(missing)}. Finish the download, or go on without them."
            )
        if self.rejected:
            total = len(self.rejected) + len(self.source)
            parts.append(
                f"{len(self.rejected)} of {total} clips are left out:\n{reasons(self.rejected)}"
            )
        if self.emptied:
            listed = some_of([f"{name} ({split})" for name, split in self.emptied])
            parts.append(
                f"So no clip is left of {listed}. Replace these files; or remove them, where "
                f"the splits are drawn, which then happens without them."
            )
        return "\n".join(parts) or None

    def summary(self) -> dict[str, Any]:
        """Facts of the data as a dictionary for JSON.

        Returns:
            `clips`, `left_out`, `missing`, `mean` and `std` of the log-mel values, `hours`,
            `seconds` (quantiles of the lengths), and `classes` {class: {split: clips}}.
        """
        splits = [str(name) for name in np.unique(self.source.split_names)]
        counts = {name: dict.fromkeys(splits, 0) for name in self.source.classes}
        for (label, split), count in self.source.label_counts().items():
            counts[self.source.classes[label]][split] = count
        quantiles = {"shortest": 0, "median": 0.5, "99 %": 0.99, "longest": 1}
        return {
            "clips": len(self.source),
            "left_out": len(self.rejected),
            "missing": len(self.source.missing),
            "mean": round(self.mean, 6),
            "std": round(self.std, 6),
            "hours": round(float(self.durations.sum()) / 3600, 4),
            "seconds": {
                name: round(float(np.quantile(self.durations, q)), 3)
                for name, q in quantiles.items()
            },
            "classes": counts,
        }


class LabelColumns(NamedTuple):
    """Labels of all clips one after the other, where each clip ends in them, and the weights."""

    labels: np.ndarray
    ends: np.ndarray
    weights: np.ndarray


def sampling_weights(clips):
    """How often each clip is wanted against the others, where classes are unequally frequent.

    Args:
        clips: the training clips of a Source, or their LabelColumns.

    Returns:
        float64 (clips,): the weights that the clips carry; where all of them are 1, AST's, the
        sum over the labels of a clip of 1000 / (number of clips with this label + 0.01).

    Raises:
        ValueError: no clip has a weight above 0.

    Source: AST, Gong et al. 2021, gen_weight_file.py.
    """
    labels, ends, weights = _label_arrays(clips)
    if (weights != 1).any():
        if not weights.max() > 0:
            raise ValueError(
                "balanced=True must have a clip of a weight above 0, but all weights of the "
                "training clips are 0. Correct them, or train without it."
            )
        return weights
    of_label = 1000 / (np.bincount(labels) + 0.01)
    sums = np.append(0.0, np.cumsum(of_label[labels]))
    return np.diff(sums[ends], prepend=0.0)


def _label_arrays(clips):
    """Labels of all clips one after the other, where each clip ends in them, and their weights."""
    if hasattr(clips, "ends"):  # of Records
        return clips.labels, clips.ends, clips.weights
    labels = np.array([label for clip in clips for label in clip.labels], "int32")
    ends = np.cumsum([len(clip.labels) for clip in clips])
    return labels, ends, np.array([clip.weight for clip in clips])


def measured_splits(source):
    """Splits whose clips the mean and deviation of the log-mel values are measured on, a set."""
    splits = set(np.unique(source.split_names).tolist())
    return splits & {"train"} or splits


def check_usable(source, kept, rejected, max_rejected=0.5):
    """Raise a ValueError where too few clips, or no training clip of a class, can be used.

    Args:
        source: Source of all clips.
        kept: Source of those that can be used.
        rejected: (name, reason) of each other one.
        max_rejected: largest share of these.
    """
    if not kept.clips or len(rejected) > max_rejected * len(source):
        raise ValueError(
            f"{len(rejected)} of {len(source)} clips cannot be used"
            + (f", more than max_rejected={max_rejected:g}" if kept.clips else "")
            + f":\n{reasons(rejected)}"
        )
    gone = source.label_counts().keys() - kept.label_counts().keys()
    lost = {label for label, split in gone if split == "train"}
    if lost:
        names = [source.classes[label] for label in sorted(lost)]
        clips = {c.name for c in source.clips if c.split == "train" and lost & set(c.labels)}
        lines = [pair for pair in rejected if pair[0] in clips]
        raise ValueError(
            f"no training clip of {some_of(names)} can be used; add usable ones, or remove the "
            f"class:\n{reasons(lines)}"
        )


def check_trained(source):
    """Raise a ValueError for a class that has clips, but none to train on."""
    present = source.label_counts().keys()
    trained = {label for label, split in present if split == "train"}
    lost = sorted({label for label, _ in present} - trained)
    if lost:
        raise ValueError(
            f"no training clip of {some_of([source.classes[label] for label in lost])}, only clips "
            f"for validation or test. Add some to the training split, or remove the class."
        )


def reasons(rejected):
    """The first few reasons, one on each line."""
    lines = [reason for _, reason in rejected[:NAMED]]
    more = len(rejected) - NAMED
    return "\n".join([*lines, f"and {more} more."] if more > 0 else lines)
