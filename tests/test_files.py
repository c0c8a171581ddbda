"""Atomic writes: nothing half-written stays, nothing is replaced unasked."""

import contextlib
import os
import pathlib

import numpy as np
import pytest

from keras_flexast.figures import accuracy_figure
from keras_flexast.files import (
    EMBEDDINGS,
    PICTURE,
    RUN,
    atomic_folder,
    move_in,
    refuse_overwrite,
    remove_unfinished,
)
from keras_flexast.inference import FileEmbeddings, Timeline
from tf_data_pipelines.atomic import atomic_write

RUN_FILES = ("model.keras", "settings.json")


def fill(folder, text, names=RUN_FILES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(text)


def test_two_processes_do_not_write_into_one_partial_folder(tmp_path):
    writing = {"kind": RUN, "keep_partial": True}
    with atomic_folder(tmp_path / "run", **writing) as folder:
        for name in ("model.keras", "settings.json"):
            (folder / name).touch()
        busy = pytest.raises(BlockingIOError, match=r"another process writes into .*run\.partial")
        with busy, atomic_folder(tmp_path / "run", resume=True, **writing):
            pass
        assert (folder / "model.keras").exists()
    with atomic_folder(tmp_path / "run", True, **writing):  # it is free again
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, kind=RUN) as partial:
        fill(partial, "half")
        assert not out.exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []

    with atomic_folder(out, kind=RUN) as partial:
        fill(partial, "first")
    assert os.listdir(out.parent) == ["out"]

    with pytest.raises(FileExistsError, match="out exists"), atomic_folder(out, kind=RUN):
        raise AssertionError("the body must not run")
    with pytest.raises(OSError), atomic_folder(out, overwrite=True, kind=RUN):
        raise OSError
    assert (out / "model.keras").read_text() == "first"

    with atomic_folder(out, overwrite=True, kind=RUN) as partial:
        (partial / "other").write_text("second")
    assert os.listdir(out) == ["other"]


def test_what_came_while_it_was_written_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    for overwrite, message in ((False, "exists already"), (True, "it is no run")):
        with pytest.raises(FileExistsError, match=message):  # noqa: SIM117
            with atomic_folder(out, overwrite, kind=RUN) as partial:
                fill(partial, "new")
                fill(out, "mine", ["thesis.tex"])
        assert (out / "thesis.tex").read_text() == "mine"
        (out / "thesis.tex").unlink()


def test_an_unfinished_folder_can_be_kept_and_is_not_removed(tmp_path):
    out = tmp_path / "out"
    keep = {"kind": RUN, "keep_partial": True}
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, **keep) as partial:
        fill(partial, "half")
        raise KeyboardInterrupt
    kept = tmp_path / "out.partial" / "model.keras"
    assert kept.read_text() == "half"
    message = r"out\.partial exists already: an interrupted"
    with pytest.raises(FileExistsError, match=message), atomic_folder(out, **keep):
        raise AssertionError("the body must not run")
    kept.rename(tmp_path / "out.partial" / "notes.txt")
    with pytest.raises(FileExistsError, match="exists already, where"), atomic_folder(out, **keep):
        raise AssertionError("the body must not run")
    (tmp_path / "out.partial" / "notes.txt").rename(kept)
    with atomic_folder(out, kind=RUN) as partial:  # of a conversion, say
        assert not any(partial.iterdir())
    assert kept.read_text() == "half" and sorted(os.listdir(tmp_path)) == ["out", "out.partial"]


def test_a_program_that_ends_at_once_leaves_nothing_half_written(tmp_path):
    with (
        contextlib.suppress(OSError),
        atomic_folder(tmp_path / "out", kind=RUN) as partial,
    ):
        fill(partial, "half")
        remove_unfinished()
        assert os.listdir(tmp_path) == []
    remove_unfinished()  # and forgets what is done
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["thesis.tex"], "it is no run"),
        (["model.keras"], "it is no run"),
        ([*RUN_FILES, "notes.txt"], "it also holds 'notes.txt'"),
        ([*RUN_FILES, "run.partial"], "it also holds 'run.partial'"),
    ],
)
def test_only_what_this_program_wrote_is_replaced(tmp_path, names, reason):
    out = tmp_path / "out"
    fill(out, "mine", names)
    again = atomic_folder(out, overwrite=True, kind=RUN)
    with pytest.raises(FileExistsError, match=f"out is not replaced: {reason}"), again:
        raise AssertionError("the body must not run")
    assert sorted(os.listdir(out)) == sorted(names)


