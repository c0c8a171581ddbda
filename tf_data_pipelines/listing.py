"""Rows of path, class names and split from a folder tree or a CSV manifest; drawn splits.

This module reads names and manifests only and opens no sound file.
"""

import collections
import csv
import io
import itertools
import os
import pathlib
import zlib

import numpy as np

from tf_data_pipelines.audio import AUDIO_EXTENSIONS
from tf_data_pipelines.settings import LAYOUT_NAMES

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",  # AudioSet's and FSD50K's word for their test clips
}
PATH_COLUMNS = ("path", "filename", "file", "wav")
LABEL_COLUMNS = ("label", "labels", "category", "class")
NAMED = 5  # examples named in a message

EXPECTED = (
    "Expected one folder per class (data/dog/1.wav, data/cat/2.wav), or split folders first "
    "(data/train/dog/1.wav), or a .csv manifest with the columns path and label, or a published "
    f"data set with its own lists ({', '.join(LAYOUT_NAMES)})."
)


def some_of(names):
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(str(name)) for name in names[:NAMED]) + more


def read_folder(root):
    """(path, class names, split or None) of each sound file in a folder, sorted by name."""
    folders, sounds = folders_in(root), sounds_in(root, deep=False)
    if sounds:
        raise ValueError(
            f"{root} has {len(sounds)} sound file(s) directly in it, such as "
            f"{sounds[0].name!r}, so their class is unknown. {EXPECTED}"
        )
    if not folders:
        raise ValueError(f"{root} is empty: no class folders in it. {EXPECTED}")
    splits = [f for f in folders if f.name.lower() in SPLIT_ALIASES and folders_in(f)]
    splits = [f for f in splits if not sounds_in(f, deep=False)]
    if not splits:
        return _read_classes(root, None)
    others = [folder.name for folder in folders if folder not in splits]
    if others:
        raise ValueError(
            f"{root} has split folders ({some_of([f.name for f in splits])}) beside "
            f"{some_of(others)}. Move those into a split, or rename them to start with '_' to "
            f"leave them out."
        )
    return [row for f in splits for row in _read_classes(f, SPLIT_ALIASES[f.name.lower()])]


def sound_files(paths):
    """Sound files, and in the place of each folder the sound files in it and below it.

    Args:
        paths: list of paths of files and folders.

    Returns:
        list of pathlib.Path, those of a folder sorted; names that start with "." and folders
        that start with "_" are left out. A folder without sound files stays itself.
    """
    found = []
    for path in map(pathlib.Path, paths):
        found += (sounds_in(path) or [path]) if path.is_dir() else [path]
    return found


def _read_classes(root, split):
    rows = []
    for folder in folders_in(root):
        sounds = sounds_in(folder)
        if not sounds:
            raise ValueError(
                f"class folder {folder} has no sound file ({', '.join(AUDIO_EXTENSIONS)}). "
                f"Add some, or remove the folder."
            )
        rows += [(str(path), (folder.name,), split) for path in sounds]
    return rows


