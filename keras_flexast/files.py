"""Atomic writes: a file or folder appears whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid


@contextlib.contextmanager
def atomic_folder(folder, overwrite=False, keep_partial=False):
    """A folder that appears whole or not at all.

    Args:
        folder: path where it is to appear.
        overwrite: replace what is there; otherwise that is an error.
        keep_partial: after an interruption leave the unfinished folder, `FOLDER.partial`.

    Yields:
        pathlib.Path of the folder to write into, renamed at the end.

    Raises:
        FileExistsError: `folder` exists and overwrite is False.
    """
    folder = pathlib.Path(folder)
    refuse_overwrite(folder, overwrite)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
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


def refuse_overwrite(path, overwrite=False):
    """Raise FileExistsError when an output is already there (an empty folder is free)."""
    path = pathlib.Path(path)
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not overwrite:
        raise FileExistsError(
            f"{path} exists already. Choose another place, or pass overwrite=True (--overwrite)."
        )
