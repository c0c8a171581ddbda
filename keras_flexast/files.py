"""Atomic writes: a file or folder appears whole or not at all, and replaces only its own kind."""

import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable

from tf_data_pipelines.atomic import PARTIAL, hidden

SOFTWARE = "keras-flexast"  # as pictures name what wrote them
STATE = "state.npz"  # in the folder of an unfinished training: what it goes on from
LONGEST_NAME = 200  # bytes of 255; while it is written, a file or folder has a longer name
RESUME_HINT = " The same command with --resume goes on."
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))  # in the words of every library


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

    def is_whole(self, folder):
        """Whether a folder is there, with all that tells this kind."""
        return any(all(pathlib.Path(folder, n).exists() for n in mark) for mark in self.marks)

    def foreign(self, path):
        """Why a path is not a folder of this kind alone; None if it is."""
        if not path.is_dir():
            return "it is a file"
        if not self.is_whole(path):
            return f"it is no {self.name}"
        more = _content(path).difference(self.others, *self.marks)
        return f"it also holds {min(more)!r}" if more else None


@dataclasses.dataclass(frozen=True)
class FileKind:
    """What tells that this program wrote a file.

    Args:
        name: name of the kind, for messages.
        suffix: ending of the names of such files.
        is_ours: function of the file's path: whether this program wrote it as it is.
    """

    name: str
    suffix: str
    is_ours: Callable[[pathlib.Path], bool]

    def foreign(self, path):
        """Why a path is not a file of this kind; None if it is."""
        if path.is_dir():
            return "it is a folder"
        ours = path.is_file() and self.is_ours(path)
        return None if ours else f"it is no {self.name} that this program wrote"


def _is_our_picture(path):
    with open(path, "rb") as file:
        start = file.read(1024)
    return start.startswith(b"\x89PNG\r\n") and f"Software\0{SOFTWARE}".encode() in start


