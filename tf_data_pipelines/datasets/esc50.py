"""ESC-50: 2,000 clips of 5 s in 50 classes and 5 folds.

audio/1-100032-A-0.wav    {fold}-{clip}-{take}-{target}.wav, 44.1 kHz
meta/esc50.csv            filename,fold,target,category,esc10,src_file,take
"""

import re

from tf_data_pipelines.datasets.lists import (
    Row,
    in_class_order,
    number_of,
    read_table,
    source_of,
)
from tf_data_pipelines.settings import check_between

LIST = "meta/esc50.csv"
COLUMNS = ("filename", "fold", "target", "category")
FOLDS = 5


def is_esc50(data):
    """Whether a folder has a list of ESC-50."""
    return (data / LIST).is_file()


def read_esc50(root, test_fold=5, validation_fold=None):
    """ESC-50 as a Source; classes in the order of their target.

    Args:
        root: pathlib.Path of the folder.
        test_fold: fold of the test clips, 1 to 5; for all five scores of the benchmark, read it
            five times.
        validation_fold: fold of the validation clips, another one; None for the fold before, which
            of fold 1 is 5.

    Raises:
        FileNotFoundError: the list, or every clip, is missing.
        ValueError: a fold is unknown, or the list is not as it was published.
    """
    if validation_fold is None:
        validation_fold = test_fold - 1 or FOLDS
    for name, fold in (("test_fold", test_fold), ("validation_fold", validation_fold)):
        check_between(name, fold, 1, FOLDS, kind=int)
    if test_fold == validation_fold:
        raise ValueError(
            f"test_fold and validation_fold are both {test_fold}; choose two different folds."
        )
    splits = {test_fold: "test", validation_fold: "validation"}
    path, targets, rows = root / LIST, {}, []
    for line, row in read_table(path, COLUMNS):
        where, name, category = f"{path} line {line}", row["filename"], row["category"]
        fold, target = (number_of(row, column, where) for column in ("fold", "target"))
        check_between(f"{where}: fold", fold, 1, FOLDS, kind=int)
        says = re.fullmatch(r"(\d)-\d+-[A-Z]-(\d+)\.wav", name)
        if not says or (int(says[1]), int(says[2])) != (fold, target):
            raise ValueError(
                f"{where}: {name!r} does not fit fold {fold} and target {target}; expected "
                f"{{fold}}-{{clip}}-{{take}}-{{target}}.wav. Download the list again."
            )
        if targets.setdefault(category, target) != target:
            raise ValueError(
                f"{where}: {category!r} has target {target}, on lines above "
                f"{targets[category]}. Download the list again."
            )
        sound = root / "audio" / name
        found = str(sound) if sound.is_file() else None
        rows.append(Row(name, found, (category,), splits.get(fold, "train")))
    return source_of(root, rows, in_class_order(targets, path))
