"""Atomic writes: a file or folder appears whole or not at all, and replaces only its own kind."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import uuid


@dataclasses.dataclass(frozen=True)
class FolderKind:
    """What tells that this program wrote a folder.

    Args:
        name: name of the kind, for messages.
        marks: tuples of file names; such a folder has all of one tuple.
        others: what else this program writes there. A folder with anything more is the user's.
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    others: tuple[str, ...] = ()

    def foreign(self, folder):
        """Why a folder is not of this kind alone; None if it is."""
        present = {path.name for path in pathlib.Path(folder).iterdir()}
        if not any(present.issuperset(mark) for mark in self.marks):
            return f"it is no {self.name}"
        more = present.difference(self.others, *self.marks)
        return f"it also holds {min(more)!r}" if more else None


RUN = FolderKind(
    "run",
    (("model.keras", "settings.json"),),
    ("labels.txt", "logs", "conversion.json", "speech", "export", "accuracy.png", "report.json"),
)
EXPORT = FolderKind(
    "export", (("serving",), ("mobile",), ("onnx",)), ("README.md", "card.json", "points.png")
)
SAVED_MODEL = FolderKind(
    "SavedModel",
    (("saved_model.pb",),),
    ("assets", "assets.extra", "variables", "fingerprint.pb"),
)


@contextlib.contextmanager
def atomic_folder(folder, overwrite=False, *, kind, inputs=(), keep_partial=False):
    """A folder that appears whole or not at all.

    Args:
        folder: path where it is to appear.
        overwrite: replace what is there if it is of the same kind; otherwise that is an error.
        kind: FolderKind of what is written.
        inputs: paths that are read; they must not lie in a folder that is replaced.
        keep_partial: build in `FOLDER.partial`, and leave it there after an interruption.

    Yields:
        pathlib.Path of the folder to write into, renamed at the end.

    Raises:
        FileExistsError: `folder` exists and must not be replaced, or `FOLDER.partial` exists.
    """
    folder = pathlib.Path(folder)
    refuse_overwrite(folder, overwrite, kind=kind, inputs=inputs)
    partial = partial_of(folder)
    if keep_partial:
        refuse_partial(folder)
    else:
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    finally:
        if not keep_partial:
            shutil.rmtree(partial, ignore_errors=True)


def atomic_write(path, content):
    """Write text or bytes to a file that appears whole or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(folder):
    """Where a folder with `keep_partial` is built."""
    folder = pathlib.Path(folder)
    return folder.with_name(folder.name + ".partial")


def refuse_partial(folder):
    """Raise FileExistsError where an interrupted training, or anything else, has the place."""
    partial = partial_of(folder)
    if partial.exists():
        raise FileExistsError(
            f"{partial} exists already: an interrupted training keeps its best weights there. "
            f"Rename it (it is a run: predict with it, or start from it), remove it, or choose "
            f"another folder than {folder}."
        )


def refuse_overwrite(path, overwrite=False, *, kind=None, inputs=()):
    """Raise FileExistsError when an output is there already and must not be replaced.

    Args:
        path: path of the output; an empty folder is free.
        overwrite: whether to replace what is there.
        kind: FolderKind of the output, if it is a folder; nothing else is replaced.
        inputs: paths that are read; they must not lie in a folder that is replaced.
    """
    path = pathlib.Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists already. Choose another place, or pass overwrite=True (--overwrite)."
        )
    reason = None
    if path.is_dir() != (kind is not None):
        reason = "it is a folder" if path.is_dir() else "it is a file"
    elif kind is not None:
        reason = kind.foreign(path)
        for one in inputs:
            if pathlib.Path(one).resolve().is_relative_to(path.resolve()):
                reason = f"{one} lies in it"
    if reason:
        raise FileExistsError(f"{path} is not replaced: {reason}. Choose another place.")
