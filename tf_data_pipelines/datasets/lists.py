"""What the readers of published data sets share: their lists, their clips, a drawn validation."""

import collections
import hashlib
import itertools
import math
import os
import re
import warnings
from typing import NamedTuple

from tf_data_pipelines.audio import AUDIO_EXTENSIONS
from tf_data_pipelines.clips import Clip, Source
from tf_data_pipelines.listing import csv_lines, folders_in, some_of, text_of
from tf_data_pipelines.settings import DataWarning

VALIDATION_SHARE = 0.1  # of the training clips, where a data set publishes no validation split
# Folders with these words (or numbers only) are parts of a data set, others may be classes.
PART_WORDS = {
    *("train", "training", "eval", "evaluation", "test", "testing", "val", "valid", "validation"),
    *("dev", "bal", "unbal", "balanced", "unbalanced", "segments", "part", "data", "meta"),
    *("metadata", "csv", "audio", "audios", "wav", "wavs", "flac", "ogg", "mp", "sound", "sounds"),
    *("clips", "lists"),
}
PEOPLE = {"p", "id"}  # P01 of EPIC-KITCHENS, id10001 of VoxCeleb


class Row(NamedTuple):
    """One clip of the lists of a data set.

    Args:
        name: what the lists call it, for messages.
        path: its file; None where the disk lacks it.
        labels: tuple of class names.
        split: "train", "validation" or "test".
        start, stop, weight: as in Clip.
    """

    name: str
    path: str | None
    labels: tuple[str, ...]
    split: str
    start: float = 0.0
    stop: float | None = None
    weight: float = 1.0


def source_of(root, rows, classes, *, multi_label=False):
    """The Source of the rows whose files are there; a warning where many are not.

    Args:
        root: folder or file, for messages.
        rows: list of Row.
        classes: class names in their order.
        multi_label: whether a clip may have several labels.

    Raises:
        FileNotFoundError: no file is there.
        ValueError: there are no rows, or a clip is in two splits.
    """
    if not rows:
        raise ValueError(f"the lists in {root} are empty. Download them again.")
    rows = _once(root, rows)
    missing = [row for row in rows if row.path is None]
    names = tuple(row.name for row in missing)
    if len(missing) == len(rows):
        raise FileNotFoundError(
            f"{root} has none of the {len(rows):,} clips that its lists name, such as "
            f"{some_of(names[:1])}. Download the sounds into it, under their published names."
        )
    total, gone = (collections.Counter(row.split for row in some) for some in (rows, missing))
    if len(missing) > len(rows) / 2 or any(gone[split] == total[split] for split in total):
        listed = ", ".join(f"{gone[split]:,} of {total[split]:,} {split}" for split in total)
        warnings.warn(
            f"{root} lacks {len(missing):,} of the {len(rows):,} clips that its lists name "
            f"({listed}), such as {some_of(names)}. Finish the download, or move a list whose "
            f"clips you do not want out of the folder.",
            DataWarning,
            stacklevel=3,
        )
    index = {name: label for label, name in enumerate(classes)}
    clips = (
        Clip(
            row.path,
            tuple(sorted(index[name] for name in row.labels)),
            row.split,
            start=row.start,
            stop=row.stop,
            weight=row.weight,
        )
        for row in rows
        if row.path is not None
    )
    return Source(tuple(clips), tuple(classes), multi_label, missing=names)


def _once(root, rows):
    """The rows without repeats; a ValueError where a clip is in two splits."""
    splits, kept = {}, {}
    for row in rows:
        clip = (row.path or row.name, row.start, row.stop)
        if splits.setdefault(clip, row.split) != row.split:
            raise ValueError(
                f"{root}: the lists have {row.name} for {splits[clip]} and for {row.split}. Remove "
                f"one of the lines, so that no clip is tested that was trained on."
            )
        kept.setdefault((*clip, row.labels), row)
    return list(kept.values())


