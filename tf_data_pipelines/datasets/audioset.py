"""AudioSet: 2 million clips of 10 s of videos, 527 classes, several for each clip.

    balanced_train_segments.csv      three lines of '#', then
    unbalanced_train_segments.csv    YTID, start_seconds, end_seconds, "mid,mid"
    eval_segments.csv                the test clips
    class_labels_indices.csv         index,mid,display_name

The sounds are the user's own download, in any folders below. Their names have one of the forms
that such downloads have: {ytid}_{start ms}_{end ms}, {ytid}_{start:.3f} or Y{ytid}.
"""

from tf_data_pipelines.datasets.lists import (
    Row,
    draw_validation,
    in_class_order,
    number_of,
    read_table,
    sounds_by_stem,
    source_of,
)
from tf_data_pipelines.listing import some_of

LISTS = {
    "balanced_train_segments.csv": "train",
    "unbalanced_train_segments.csv": "train",
    "eval_segments.csv": "test",
}
LABELS = "class_labels_indices.csv"
COLUMNS = ("YTID", "start_seconds", "end_seconds", "positive_labels")


def is_audioset(data):
    """Whether a folder has a list of AudioSet."""
    return any((data / name).is_file() for name in LISTS)


def read_audioset(root):
    """AudioSet, or the lists of it that are there, as a multi-label Source.

    Classes are the display names, in the order of class_labels_indices.csv. A tenth of the
    training clips is drawn for validation.

    Args:
        root: pathlib.Path of the folder.

    Raises:
        FileNotFoundError: class_labels_indices.csv, all lists or every clip are missing.
        ValueError: a list is not as it was published, or has a label that the classes lack.
    """
    lists = {name: split for name, split in LISTS.items() if (root / name).is_file()}
    if not lists:
        raise FileNotFoundError(
            f"{root} has none of {', '.join(LISTS)}. Copy the lists of the clips that you have "
            f"into it."
        )
    classes, mids = read_class_labels(root / LABELS)
    sounds, rows = sounds_by_stem(root), []
    for name, split in lists.items():
        path = root / name
        for line, row in read_table(path, COLUMNS, header=False, comment="#"):
            where, ytid = f"{path} line {line}", row["YTID"]
            start, end = (number_of(row, column, where, float) for column in COLUMNS[1:3])
            stems = (
                f"{ytid}_{round(1000 * start)}_{round(1000 * end)}",
                f"{ytid}_{start:.3f}",
                f"Y{ytid}",
            )
            found = next((sounds[stem] for stem in stems if stem in sounds), None)
            labels = class_names(row["positive_labels"], mids, where)
            rows.append(Row(f"{ytid}_{start:.3f}", found, labels, split))
    return source_of(root, draw_validation(rows, video_of), classes, multi_label=True)


def video_of(row):
    """Video of a row that is named {video}_{start}; all clips of a video go into one split."""
    return row.name.rpartition("_")[0]


def read_class_labels(path):
    """(class names in their order, {mid: class name}) of a class_labels_indices.csv.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it lacks a column, or has a mid, an index or a name twice.
    """
    numbers, mids = {}, {}
    for line, row in read_table(path, ("index", "mid", "display_name")):
        name = row["display_name"]
        if name in numbers or row["mid"] in mids:
            raise ValueError(
                f"{path} line {line}: {name!r} ({row['mid']}) is on a line above already. Give "
                f"each class one line."
            )
        numbers[name] = number_of(row, "index", f"{path} line {line}")
        mids[row["mid"]] = name
    return in_class_order(numbers, path), mids


def class_names(text, mids, where):
    """Class names of "mid,mid", a tuple without repeats.

    Args:
        text: mids with commas between them.
        mids: dictionary from mid to class name; None where the labels are the names.
        where: place of the text, for messages.

    Raises:
        ValueError: there is none, or one that is unknown.
    """
    labels = tuple(dict.fromkeys(label.strip() for label in text.split(",") if label.strip()))
    if not labels:
        raise ValueError(f"{where}: there is no label. Give one, or remove the clip.")
    unknown = [label for label in labels if mids is not None and label not in mids]
    if unknown:
        raise ValueError(
            f"{where}: the label {some_of(unknown)} is not in the class list ({LABELS}) of "
            f"{len(mids):,} classes. Use the class list that belongs to this list of clips."
        )
    return labels if mids is None else tuple(mids[label] for label in labels)
