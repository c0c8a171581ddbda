"""EPIC-SOUNDS: 78,366 sounds of 44 classes in the videos of EPIC-KITCHENS-100.

    EPIC_Sounds_train.csv            annotation_id,participant_id,video_id,start_timestamp,
    EPIC_Sounds_validation.csv       stop_timestamp,start_sample,stop_sample,description,class,
                                     class_id; older copies lack the two samples
    EPIC-KITCHENS-100_audio.hdf5     the sound of each video, 24 kHz, see hdf5.py; or
    P01/P01_01.wav                   one sound file for each video, in any folder below

Each clip is a part of the sound of a video.
"""

import re

from tf_data_pipelines.datasets.lists import (
    Row,
    in_class_order,
    number_of,
    read_table,
    sounds_by_stem,
    source_of,
)
from tf_data_pipelines.hdf5 import recordings
from tf_data_pipelines.parts import HDF5

LISTS = {"EPIC_Sounds_train.csv": "train", "EPIC_Sounds_validation.csv": "validation"}
PACKED = "EPIC-KITCHENS-100_audio.hdf5"
RATE = 24000  # Hz of start_sample and stop_sample
COLUMNS = ("annotation_id", "video_id", "start_timestamp", "stop_timestamp", "class", "class_id")


def is_epic_sounds(data):
    """Whether a folder has a list of EPIC-SOUNDS."""
    return any((data / name).is_file() for name in LISTS)


def read_epic_sounds(root):
    """EPIC-SOUNDS as a Source of parts; classes in the order of class_id.

    The published validation clips stay the validation; there are no labeled test clips.

    Args:
        root: pathlib.Path of the folder.

    Raises:
        AudioError: the HDF5 file is damaged or something else.
        FileNotFoundError: both lists, or the sound of every video, are missing.
        ValueError: a list is not as it was published.
    """
    lists = {name: split for name, split in LISTS.items() if (root / name).is_file()}
    if not lists:
        raise FileNotFoundError(f"{root} has none of {', '.join(LISTS)}. Copy them into it.")
    sounds, numbers, rows = _recordings(root), {}, []
    for name, split in lists.items():
        path = root / name
        for line, row in read_table(path, COLUMNS):
            where, label = f"{path} line {line}", row["class"]
            number = number_of(row, "class_id", where)
            if numbers.setdefault(label, number) != number:
                raise ValueError(
                    f"{where}: {label!r} has class_id {number}, on other lines "
                    f"{numbers[label]}. Download the lists again."
                )
            start, stop = (_seconds(row, edge, where) for edge in ("start", "stop"))
            found = sounds.get(row["video_id"])
            rows.append(Row(row["annotation_id"], found, (label,), split, start=start, stop=stop))
    return source_of(root, rows, in_class_order(numbers, root))


def _recordings(root):
    """{video: path of its sound}; what the HDF5 file lacks may lie beside it as a sound file."""
    sounds, packed = sounds_by_stem(root), root / PACKED
    if packed.is_file():
        folder = f"{packed.parent}/{packed.stem}{HDF5}"
        sounds.update((video, f"{folder}{video}") for video in recordings(packed))
    return sounds


def _seconds(row, edge, where):
    """Where a clip starts or stops: by its sample, or by the timestamp of an older copy."""
    if row.get(f"{edge}_sample"):
        return number_of(row, f"{edge}_sample", where, float) / RATE
    text = row[f"{edge}_timestamp"]
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d*)?)", text)
    if match is None:
        raise ValueError(
            f"{where}: {edge}_timestamp is {text!r}, expected HH:MM:SS.mmm. Download the list "
            f"again."
        )
    hours, minutes, seconds = map(float, match.groups())
    return 3600 * hours + 60 * minutes + seconds
