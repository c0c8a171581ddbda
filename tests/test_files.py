"""Atomic writes: nothing half-written stays, nothing is replaced unasked."""

import os

import pytest

from keras_flexast.files import atomic_folder, atomic_write, refuse_overwrite


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), atomic_folder(out) as partial:
        (partial / "file").write_text("half")
        assert not out.exists()
        raise KeyboardInterrupt
    assert os.listdir(out.parent) == []

    with atomic_folder(out) as partial:
        (partial / "file").write_text("first")
    assert os.listdir(out.parent) == ["out"]

    with pytest.raises(FileExistsError, match="out exists already"), atomic_folder(out):
        raise AssertionError("the body must not run")
    with pytest.raises(OSError), atomic_folder(out, overwrite=True):
        raise OSError
    assert (out / "file").read_text() == "first"

    with atomic_folder(out, overwrite=True) as partial:
        (partial / "other").write_text("second")
    assert os.listdir(out) == ["other"]


def test_an_unfinished_folder_can_be_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, keep_partial=True) as partial:
        (partial / "file").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out.partial" / "file").read_text() == "half"
    with atomic_folder(out) as partial:
        assert not any(partial.iterdir())
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_free(tmp_path):
    refuse_overwrite(tmp_path)
    refuse_overwrite(tmp_path / "new")
    (tmp_path / "file").touch()
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileExistsError, match="--overwrite"):
            refuse_overwrite(taken)
        refuse_overwrite(taken, overwrite=True)


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