def draw_validation(rows, key=lambda row: row.name):
    """The rows, with a tenth of those for training in the split "validation".

    The draw depends only on the names in the lists, so it is the same on every machine, also
    where files are missing. Every class keeps a training clip.

    Args:
        rows: list of Row.
        key: function from a row to the text that is drawn; rows of one text stay together.

    Returns:
        list of Row, in the same order.
    """
    keys = {key(row) for row in rows if row.split == "train"}
    digests = {text: hashlib.sha256(text.encode(errors="replace")).digest() for text in keys}
    ranked = sorted(keys, key=lambda text: (digests[text], text))
    drawn = set(ranked[: max(1, round(VALIDATION_SHARE * len(ranked)))])
    first, kept = {}, set()
    for row in rows:
        if row.split == "train":
            for label in row.labels:
                first[label] = min(first.get(label, key(row)), key(row))
            if key(row) not in drawn:
                kept.update(row.labels)
    drawn -= {text for label, text in first.items() if label not in kept}
    return [
        row._replace(split="validation") if row.split == "train" and key(row) in drawn else row
        for row in rows
    ]


def in_class_order(numbers, path):
    """Class names in the order of their numbers.

    Args:
        numbers: dictionary from each class name to its number.
        path: the list that has them, for messages.

    Raises:
        ValueError: two classes have one number.
    """
    names = sorted(numbers, key=numbers.get)
    for name, other in itertools.pairwise(names):
        if numbers[name] == numbers[other]:
            raise ValueError(
                f"{path}: the classes {name!r} and {other!r} have both the number "
                f"{numbers[name]}. Download the list again."
            )
    return tuple(names)


def read_table(path, columns, *, header=True, comment=None):
    """(line number, {column: text}) of each line of a published CSV file.

    Args:
        path: pathlib.Path of the file.
        columns: names of the columns that are needed; without a header those of all columns.
        header: whether the first line names the columns; more of them than needed are kept.
        comment: first characters of lines that are skipped; None skips none.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is no UTF-8 text or CSV, or a column or a value is missing.
    """
    lines = csv_lines(_present(path), skipinitialspace=True)
    lines = [(line, row) for line, row in lines if not (comment and row[0].startswith(comment))]
    if header:
        named = lines[0][1] if lines else []
        lost = [name for name in columns if name not in named]
        if lost:
            raise ValueError(
                f"{path} has no column {some_of(lost)} in its first line; it has "
                f"{some_of(named) or 'none'}. Download the list again, as it was published."
            )
        lines = lines[1:]
    else:
        named = columns
    rows = []
    for line, values in lines:
        row = dict(zip(named, values, strict=False))
        if len(values) != len(named):
            raise ValueError(
                f"{path} line {line} has {len(values)} values, expected {len(named)}: "
                f"{', '.join(named)}. Download the list again, as it was published."
            )
        empty = [name for name in columns if not row[name]]
        if empty:
            raise ValueError(
                f"{path} line {line}: {empty[0]} is empty. Download the list again, as it was "
                f"published."
            )
        rows.append((line, row))
    return rows


def read_lines(path):
    """(line number, text) of each line with text; FileNotFoundError, ValueError as `read_table`."""
    lines = enumerate(text_of(_present(path)).splitlines(), 1)
    return [(line, text.strip()) for line, text in lines if text.strip()]


def number_of(row, column, where, kind=int):
    """A value of a row as a number; a ValueError names the place where it is."""
    try:
        number = kind(row[column])
        if not math.isfinite(number):
            raise ValueError
        return number
    except ValueError:
        raise ValueError(
            f"{where}: {column} is {row[column]!r}, expected a number. Download the list again."
        ) from None


def _present(path):
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Copy the published list into the folder, or give layout "
            f"another name."
        )
    return path


def sounds_by_stem(root):
    """{file name without its ending: path} of all sound files in a folder and below it."""
    found, seen = {}, set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        seen.add(real)
        for name in sorted(files):
            stem, ending = os.path.splitext(name)
            if ending.lower() in AUDIO_EXTENSIONS and not name.startswith("."):
                found.setdefault(stem, os.path.join(folder, name))
    return found


def has_class_folders(root):
    """Whether two folders hold sounds and are named as classes are: then they are a user's own."""
    classes = 0
    for folder in folders_in(root):
        words = {word.lower() for word in re.findall(r"[^\W\d_]+", folder.name)}
        if words and words <= PEOPLE:
            continue
        if words <= PART_WORDS:
            if has_class_folders(folder):
                return True
        else:
            classes += _has_sounds(folder)
    return classes > 1


def _has_sounds(root):
    files = (name for _, _, names in os.walk(root) for name in names)
    return any(name.lower().endswith(AUDIO_EXTENSIONS) for name in files)
