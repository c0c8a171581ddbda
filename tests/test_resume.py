"""A training that was killed goes on, and ends as if it had not been."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile

import keras
import numpy as np
import pytest
from helpers import ONCE, ROOT, write_tones

from keras_flexast import checkpoints
from keras_flexast.files import STATE
from keras_flexast.runs import load_run, versions
from keras_flexast.settings import TrainSettings
from keras_flexast.training import train_run
from tf_data_pipelines import read_data
from tf_data_pipelines.settings import DataWarning, FbankSettings

STEPS = 2  # in an epoch
SETTINGS = TrainSettings(
    2, 1e-2, batch_tokens=64, row_length=64, segments=2, ema=0.5, save_minutes=1e-9, patience=9
)
HOW = {
    "settings": SETTINGS,
    "patch_sizes": (16, 32),
    "model_options": {"size": None, "dim": 16, "depth": 1, "num_heads": 2, "dropout": 0.1},
}
KILLED = """
    import os, signal, sys
    sys.path.insert(0, "tests")
    from keras_flexast.checkpoints import Checkpoint
    from keras_flexast.training import train_run
    from test_resume import HOW
    save = Checkpoint.save
    def save_and_die(self, place, **more):
        save(self, place, **more)
        if place == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    Checkpoint.save = save_and_die
    train_run(sys.argv[1], sys.argv[2], **HOW)
