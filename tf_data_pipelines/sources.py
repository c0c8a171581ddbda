"""Which clips there are, their labels and splits: a folder tree or a CSV manifest.

`load_source` reads names only; `scan_source` opens every file once, drops the unusable ones
and measures what the filterbank needs: the mean and standard deviation of its values.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import itertools
import os
import pathlib
import zlib

import numpy as np

from tf_data_pipelines.decode import AUDIO_EXTENSIONS, MIN_SAMPLES, AudioError, read_audio

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
NAMED = 5  # examples in a message

LAYOUT = (
    "Expected one folder per class (data/dog/1.wav, data/cat/2.wav), or split folders first "
    "(data/train/dog/1.wav), or a .csv manifest with the columns path and label."
)


@dataclasses.dataclass(frozen=True)
class Clip:
    """One sound file.

    Args:
        path: the file.
        labels: indices into the source's classes, ascending; one unless multi-label.
        split: "train", "validation" or "test".
    """

    path: str
    labels: tuple[int, ...]
    split: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Clips and the classes that their labels index.

    Args:
        clips: in the order of the sorted folder, or of the manifest.
        classes: names; the position is the label.
        multi_label: whether a clip may have several labels.
    """

    clips: tuple[Clip, ...]
    classes: tuple[str, ...]
    multi_label: bool

    def __len__(self):
        return len(self.clips)

    def split(self, name):
        """The source with the clips of one split only.

        Raises:
            ValueError: it has none; lists the splits present.
        """
        clips = tuple(clip for clip in self.clips if clip.split == name)
        if not clips:
            present = collections.Counter(clip.split for clip in self.clips)
            listed = ", ".join(f"{split!r} ({count} clips)" for split, count in present.items())
            raise ValueError(f"split {name!r} has no clips; present are {listed or 'none'}.")
        return dataclasses.replace(self, clips=clips)


@dataclasses.dataclass(frozen=True)
class ScannedSource:
    """What opening every clip once found.

    Args:
        source: the usable clips, in their order; the classes are unchanged.
        durations: float64 (clips,), seconds.
        rejected: (path, reason) of each unusable file.
        mean, std: of the log-mel values of the training clips (of all, without any).
        graph_only: every clip is a WAV that `decode_wav` decodes, so that the pipelines need
            no Python while they run.
    """

    source: Source
    durations: np.ndarray
    rejected: tuple[tuple[str, str], ...]
    mean: float
    std: float
    graph_only: bool = False

    def split(self, name):
        """The part of one split, with the same mean and std; ValueError when it is empty."""
        source = self.source.split(name)
        keep = [clip.split == name for clip in self.source.clips]
        return dataclasses.replace(self, source=source, durations=self.durations[keep])

    def warning(self):
        """A message that counts and names the rejected files; None without any."""
        if not self.rejected:
            return None
        total = len(self.rejected) + len(self.source)
        return f"{len(self.rejected)} of {total} clips are left out:\n{_reasons(self.rejected)}"