def test_what_is_read_is_not_replaced(tmp_path):
    out, data = tmp_path / "out", tmp_path / "out" / "speech"
    fill(out, "mine")
    data.mkdir()
    for inputs in ([data], [out], [tmp_path / "elsewhere" / ".." / "out" / "model.keras"]):
        with pytest.raises(FileExistsError, match="lies in it"):
            refuse_overwrite(out, True, kind=RUN, inputs=inputs)
    refuse_overwrite(out, True, kind=RUN, inputs=[tmp_path])


def test_an_empty_folder_is_free(tmp_path):
    refuse_overwrite(tmp_path)
    refuse_overwrite(tmp_path / "new")
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="--overwrite"):
            refuse_overwrite(taken)
    refuse_overwrite(tmp_path / "file", overwrite=True)
    for taken, kind in ((tmp_path, None), (tmp_path / "file", RUN)):
        with pytest.raises(FileExistsError, match=r"it is a (folder|file)"):
            refuse_overwrite(taken, overwrite=True, kind=kind)


@pytest.mark.parametrize("content", ["naïve", b"\x00\xff"])
def test_a_file_appears_whole_or_not_at_all(tmp_path, content, monkeypatch):
    path = tmp_path / "deep" / "file"
    atomic_write(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, "other")
    assert os.listdir(path.parent) == ["file"]
    assert path.read_bytes() != b"other"


def figure(path, title="10 clips", name="run"):
    values = {"8": 0.5, "16": 0.7}
    results = [{"name": size, "metric": "accuracy", "value": values[size]} for size in values]
    accuracy_figure({name: results}, path, title)


def embeddings(path):
    FileEmbeddings(np.ones((1, 2), "float32"), ["a.wav"]).save(path)


def timeline(prefix, classes=("low", "high"), title="a.wav"):
    starts = np.arange(4.0)
    scores = np.tile(np.eye(2, dtype="float32"), (2, 1))
    Timeline(classes, starts, starts + 1, scores, multi_label=False).write(prefix, title)


@pytest.mark.parametrize(
    ("write", "name", "kind"), [(figure, "a.png", PICTURE), (embeddings, "a.npz", EMBEDDINGS)]
)
def test_a_file_of_another_kind_is_not_replaced(tmp_path, write, name, kind):
    path = tmp_path / name
    write(path)
    write(path)  # its own kind is
    others = [b"RIFF....WAVE", b"", b"\x89PNG\r\n\x1a\n" + bytes(99), path.read_bytes()[:9]]
    for content in others:
        path.write_bytes(content)
        with pytest.raises(FileExistsError, match=f"is not replaced: it is no {kind.name}"):
            write(path)
        assert path.read_bytes() == content
    np.savez(tmp_path / "mine.npz", weights=np.ones(3))
    (tmp_path / "mine.npz").replace(path)
    with pytest.raises(FileExistsError, match="is not replaced"):
        write(path)
    with pytest.raises(ValueError, match=rf"a\.wav must end in \{kind.suffix}"):
        write(tmp_path / "a.wav")


def test_a_picture_of_other_programs_is_not_replaced(tmp_path):
    from matplotlib.figure import Figure

    Figure().savefig(tmp_path / "mine.png")
    with pytest.raises(FileExistsError, match="it is no picture that this program wrote"):
        figure(tmp_path / "mine.png")


def test_a_timeline_that_was_edited_is_not_replaced(tmp_path):
    prefix = tmp_path / "a"
    timeline(prefix)
    timeline(prefix, ("other", "names"))
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    first = picture.read_bytes()
    table.write_text(table.read_text().replace("other", "whistle"))
    with pytest.raises(FileExistsError, match=r"a\.csv is not replaced: it is no timeline"):
        timeline(prefix)
    assert "whistle" in table.read_text() and picture.read_bytes() == first
    picture.unlink()
    with pytest.raises(FileExistsError, match=r"a\.csv is not replaced"):
        timeline(prefix)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError, match=r"is a folder\. Give a name in it"):
        timeline(tmp_path / "folder")


