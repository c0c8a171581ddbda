"""VoxCeleb1, identification of 1,251 speakers.

wav/id10001/1zcIwhmdeo4/00001.wav    wav/{speaker}/{video}/{n}.wav, 16 kHz
iden_split.txt                       "1 id10001/1zcIwhmdeo4/00001.wav": 1 training,
                                     2 validation, 3 test
"""

import re

from tf_data_pipelines.datasets.lists import Row, read_lines, source_of

LIST = "iden_split.txt"
SPLITS = {"1": "train", "2": "validation", "3": "test"}
LINE = re.compile(r"([123])\s+((id\d+)/[^/]+/[^/]+)")


def is_voxceleb1(data):
    """Whether a folder has a list of VoxCeleb1 with its list for identification."""
    return (data / LIST).is_file()


def read_voxceleb1(root):
    """VoxCeleb1 identification as a Source; classes are the speakers, sorted.

    Args:
        root: pathlib.Path of the folder.

    Raises:
        FileNotFoundError: the list, or every clip, is missing.
        ValueError: the list is not as it was published.
    """
    path, rows = root / LIST, []
    for line, text in read_lines(path):
        match = LINE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{path} line {line} is {text[:80]!r}, expected 1, 2 or 3 and a path such as "
                f"'id10001/1zcIwhmdeo4/00001.wav'. Download the list again."
            )
        split, name, speaker = match.groups()
        sound = root / "wav" / name
        found = str(sound) if sound.is_file() else None
        rows.append(Row(name, found, (speaker,), SPLITS[split]))
    return source_of(root, rows, sorted({row.labels[0] for row in rows}))
