"""Names of the classes: the user's, from a list, a number or a file, or the checkpoint's."""

import collections
import csv
import os
import pathlib

from tf_data_pipelines.settings import check_names, check_positive


def read_classes(classes):
    """Read what names the classes.

    Args:
        classes: names; their number; path of a file, one name a line or a .csv with the
            column display_name; or None.

    Returns:
        tuple of names, a number, or None.

    Raises:
        ValueError: the file is missing, damaged or empty, or a name stands twice.
    """
    if isinstance(classes, str) and classes.isdigit():  # as the command line gives it
        classes = int(classes)
    if classes is None:
        return None
    if isinstance(classes, int):
        check_positive("classes", classes, int)
        return classes
    origin = "classes"
    if isinstance(classes, (str, os.PathLike)):
        origin, classes = os.fspath(classes), _names_in_file(pathlib.Path(classes))
    names = tuple(map(str, classes))
    if not names:
        raise ValueError(f"{origin} holds no names; expected at least one.")
    check_names(origin, names)
    counts = collections.Counter(names)
    twice = ", ".join(repr(name) for name in counts if counts[name] > 1)
    if twice:
        raise ValueError(f"{origin} holds {twice} more than once; expected different names.")
    return names


def _names_in_file(path):
    if not path.is_file():
        raise ValueError(f"classes={os.fspath(path)!r} is neither a number nor a file.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix != ".csv":
                return [line.strip() for line in file if line.strip()]
            names = [row["display_name"] for row in csv.DictReader(file)]
    except KeyError:
        raise ValueError(f"{path} has no column display_name.") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a file of class names: {error}.") from error
    if None in names:
        raise ValueError(f"{path}: row {names.index(None) + 1} has no display_name.")
    return names


def fit_classes(parts, checkpoint, classes):
    """The names of a model's classes, and whether its published head fits them.

    Args:
        parts: ModelParts; a head that does not fit is taken away from its weights.
        checkpoint: Checkpoint.
        classes: tuple of names, a number, or None for the checkpoint's own.

    Returns:
        tuple of names, and {"head": reason} if the head does not fit, else {}.

    Raises:
        ValueError: neither the user nor the checkpoint gives classes.
    """
    published = parts.classes
    if isinstance(classes, int):
        classes = None if classes == published else tuple(f"class {i}" for i in range(classes))
    if classes is not None:
        if published in (None, len(classes)):
            return classes, {}
        del parts.weights["head"]
        return classes, {"head": f"{len(classes)} classes instead of the checkpoint's {published}"}
    if published is None:
        raise ValueError(
            f"{checkpoint.origin} has no classifier. Give classes= (--classes), the names or the "
            f"number of the classes, for a new one."
        )
    labels = checkpoint.config.get("id2label")
    if labels is None:
        return tuple(f"class {index}" for index in range(published)), {}
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    check_names(checkpoint.origin, names)
    return names, {}