def folders_in(root):
    """The folders in a folder that are not left out; a link to a folder above would never end."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "_")))
    above = root.resolve()
    return [p for p in folders if not (p.is_symlink() and above.is_relative_to(p.resolve()))]


def sounds_in(root, deep=True):
    """Sound files in a folder and, if deep, in the folders below it."""
    files = [p for p in root.iterdir() if p.is_file() and not p.name.startswith(".")]
    sounds = sorted(p for p in files if p.suffix.lower() in AUDIO_EXTENSIONS)
    if deep:
        sounds += [path for folder in folders_in(root) for path in sounds_in(folder)]
    return sounds


def read_manifest(manifest):
    """(path, class names, split or None) of each CSV line in order; whether multi-label."""
    header, lines = _read_header(manifest)
    path_column = next((name for name in PATH_COLUMNS if name in header), None)
    label_column = next((name for name in LABEL_COLUMNS if name in header), None)
    for column, names in ((path_column, PATH_COLUMNS), (label_column, LABEL_COLUMNS)):
        if column is None:
            raise ValueError(
                f"{manifest} has no column {names[0]!r} (or {', '.join(names[1:])}) in its first "
                f"line; it has {', '.join(map(repr, header)) or 'none'}. Use commas."
            )
    if not lines:
        raise ValueError(f"{manifest} has no rows under its header. Add one line per clip.")
    with_splits = any(row.get("split") for _, row in lines)
    rows, seen, missing = [], {}, []
    for line, row in lines:
        for column in (path_column, label_column):
            if "\n" in row[column] or "\r" in row[column]:
                raise ValueError(
                    f"{manifest} line {line}: {column} has more than one line, from a quote that "
                    f"is closed too late. Close it."
                )
        if not row[path_column]:
            raise ValueError(f"{manifest} line {line}: {path_column} is empty. Fill it in.")
        path = os.path.normpath(manifest.parent / os.path.expanduser(row[path_column]))
        names = tuple(dict.fromkeys(n.strip() for n in row[label_column].split(";") if n.strip()))
        if not names:
            raise ValueError(f"{manifest} line {line}: {label_column} is empty. Fill it in.")
        if path in seen:
            raise ValueError(
                f"{manifest} line {line}: {path} is on line {seen[path]} already. Keep one line "
                f"per clip; separate several labels by ';'."
            )
        seen[path] = line
        split = None
        if with_splits:
            split = SPLIT_ALIASES.get(row["split"].lower())
            if split is None:
                raise ValueError(
                    f"{manifest} line {line}: split {row['split']!r} is unknown. Use "
                    f"{', '.join(SPLITS)}, or leave the whole column empty."
                )
        if not os.path.isfile(path):
            missing.append(f"line {line}: {path}")
        rows.append((path, names, split))
    if missing:
        raise FileNotFoundError(
            f"{manifest} names {len(missing)} file(s) that do not exist; paths are relative to "
            f"{manifest.parent}: {some_of(missing)}."
        )
    multi_label = label_column == "labels" or any(len(names) > 1 for _, names, _ in rows)
    return rows, multi_label


def _read_header(manifest):
    """Lower-case column names, and (line number, {column: value}) of each line with text."""
    lines = csv_lines(manifest)
    if not lines:
        raise ValueError(f"{manifest} is empty. {EXPECTED}")
    header = [name.lower() for name in lines[0][1]]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        raise ValueError(f"{manifest} has two columns {twice!r}. Rename or remove one of them.")
    for line, values in lines[1:]:
        if any(values[len(header) :]):
            raise ValueError(
                f"{manifest} line {line} has {len(values)} values for {len(header)} columns. Put "
                f"quotes around a value with a comma, and separate several labels by ';'."
            )
    rows = (
        (line, itertools.zip_longest(header, values, fillvalue="")) for line, values in lines[1:]
    )
    return header, [(line, dict(row)) for line, row in rows]


def csv_lines(path, **options):
    """(line number, values) of each line with text of a CSV file.

    Args:
        path: file name.
        options: arguments of csv.reader.

    Raises:
        ValueError: the file is no UTF-8 text, or a quote in it is not closed.
    """
    lines, line = [], 1  # where the row at hand begins
    text = io.StringIO(text_of(path), newline="")
    try:
        reader = csv.reader(text, strict=True, **options)
        for values in reader:
            lines.append((line, [value.strip() for value in values]))
            line = reader.line_num + 1
    except csv.Error as error:
        reason = "a quote is not closed" if "end of data" in str(error) else error
        raise ValueError(
            f"{path} line {line} is not CSV: {reason}. Use commas between values, close each "
            f"quote, and write a quote in a value twice."
        ) from None
    return [(line, values) for line, values in lines if any(values)]


def text_of(path):
    """The text of a file, its line ends as they are; a ValueError if it is not UTF-8."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from None


def draw_splits(clips, validation, test, seed):
    """Draw a split for each clip, one class after the other, the rarest class first.

    Args:
        clips: dictionary from the name of each clip to its class names.
        validation: share of the clips of each class in the validation split.
        test: share of the clips of each class in the test split.
        seed: random seed of the draw.

    Returns:
        list of str, the split of each clip in the order of `clips`.
    """
    members = collections.defaultdict(list)
    for name in sorted(clips):
        for label in clips[name]:
            members[label].append(name)
    splits = {}
    for label in sorted(members, key=lambda label: (len(members[label]), label)):
        wanted = _quotas(len(members[label]), validation, test)
        wanted.subtract(splits[name] for name in members[label] if name in splits)
        free = [name for name in members[label] if name not in splits]
        # One generator per class, so that a new class does not move the clips of the others.
        np.random.default_rng([seed, zlib.crc32(label.encode())]).shuffle(free)
        for split in SPLITS[1:]:
            count = max(0, wanted[split])
            splits.update((name, split) for name in free[:count])
            free = free[count:]
        splits.update((name, "train") for name in free)
        if not any(splits[name] == "train" for name in members[label]):
            splits[members[label][0]] = "train"
    return [splits[name] for name in clips]


def _quotas(count, validation, test):
    """Number of clips of a class in each split; training always gets one."""
    quotas = collections.Counter()
    for split, fraction in (("validation", validation), ("test", test)):
        if fraction and count >= 3:
            quotas[split] = max(1, round(fraction * count))
    while sum(quotas.values()) >= count:
        quotas[max(quotas, key=quotas.get)] -= 1
    quotas["train"] = count - sum(quotas.values())
    return quotas