def load_source(data, classes=None, validation=0.1, test=0.1, seed=1337):
    """Clips, labels and splits of a folder or of a manifest; opens no sound file.

    A folder holds one folder per class, or split folders (train, validation, test; val,
    valid, dev and eval are known too) that do. Names that start with "." or "_" are
    skipped. A .csv manifest has a header with `path` and `label`, and may have `split`;
    several labels are separated by ";", and paths are relative to the manifest.

    Without splits, clips are drawn per class: every class keeps a training clip, and
    one with three or more gives at least one to each fraction above 0 (several labels
    per clip: as far as possible). The draw depends on the seed and the names alone.

    Args:
        data: folder, or .csv file.
        classes: names in the order of a trained model; None sorts those found.
        validation, test: fractions of the clips of each class, used without splits.
        seed: of the draw.

    Returns:
        Source.

    Raises:
        FileNotFoundError: `data`, or files of the manifest, do not exist.
        ValueError: anything else about the layout; names the folder or line.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise ValueError(
            f"validation={validation} and test={test} must be 0 or more and leave room for "
            f"training: their sum must be below 1."
        )
    data = pathlib.Path(data).expanduser()
    if data.is_dir():
        rows, multi_label = _read_folder(data), False
    elif not data.exists():
        raise FileNotFoundError(f"data={str(data)!r} does not exist. {LAYOUT}")
    elif data.suffix.lower() == ".csv":
        rows, multi_label = _read_manifest(data)
    else:
        raise ValueError(f"data={str(data)!r} is neither a folder nor a .csv file. {LAYOUT}")
    found = sorted({name for _, names, _ in rows for name in names})
    if classes is None and len(found) < 2:
        raise ValueError(
            f"{data} has one class, {found[0]!r}; a classifier needs at least 2. {LAYOUT}"
        )
    classes = tuple(found if classes is None else classes)
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise ValueError(
            f"{data} has the class(es) {_some(unknown)}, which classes lacks; it has "
            f"{', '.join(classes)}. Rename them, or train a model with them."
        )
    index = {name: label for label, name in enumerate(classes)}
    if rows[0][2] is None:
        names = {
            os.path.relpath(path, data.parent).replace(os.sep, "/"): labels
            for path, labels, _ in rows
        }
        splits = _draw_splits(names, validation, test, seed)
        rows = [(p, n, s) for (p, n, _), s in zip(rows, splits, strict=True)]
    clips = (
        Clip(path, tuple(sorted(index[name] for name in names)), split)
        for path, names, split in rows
    )
    return Source(tuple(clips), classes, multi_label)


def scan_source(source, settings, progress=False, max_rejected=0.5):
    """Open every clip once: which are usable, how long, and the log-mel statistics.

    Args:
        source: Source.
        settings: FbankSettings; its mean and std are not used.
        progress: show a bar.
        max_rejected: the largest share of unusable clips that is only a warning.

    Returns:
        ScannedSource.

    Raises:
        ValueError: no clip is usable, more than `max_rejected` of them are not, or a
            class loses all its training clips; names files and reasons.
    """
    import rich.progress
    import tensorflow as tf

    from tf_data_pipelines.decode import decode_wav
    from tf_data_pipelines.fbank import log_mel

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def is_plain(path):
        return tf.size(decode_wav(path, settings.sample_rate)) >= min_samples

    signature = [tf.TensorSpec([None], tf.float32)]
    filterbank = tf.function(lambda waveform: log_mel(waveform, settings), signature)
    min_samples = max(settings.window, MIN_SAMPLES)  # decode_audio refuses under MIN_SAMPLES
    measured_split = {"train"} & {clip.split for clip in source.clips}

    def measure(clip):
        """(reason, seconds, whether plain WAV, values, sum, sum of squares) of one clip."""
        try:
            waveform = read_audio(clip.path, settings.sample_rate, min_samples)
        except AudioError as error:
            return str(error), 0.0, True, 0, 0.0, 0.0
        seconds, plain = waveform.size / settings.sample_rate, bool(is_plain(clip.path))
        if measured_split and clip.split not in measured_split:
            return None, seconds, plain, 0, 0.0, 0.0
        values = filterbank(waveform).numpy().astype(np.float64)
        return None, seconds, plain, values.size, values.sum(), np.square(values).sum()

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(measure, source.clips)
        if progress:
            results = rich.progress.track(results, "Reading clips", len(source))
        results = list(results)

    good = [result[0] is None for result in results]
    clips = tuple(clip for clip, keep in zip(source.clips, good, strict=True) if keep)
    rejected = tuple(
        (clip.path, result[0])
        for clip, result in zip(source.clips, results, strict=True)
        if result[0] is not None
    )
    kept = dataclasses.replace(source, clips=clips)
    _check_rejected(source, kept, rejected, max_rejected)
    count, total, squares = np.sum([result[3:] for result in results], 0)
    mean = total / count
    std = np.sqrt(max(0.0, squares / count - mean**2))
    durations = np.array([r[1] for r, keep in zip(results, good, strict=True) if keep])
    plain = all(result[2] for result in results)
    return ScannedSource(kept, durations, rejected, float(mean), float(std), plain)


def _check_rejected(source, kept, rejected, max_rejected):
    """Raise where too little is left to go on with a warning."""
    if not kept.clips or len(rejected) > max_rejected * len(source):
        raise ValueError(
            f"{len(rejected)} of {len(source)} clips cannot be used"
            + (f", more than max_rejected={max_rejected:g}" if kept.clips else "")
            + f":\n{_reasons(rejected)}"
        )
    lost = _trained_labels(source) - _trained_labels(kept)
    if lost:
        names = [source.classes[label] for label in sorted(lost)]
        paths = {c.path for c in source.clips if c.split == "train" and lost & set(c.labels)}
        reasons = [pair for pair in rejected if pair[0] in paths]
        raise ValueError(
            f"no training clip of {_some(names)} can be used; add usable ones, or remove the "
            f"class:\n{_reasons(reasons)}"
        )


def _trained_labels(source):
    return {label for clip in source.clips if clip.split == "train" for label in clip.labels}


def _reasons(rejected):
    """The first few reasons, one a line."""
    lines = [reason for _, reason in rejected[:NAMED]]
    more = len(rejected) - NAMED
    return "\n".join([*lines, f"and {more} more."] if more > 0 else lines)


def _some(names):
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(str(name)) for name in names[:NAMED]) + more


def _read_folder(root):
    """Rows (path, class names, split or None) of a folder, sorted by name."""
    folders, sounds = _folders(root), _sounds(root, deep=False)
    if sounds:
        raise ValueError(
            f"{root} has {len(sounds)} sound file(s) directly in it, such as "
            f"{sounds[0].name!r}, so their class is unknown. {LAYOUT}"
        )
    if not folders:
        raise ValueError(f"{root} is empty: no class folders in it. {LAYOUT}")
    splits = [f for f in folders if f.name.lower() in SPLIT_ALIASES and _folders(f)]
    splits = [f for f in splits if not _sounds(f, deep=False)]
    if not splits:
        return _read_classes(root, None)
    others = [folder.name for folder in folders if folder not in splits]
    if others:
        raise ValueError(
            f"{root} has split folders ({_some([f.name for f in splits])}) beside {_some(others)}. "
            f"Move those into a split, or rename them to start with '_' to leave them out."
        )
    return [row for f in splits for row in _read_classes(f, SPLIT_ALIASES[f.name.lower()])]


def _read_classes(root, split):
    rows = []
    for folder in _folders(root):
        sounds = _sounds(folder)
        if not sounds:
            raise ValueError(
                f"class folder {folder} has no sound file ({', '.join(AUDIO_EXTENSIONS)}). "
                f"Add some, or remove the folder."
            )
        rows += [(str(path), (folder.name,), split) for path in sounds]
    return rows


def _folders(root):
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "_")))


def _sounds(root, deep=True):
    """Sound files in a folder, and in the folders below it."""
    files = [p for p in root.iterdir() if p.is_file() and not p.name.startswith(".")]
    sounds = sorted(p for p in files if p.suffix.lower() in AUDIO_EXTENSIONS)
    if deep:
        sounds += [path for folder in _folders(root) for path in _sounds(folder)]
    return sounds


def _read_manifest(manifest):
    """Rows (path, class names, split or None) of a CSV, in its order; whether multi-label."""
    header, lines = _read_csv(manifest)
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
            f"{manifest.parent}: {_some(missing)}."
        )
    multi_label = label_column == "labels" or any(len(names) > 1 for _, names, _ in rows)
    return rows, multi_label


def _read_csv(manifest):
    """Lower-case column names, and (line number, values by column) of each filled line."""
    try:
        with open(manifest, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            lines = [(reader.line_num, [v.strip() for v in values]) for values in reader]
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except csv.Error as error:
        raise ValueError(f"{manifest} line {reader.line_num} is not CSV: {error}.") from None
    lines = [(line, values) for line, values in lines if any(values)]
    if not lines:
        raise ValueError(f"{manifest} is empty. {LAYOUT}")
    header = [name.lower() for name in lines[0][1]]
    rows = (
        (line, itertools.zip_longest(header, values, fillvalue="")) for line, values in lines[1:]
    )
    return header, [(line, dict(row)) for line, row in rows]


def _draw_splits(clips, validation, test, seed):
    """A split for each clip, drawn class by class from the rarest, so that labels spread.

    Args:
        clips: {name: class names}.

    Returns:
        list of str, in the order of `clips`.
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
        # A generator per class: adding a class does not move the clips of the others.
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
    """How many of a class's clips go where; training always gets one."""
    quotas = collections.Counter()
    for split, fraction in (("validation", validation), ("test", test)):
        if fraction and count >= 3:
            quotas[split] = max(1, round(fraction * count))
    while sum(quotas.values()) >= count:
        quotas[max(quotas, key=quotas.get)] -= 1
    quotas["train"] = count - sum(quotas.values())
    return quotas