def _are_our_embeddings(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return sorted(archive.namelist()) == ["embeddings.npy", "files.npy"]


RUN = FolderKind(
    "run",
    (("model.keras", "settings.json"),),
    (
        "labels.txt",
        "history.json",
        "logs",
        "conversion.json",
        "speech",
        "export",
        "accuracy.png",
        "report.json",
        STATE,
    ),
)
EXPORT = FolderKind(
    "export",
    (("serving",), ("mobile",), ("onnx",), ("mediapipe",)),
    ("README.md", "card.json", "points.png"),
)
PRESET = FolderKind(
    "KerasHub preset",
    (("config.json", "task.json"),),
    (
        "README.md",
        "audio_converter.json",
        "metadata.json",
        "model.weights.h5",
        "model.weights.json",  # of large models, in parts
        *(f"model_{number:05}.weights.h5" for number in range(100)),
        "preprocessor.json",
        "task.weights.h5",
    ),
)
SAVED_MODEL = FolderKind(
    "SavedModel",
    (("saved_model.pb",),),
    ("assets", "assets.extra", "variables", "fingerprint.pb"),
)
PICTURE = FileKind("picture", ".png", _is_our_picture)
EMBEDDINGS = FileKind("file of embeddings", ".npz", _are_our_embeddings)


_partials: list[tuple[FolderKind, pathlib.Path]] = []  # (kind, path) of what `atomic_folder` keeps
_unfinished: list[pathlib.Path] = []  # paths of what it is writing, and does not keep


@contextlib.contextmanager
def atomic_folder(
    folder, overwrite=False, *, kind, inputs=(), keep_partial=False, resume=False, update=None
):
    """A folder that appears whole or not at all.

    Args:
        folder: path where it is to appear.
        overwrite: replace what is there if it is of the same kind; otherwise that is an error.
        kind: FolderKind of what is written.
        inputs: paths that are read; they must not lie in a folder that is replaced.
        keep_partial: build in `FOLDER.partial`, and leave it there after an interruption once
            it is whole; `kept_partials` lists it then.
        resume: go on in the `FOLDER.partial` that is there, without what a killed process was
            writing.
        update: function of the new folder and of the one that is there already, which moves
            the new content into the old folder; both lie in one file system. None replaces
            the old folder whole.

    Yields:
        pathlib.Path of the folder to write into, renamed at the end.

    Raises:
        FileExistsError: `folder` exists and must not be replaced, or `FOLDER.partial` exists.
        BlockingIOError: another process writes into the `FOLDER.partial` to go on in.
        OSError: there is no room; whatever library noticed it, the message names the folder.
    """
    folder = pathlib.Path(folder)
    refuse_overwrite(folder, overwrite, kind=kind, inputs=inputs)
    partial = partial_of(folder)
    if keep_partial and not resume:
        refuse_partial(folder)
    elif not keep_partial:
        # Inside a folder that is updated: it may be a mount of its own.
        partial = hidden(folder / folder.name if update and folder.exists() else folder)
    missing = [parent for parent in folder.parents if not parent.exists()]
    partial.mkdir(parents=True, exist_ok=resume)
    lock = _locked(partial) if keep_partial else None
    for leftover in [path for path in partial.iterdir() if _is_leftover(path.name)]:
        leftover.unlink()
    if keep_partial:
        _partials.append((kind, partial))
    else:
        _unfinished.append(partial)
    try:
        yield partial
        refuse_overwrite(folder, overwrite, kind=kind, inputs=inputs)  # hours may have passed
        if folder.exists() and update:
            update(partial, folder)
        else:
            _swap(partial, folder)
    except BaseException as error:
        kept = keep_partial and partial.is_dir() and kind.is_whole(partial)
        if not kept:
            shutil.rmtree(partial, ignore_errors=True)
        for reason in FULL:
            if reason in str(error):
                so_far = f" {partial} holds what was whole before." if kept else ""
                so_far += RESUME_HINT if kept and (partial / STATE).exists() else ""
                raise OSError(
                    f"{folder} cannot be written: {reason}. Make room, or choose another "
                    f"place.{so_far}"
                ) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
        if not keep_partial:
            shutil.rmtree(partial, ignore_errors=True)
            _unfinished.remove(partial)
        for parent in missing:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def _locked(folder):
    """A folder opened for this process alone, a file descriptor; None where no system locks it."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise BlockingIOError(
            f"another process writes into {folder}. Wait for it, or choose another place."
        ) from None
    return lock


def _swap(new, folder):
    """Put a new folder in its place; the older one is removed after that, or comes back."""
    if not folder.exists():
        os.replace(new, folder)
        return
    aside = hidden(folder)
    os.replace(folder, aside)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def move_in(source, target):
    """Move what one folder holds into another; every file, and every folder that is new, whole.

    Folders go before the files beside them, because a file may tell of the folders. Both lie in
    one file system.
    """
    for path in sorted(source.iterdir(), key=lambda path: (path.is_file(), path.name)):
        place = target / path.name
        if path.is_dir() and place.is_dir():
            move_in(path, place)
        else:
            os.replace(path, place)


def remove_unfinished():
    """Remove what `atomic_folder` has not finished and does not keep; the program ends now."""
    for partial in _unfinished:
        shutil.rmtree(partial, ignore_errors=True)


def kept_partials():
    """The unfinished folders that this process has left, a list of pathlib.Path."""
    return [partial for kind, partial in _partials if kind.is_whole(partial)]


def partial_of(folder):
    """Where a folder with `keep_partial` is built."""
    folder = pathlib.Path(folder)
    return folder.with_name(folder.name + PARTIAL)


def resumable(folder):
    """Whether `folder`'s partial holds the state of a training; else nothing in it is whole yet.

    Raises:
        FileNotFoundError: there is no partial folder.
        FileExistsError: the folder itself is whole, or its partial is not that of a training
            which this program can go on with.
    """
    folder, partial = pathlib.Path(folder), partial_of(folder)
    if not partial.exists():
        if RUN.is_whole(folder):
            renamed = (
                f" If it is {partial.name} under another name, rename it to that to go on."
                if (folder / STATE).exists()  # or of a process that was killed at the very end
                else ""
            )
            raise FileExistsError(
                f"{folder} is whole already: there is nothing to go on with.{renamed}"
            )
        raise FileNotFoundError(
            f"resume=True finds nothing to go on with: {partial} does not exist. Leave it out to "
            f"begin."
        )
    if (partial / STATE).exists():
        return True
    if partial.is_dir() and not _content(partial):
        return False
    raise FileExistsError(
        f"resume=True finds no {STATE} in {partial}, only other files. Rename the folder and begin "
        f"anew; a run with its weights can start another (--init)."
    )


def _content(folder):
    """Names in a folder, without what a killed process was writing, see `hidden`."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if not _is_leftover(name)}


def _is_leftover(name):
    """Whether a killed process was writing what has this name, see `hidden`."""
    return name.startswith(".") and PARTIAL in name


def refuse_partial(folder):
    """Raise FileExistsError where an interrupted training, or anything else, has the place."""
    partial = partial_of(folder)
    if (partial / "model.keras").exists():
        raise FileExistsError(
            f"{partial} exists already: an interrupted training keeps its best weights there. Go "
            f"on with it (--resume), rename it (it is a run: predict with it, or start from it), "
            f"remove it, or choose another folder than {folder}."
        )
    if partial.exists():
        raise FileExistsError(
            f"{partial} exists already, where the run would be written until it is whole. Rename "
            f"it, or choose another folder than {folder}."
        )


def refuse_overwrite(path, overwrite=False, *, kind=None, inputs=()):
    """Raise where an output cannot be written or must not be replaced, before the work begins.

    Args:
        path: path of the output; an empty folder is free.
        overwrite: whether to replace what is there.
        kind: FolderKind or FileKind of the output; nothing else is replaced. None is any file.
        inputs: paths that are read; they must not lie in a folder that is replaced.

    Raises:
        FileExistsError: something is there that must stay.
        ValueError: the path has no name, too long a name, or another ending than the kind's.
        NotADirectoryError, PermissionError: nothing can be written there.
    """
    path = pathlib.Path(path)
    if path.name in ("", ".."):
        raise ValueError(
            f"{path} names no new file or folder. Give a name, such as {path / 'out'}."
        )
    if isinstance(kind, FileKind) and path.suffix.lower() != kind.suffix:
        raise ValueError(f"{path} must end in {kind.suffix}: it becomes a {kind.name}.")
    _check_place(path)
    if path.is_symlink():
        raise FileExistsError(
            f"{path} is not replaced: it is a link to {os.readlink(path)}. Give that path itself, "
            f"or another one."
        )
    if not path.exists():
        return
    if path.is_dir() and not isinstance(kind, FileKind) and not _content(path):
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists already. Choose another place, or pass overwrite=True (--overwrite)."
        )
    reason = "it is a folder" if path.is_dir() else None
    if kind is not None:
        reason = kind.foreign(path)
    for one in inputs:
        if pathlib.Path(one).resolve().is_relative_to(path.resolve()):
            reason = reason or f"{one} lies in it"
    if reason:
        raise FileExistsError(f"{path} is not replaced: {reason}. Choose another place.")


def _check_place(path):
    """Raise unless the nearest folder above a path that exists can be written into."""
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ValueError(f"{path} has a name of over {LONGEST_NAME} bytes. Give a shorter one.")
    above = next(one for one in path.absolute().parents if one.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {above} is a file.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {above} may not be written into.")