"""


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="module")
def killed(sounds, tmp_path_factory):
    """What a training leaves that was killed inside its first epoch."""
    out = tmp_path_factory.mktemp("killed") / "run"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), sounds, out],
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend(), "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    return out.with_name("run.partial")


@pytest.fixture
def partial(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "run.partial")


def place_of(partial):
    return checkpoints.read_facts(partial)["place"]


def fail_at(monkeypatch, owner, name, *, at, error):
    """Raise an error in the `at`th call of a method, after it has done its work."""
    method, calls = getattr(owner, name), []

    def failing(*arguments, **more):
        calls.append(name)
        method(*arguments, **more)
        if len(calls) == at:
            raise error

    monkeypatch.setattr(owner, name, failing)


def test_a_killed_training_ends_as_an_unbroken_one(sounds, partial, tmp_path, monkeypatch):
    unbroken, history = train_run(sounds, tmp_path / "unbroken", **HOW)
    assert history.params["steps"] == STEPS and history.epoch == [0, 1]

    assert place_of(partial) == 1
    load_run(partial)  # it is a run all along
    (partial / f".{STATE}.00c0ffee.partial").touch()  # what a kill left of the next state
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        fail_at(patch, checkpoints.Checkpoint, "on_epoch_end", at=1, error=full)
        with pytest.raises(OSError, match=r"No space left.* was whole before\. .*--resume goes on"):
            train_run(sounds, tmp_path / "run", resume=True, **HOW)
    assert place_of(partial) == STEPS and not list(partial.glob(".*"))

    run, again = train_run(sounds, tmp_path / "run", resume=True)
    assert again.history == history.history and again.epoch == history.epoch
    for ours, theirs in zip(run.model.get_weights(), unbroken.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    names = {"model.keras", "settings.json", "labels.txt", "history.json", "logs"}
    assert set(os.listdir(tmp_path / "run")) == names and not partial.exists()
    texts = [(tmp_path / name / "settings.json").read_text() for name in ("run", "unbroken")]
    assert texts[0] == texts[1]


def test_a_training_goes_on_with_its_own_data_and_options_only(sounds, partial, tmp_path):
    def refused(message, data=sounds, kind=ValueError, out="run", **options):
        with pytest.raises(kind, match=message):
            train_run(data, tmp_path / out, resume=True, **options)
        assert place_of(partial) == 1

    refused(r"nothing to go on with: .*new\.partial does not exist", kind=OSError, out="new")
    more = dataclasses.replace(SETTINGS, epochs=3)
    refused("epochs=3 is not 2, with which the training began", settings=more)
    refused(r"patch_sizes=\[\[16, 16\]\] is not \[\[16, 16\], \[32, 32\]\]", patch_sizes=[16])
    refused("dim=32 is not 16", model_options={**HOW["model_options"], "dim": 32})
    moved = shutil.copytree(sounds, tmp_path / "moved")
    (moved / "low" / "0.wav").rename(moved / "high" / "0.wav")
    refused("the names, labels, lengths or weights of its train", data=moved)
    shutil.rmtree(moved)
    write_tones(shutil.copytree(sounds, moved), clips=12)
    refused("it had 4 train clips, now 8", data=moved)


def test_a_training_goes_on_with_its_own_backend(sounds, partial, tmp_path, monkeypatch):
    other = {**versions(), "backend": "torch"}
    monkeypatch.setattr(checkpoints, "versions", lambda: other)
    with pytest.raises(ValueError, match="resume=True cannot go on with torch: the training began"):
        train_run(sounds, tmp_path / "run", resume=True)
    facts = checkpoints.read_facts(partial)
    monkeypatch.setattr(checkpoints, "versions", lambda: {**versions(), "keras": "9.9"})
    with pytest.warns(DataWarning, match=r"versions changed: keras .* to 9\.9"):
        checkpoints.check_recipe(facts, facts["recipe"])


def test_what_cannot_be_gone_on_with_is_named(sounds, partial, tmp_path):
    (partial / STATE).write_bytes((partial / STATE).read_bytes()[:99])
    with pytest.raises(ValueError, match=r"state\.npz is damaged: BadZipFile"):
        train_run(sounds, tmp_path / "run", resume=True)
    (partial / STATE).unlink()
    with pytest.raises(FileExistsError, match=r"resume=True finds no state\.npz in .*, only other"):
        train_run(sounds, tmp_path / "run", resume=True)
    shutil.move(partial, tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"nothing to go on with\.$"):
        train_run(sounds, tmp_path / "run", resume=True)
    (tmp_path / "run" / STATE).write_text("of a renamed partial, or of a killed process")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(FileExistsError, match=r"If it is run\.partial under another name, rename"):
        train_run(sounds, tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in files}


@ONCE
def test_what_a_state_cannot_hold_is_named(partial, tmp_path, sounds):
    facts = checkpoints.read_facts(partial)
    with pytest.raises(ValueError, match="teacher=None is not what the training began with"):
        checkpoints.check_teacher({"run": {"made_by": {"teacher": {"name": None}}}}, None)
    checkpoints.check_teacher(facts, None)
    data = read_data(sounds, FbankSettings())
    clips = [dataclasses.replace(clip, weight=2.0) for clip in data.source.clips]
    source = dataclasses.replace(data.source, clips=tuple(clips))
    known = checkpoints.data_facts(dataclasses.replace(data, source=source))
    with pytest.raises(ValueError, match="lengths or weights of its train clips are others"):
        checkpoints.check_data({"data": checkpoints.data_facts(data)}, known)
    with zipfile.ZipFile(partial / STATE, "w") as archive:
        archive.writestr("facts.json", "[" * 100_000)
    with pytest.raises(ValueError, match=r"state\.npz is damaged: RecursionError"):
        checkpoints.read_facts(partial)


@ONCE
def test_a_state_is_replaced_whole(tmp_path, monkeypatch):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    path, arrays = tmp_path / STATE, {"trainable": [np.arange(3)]}
    checkpoints._write_state(path, {"place": 1}, arrays)
    monkeypatch.setattr(checkpoints.os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        checkpoints._write_state(path, {"place": 2}, arrays)
    assert os.listdir(tmp_path) == [STATE]
    saved = checkpoints.read_state(tmp_path)
    assert saved["facts.json"]["place"] == 1 and saved["trainable/0"].tolist() == [0, 1, 2]


def test_a_state_says_what_it_belongs_to(killed):
    with zipfile.ZipFile(killed / STATE) as archive:
        facts = json.loads(archive.read("facts.json"))
    assert facts["recipe"]["train"]["epochs"] == 2 and facts["steps"] == STEPS
    assert facts["data"]["classes"] == ["high", "low"] and facts["data"]["train"]["clips"] == 4
