"""Atomic writes: nothing half-written stays, nothing is replaced unasked."""

import os

import pytest

from keras_flexast.files import RUN, atomic_folder, atomic_write, refuse_overwrite

RUN_FILES = ("model.keras", "settings.json")


def fill(folder, text, names=RUN_FILES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(text)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, kind=RUN) as partial:
        fill(partial, "half")
        assert not out.exists()
        raise KeyboardInterrupt
    assert os.listdir(out.parent) == []

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
    with atomic_folder(out, kind=RUN) as partial:  # of a conversion, say
        assert not any(partial.iterdir())
    assert kept.read_text() == "half" and sorted(os.listdir(tmp_path)) == ["out", "out.partial"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["thesis.tex"], "it is no run"),
        (["model.keras"], "it is no run"),
        ([*RUN_FILES, "notes.txt"], "it also holds 'notes.txt'"),
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
