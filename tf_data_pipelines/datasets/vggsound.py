"""VGGSound: 200,000 clips of 10 s of videos, 309 classes.

vggsound.csv               no header: ytid,start,label,train or test; labels with commas quoted
video/---g-f_I2yQ_000001.wav    {ytid}_{start:06d}, in any folder below
"""

from tf_data_pipelines.datasets.audioset import video_of
from tf_data_pipelines.datasets.lists import (
    Row,
    draw_validation,
    number_of,
    read_table,
    sounds_by_stem,
    source_of,
)

LIST = "vggsound.csv"
COLUMNS = ("ytid", "start_seconds", "label", "split")
SPLITS = ("train", "test")


def is_vggsound(data):
    """Whether a folder has a list of VGGSound."""
    return (data / LIST).is_file()


def read_vggsound(root):
    """VGGSound as a Source; classes are sorted. A tenth of the training clips is for validation.

    Args:
        root: pathlib.Path of the folder.

    Raises:
        FileNotFoundError: the list, or every clip, is missing.
        ValueError: the list is not as it was published.
    """
    path, sounds, rows = root / LIST, sounds_by_stem(root), []
    for line, row in read_table(path, COLUMNS, header=False):
        where = f"{path} line {line}"
        if row["split"] not in SPLITS:
            raise ValueError(
                f"{where}: the split is {row['split']!r}, expected train or test. Download the "
                f"list again."
            )
        name = f"{row['ytid']}_{number_of(row, 'start_seconds', where):06d}"
        rows.append(Row(name, sounds.get(name), (row["label"],), row["split"]))
    classes = sorted({row.labels[0] for row in rows})
    return source_of(root, draw_validation(rows, video_of), classes)
