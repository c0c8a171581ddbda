"""Published data sets as they lie on a disk after the download: clips, classes and splits.

`LAYOUTS` is the table. Each reader takes the folder and gives a Source; it opens lists, but no
sound file. To add a data set, write a module like these and one line of the table.
"""

import functools
import warnings

from tf_data_pipelines.datasets.ast_manifest import is_ast, read_ast
from tf_data_pipelines.datasets.audioset import is_audioset, read_audioset
from tf_data_pipelines.datasets.epic_sounds import is_epic_sounds, read_epic_sounds
from tf_data_pipelines.datasets.esc50 import is_esc50, read_esc50
from tf_data_pipelines.datasets.lists import has_class_folders
from tf_data_pipelines.datasets.speech_commands import is_speech_commands, read_speech_commands
from tf_data_pipelines.datasets.vggsound import is_vggsound, read_vggsound
from tf_data_pipelines.datasets.voxceleb1 import is_voxceleb1, read_voxceleb1
from tf_data_pipelines.settings import DataWarning, check_choice

LAYOUTS = {  # name: (whether data has its lists, its reader); None for what has to be asked for
    "esc50": (is_esc50, read_esc50),
    "esc50-fold1": (None, functools.partial(read_esc50, test_fold=1)),
    "esc50-fold2": (None, functools.partial(read_esc50, test_fold=2)),
    "esc50-fold3": (None, functools.partial(read_esc50, test_fold=3)),
    "esc50-fold4": (None, functools.partial(read_esc50, test_fold=4)),
    "esc50-fold5": (None, functools.partial(read_esc50, test_fold=5)),
    "speech-commands": (is_speech_commands, read_speech_commands),
    "audioset": (is_audioset, read_audioset),
    "vggsound": (is_vggsound, read_vggsound),
    "voxceleb1": (is_voxceleb1, read_voxceleb1),
    "epic-sounds": (is_epic_sounds, read_epic_sounds),
    "ast": (is_ast, read_ast),
}

OWN_FOLDERS = ("speech-commands",)  # whose sounds lie in class folders as they were published

__all__ = [
    "LAYOUTS",
    "layout_of",
    "read_ast",
    "read_audioset",
    "read_epic_sounds",
    "read_esc50",
    "read_layout",
    "read_speech_commands",
    "read_vggsound",
    "read_voxceleb1",
]


def layout_of(data):
    """Name of the layout of a folder or file, told from the lists in it; None for any other.

    A folder with class folders is the user's own, whatever lists lie in it; then a warning says so.

    Args:
        data: pathlib.Path of a folder or file that exists.

    Raises:
        ValueError: it has the lists of several data sets.
    """
    found = [name for name, (has_lists, _) in LAYOUTS.items() if has_lists and has_lists(data)]
    if len(found) > 1:
        raise ValueError(
            f"{data} has the lists of several data sets: {', '.join(found)}. Choose one with "
            f"layout={found[0]!r} (`flexast prepare --layout {found[0]}`), or move the others away."
        )
    (name,) = found or (None,)
    if name not in (None, *OWN_FOLDERS) and data.is_dir() and has_class_folders(data):
        warnings.warn(
            f"{data} has the lists of {name}, but also folders named as classes: their names are "
            f"the classes, and the lists are not read. If they are none, give layout={name!r} "
            f"(`flexast prepare --layout {name}`), or move the lists away.",
            DataWarning,
            stacklevel=3,
        )
        return None
    return name


def read_layout(data, layout):
    """The Source of a data set of a known layout.

    Args:
        data: pathlib.Path of the folder (of "ast" also of a .json file).
        layout: one of LAYOUTS.

    Raises:
        FileNotFoundError: a list, or every clip of the lists, is missing.
        ValueError: the layout is unknown, or a list is not as it was published.
    """
    check_choice("layout", layout, LAYOUTS)
    return LAYOUTS[layout][1](data)