@pytest.mark.parametrize("write", [figure, embeddings])
def test_links_folders_and_files_above_are_named(tmp_path, write):
    end = ".png" if write is figure else ".npz"
    (tmp_path / f"folder{end}").mkdir()
    (tmp_path / f"link{end}").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for name, message in (
        (f"folder{end}", "it is a folder"),
        (f"link{end}", f"it is a link to {tmp_path / 'elsewhere'}"),
        (f"file/a{end}", f"{tmp_path / 'file'} is a file"),
    ):
        with pytest.raises(OSError, match=message):
            write(tmp_path / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "runs")
    for name, message in (("run", "is a link"), ("file/run", "is a file"), ("..", "no new file")):
        with pytest.raises((OSError, ValueError), match=message):
            refuse_overwrite(tmp_path / name, True, kind=RUN)
    for name, message in ((".", r"\. names no new file or folder"), (201 * "a", "over 200 bytes")):
        with pytest.raises(ValueError, match=message):
            refuse_overwrite(name, True, kind=RUN)


@pytest.mark.parametrize("name", [r"$\frac$", "_run", "a\nb", "[/b]", "\udcff", "猫\x1b", "$" * 9])
def test_a_name_in_a_picture_is_text(tmp_path, name):
    figure(tmp_path / "a.png", title=name, name=name)
    timeline(tmp_path / "b", (name.replace("\udcff", "x"), "$x"), name)


def no_room(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    out, keep = tmp_path / "out", {"kind": RUN, "keep_partial": True}
    for error in (OSError(28, "No space left on device"), RuntimeError("No space left on device")):
        with pytest.raises(OSError, match=r"out cannot be written: No space left"):  # noqa: SIM117
            with atomic_folder(out, **keep) as partial:
                (partial / "settings.json").touch()
                raise error
        assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match=r"out\.partial holds what was whole"):  # noqa: SIM117
        with atomic_folder(out, **keep) as partial:
            fill(partial, "best")
            raise error
    assert os.listdir(tmp_path) == ["out.partial"]
    monkeypatch.setattr(os, "fsync", no_room)
    for write, name in ((figure, "a.png"), (embeddings, "a.npz")):
        with pytest.raises(OSError, match=f"{name} cannot be written: No space left on device"):
            write(tmp_path / name)
    assert os.listdir(tmp_path) == ["out.partial"]


def test_an_updated_folder_keeps_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out, "first", [*RUN_FILES, "labels.txt", ".out.00c0ffee.partial"])  # of a killed process
    (out / "logs").mkdir()
    place, logs = out.stat().st_ino, (out / "logs").stat().st_ino
    order = []
    replace = os.replace

    def noted(source, target):
        order.append(pathlib.Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    with atomic_folder(out, True, kind=RUN, update=move_in) as partial:
        fill(partial, "second")
        fill(partial / "logs", "second", ["events"])
        fill(partial / "speech", "second", ["a.wav"])
        assert (out / "model.keras").read_text() == "first"
    assert order == ["events", "speech", "model.keras", "settings.json"]  # folders first
    assert (out.stat().st_ino, (out / "logs").stat().st_ino) == (place, logs)
    assert (out / "labels.txt").read_text() == "first"
    assert (out / "model.keras").read_text() == "second"
    assert os.listdir(tmp_path) == ["out"]


def test_an_interruption_between_two_renames_keeps_the_older_folder(tmp_path, monkeypatch):
    out, replace, calls = tmp_path / "out", os.replace, []
    fill(out, "first")

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, True, kind=RUN) as partial:
        fill(partial, "second")
    assert (out / "model.keras").read_text() == "first" and os.listdir(tmp_path) == ["out"]
    with atomic_folder(out, True, kind=RUN) as partial:
        fill(partial, "second")
    assert (out / "model.keras").read_text() == "second" and os.listdir(tmp_path) == ["out"]
