"""The state of a training on disk, from which it goes on as if nothing had happened.

RUN.partial/state.npz   every variable of model, optimizer and metrics, what the callbacks carry
                        along, and facts.json: the place in the training, and what it was made of

The file is replaced whole, so a kill at any moment leaves the last state or the one before it.
"""

import hashlib
import json
import os
import time
import warnings
import zipfile

import keras
import numpy as np

from keras_flexast.files import STATE
from keras_flexast.runs import described, versions
from tf_data_pipelines.atomic import hidden
from tf_data_pipelines.settings import DataWarning

FACTS = "facts.json"
DAMAGES = (
    OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, RecursionError,
    zipfile.BadZipFile,
)  # fmt: skip
MEASURED = 1e-4  # by which the mean and std of the same sounds may differ between machines
UNCOMPARED = ("train.save_minutes",)  # a change of it changes no number


class Checkpoint(keras.callbacks.Callback):
    """Saves the state of a training after each epoch and inside long ones, and goes on from it.

    It comes after all callbacks that change what is saved. `fit` begins at `epoch`, with the
    batches from `place` on; the steps of that epoch that were done are counted, not computed.

    Args:
        path: path of the state file.
        facts: dictionary for JSON that is saved, too: what the training is made of.
        history: the History, one of the callbacks before it.
        parts: the callbacks before it. Of those with `state()`, which gives a dictionary for JSON
            and a list of arrays, and `restore(numbers, arrays)`, the state is saved, too.
        steps: batches in an epoch.
        minutes: time between two savings inside an epoch.
        saved: the content of a state file, see `read_state`; None at the beginning.
    """

    def __init__(self, path, facts, *, history, parts, steps, minutes, saved=None):
        super().__init__()
        self.path, self.facts, self.history = path, facts, history
        self.parts = [part for part in parts if hasattr(part, "restore")]
        self.steps, self.seconds = steps, minutes * 60
        self.saved = saved or {FACTS: {"place": 0, "stopped": False}}
        self.place = self.saved[FACTS]["place"]
        self.stopped = self.saved[FACTS]["stopped"]
        self.epoch = self.place // steps

    def restore(self, model):
        """Set all variables of a compiled model, and the parts; metrics follow in their epoch."""
        self.set_model(model)
        if len(self.saved) == 1:
            return
        for name, variables in self._variables().items():
            if name != "metrics":
                self._assign(name, variables)
        for number, part in enumerate(self.parts):
            part.restore(self.saved[FACTS]["parts"][number], self._arrays(f"part{number}"))
        self.history.history = {
            name: list(values) for name, values in self.saved[FACTS]["history"].items()
        }
        self.history.epoch = list(range(self.epoch))
        needed = ("metrics/", FACTS)
        self.saved = {name: one for name, one in self.saved.items() if name.startswith(needed)}

    def save(self, place, stopped=False):
        """Write the state after so many batches."""
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # inside an epoch it is not in the variables
        states = [part.state() for part in self.parts]
        facts = {
            **self.facts,
            "place": place,
            "stopped": stopped,
            "steps": self.steps,
            "history": {
                name: [float(value) for value in values]
                for name, values in self.history.history.items()
            },
            "parts": [numbers for numbers, _ in states],
        }
        groups = {f"part{number}": arrays for number, (_, arrays) in enumerate(states)}
        _write_state(self.path, facts, {**self._variables(), **groups})
        self.place, self.last = place, time.monotonic()

    def on_train_begin(self, logs=None):
        self.last = time.monotonic()
        self.history.epoch = list(range(self.epoch))

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        done = self.place - epoch * self.steps
        if done > 0:  # Keras has reset the metrics by now
            self._assign("metrics", self._variables()["metrics"])
            self._skip(done)

    def on_train_batch_end(self, batch, logs=None):
        place = self.epoch * self.steps + batch + 1
        inside = self.place < place < (self.epoch + 1) * self.steps
        if inside and time.monotonic() - self.last >= self.seconds:
            self.save(place)

    def on_epoch_end(self, epoch, logs=None):
        self.save((epoch + 1) * self.steps, stopped=self.model.stop_training)

    def _skip(self, count):
        """Let the next steps of `fit` do nothing, without taking a batch."""
        step, left = self.model.train_function, count
        logs = {name: float(value) for name, value in self.model.get_metrics_result().items()}

        def skipped(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                self.model.train_function = step
            return (logs, arguments[0]) if keras.backend.backend() == "jax" else logs

        self.model.train_function = skipped

    def _variables(self):
        model = self.model
        return {
            "trainable": model.trainable_variables,
            "fixed": model.non_trainable_variables,
            "optimizer": model.optimizer.variables,
            "metrics": model.metrics_variables,
        }

    def _arrays(self, name):
        return [self.saved[f"{name}/{n}"] for n in range(self.saved[FACTS]["counts"][name])]

    def _assign(self, name, variables):
        for variable, value in zip(variables, self._arrays(name), strict=True):
            variable.assign(value)


def _write_state(path, facts, groups):
    """Write {name: list of variables or arrays} and facts, one array after the other."""
    partial = hidden(path)
    facts = {**facts, "counts": {name: len(values) for name, values in groups.items()}}
    try:
        with open(partial, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                for name, values in groups.items():
                    for number, value in enumerate(values):
                        value = keras.ops.convert_to_numpy(value)
                        with archive.open(f"{name}/{number}.npy", "w", force_zip64=True) as entry:
                            np.lib.format.write_array(entry, value, allow_pickle=False)
                archive.writestr(FACTS, json.dumps(facts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_state(folder):
    """What a training saved in a folder: {name: array}, and {FACTS: dictionary}.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / STATE
    try:
        with np.load(path, allow_pickle=False) as archive:
            saved = {name: archive[name] for name in archive.files if name != FACTS}
            return {**saved, FACTS: json.loads(archive[FACTS])}
    except DAMAGES as error:
        raise ValueError(
            f"{path} is damaged: {described(error)}. Start another training from {folder} (--init)."
        ) from error


def read_facts(folder):
    """The facts of `read_state` alone, without its arrays."""
    try:
        with zipfile.ZipFile(folder / STATE) as archive:
            return json.loads(archive.read(FACTS))
    except DAMAGES as error:
        raise ValueError(
            f"{folder / STATE} is damaged: {described(error)}. Start another training from "
            f"{folder} (--init)."
        ) from error


def data_facts(data):
    """What tells whether data are the same: a dictionary for JSON.

    Args:
        data: ScannedSource with training and validation clips.
    """
    facts = {
        "classes": list(data.source.classes),
        "multi_label": data.source.multi_label,
        "mean": float(data.mean),
        "std": float(data.std),
    }
    for split in ("train", "validation"):
        part = data.split(split)
        clips, digest = part.source.clips, hashlib.sha256()
        if hasattr(clips, "keys"):  # prepared
            keys, labels = clips.keys(), np.concatenate([clips.labels, clips.ends])
            weights = clips.weights
        else:
            names = [clip.name for clip in clips]
            start = len(os.path.commonprefix([min(names), max(names)]))  # noqa: RUF071 data may move
            text = "\n".join(name[start:] for name in names)
            keys = np.frombuffer(text.encode(errors="replace"), "uint8")
            labels = [one for clip in clips for one in (len(clip.labels), *clip.labels)]
            weights = [clip.weight for clip in clips]
        for array in (
            keys, np.asarray(labels, "int64"),
            *(np.asarray(one, "float64") for one in (part.durations, weights)),
        ):  # fmt: skip
            digest.update(np.ascontiguousarray(array).tobytes())
        facts[split] = {"clips": len(clips), "digest": digest.hexdigest()}
    return facts


def check_recipe(facts, recipe):
    """Raise a ValueError that names the option which is not as a training began with.

    Other versions are a warning: they may change numbers in the last places.

    Args:
        facts: those of its state.
        recipe: dictionary of the Recipe to go on with.
    """
    began, now = facts["versions"], versions()
    if began["backend"] != now["backend"]:
        raise ValueError(
            f"resume=True cannot go on with {now['backend']}: the training began with "
            f"{began['backend']}. Set KERAS_BACKEND={began['backend']}."
        )
    old, new = _flat(facts["recipe"]), _flat(json.loads(json.dumps(recipe)))
    for name in sorted(old | new):
        if old.get(name) != new.get(name) and name not in UNCOMPARED:
            raise ValueError(
                f"{name.rpartition('.')[2]}={new.get(name)!r} is not {old.get(name)!r}, with which "
                f"the training began. Leave it and --recipe out, or begin another training "
                f"without --resume."
            )
    changed = [
        f"{name} {began.get(name)} to {one}" for name, one in now.items() if began.get(name) != one
    ]
    if changed:
        warnings.warn(
            f"since the training began, versions changed: {', '.join(changed)}. It goes on, but "
            f"its numbers may differ in the last places from those of an unbroken one.",
            DataWarning,
            stacklevel=3,
        )


def check_teacher(facts, teacher):
    """Raise a ValueError where the teacher of a training, which was in memory, is not given again.

    Args:
        facts: those of its state.
        teacher: Run to go on with, or None.
    """
    if teacher is None and facts["run"]["made_by"].get("teacher"):
        raise ValueError(
            "teacher=None is not what the training began with, a Run in memory. Give it again."
        )


def check_data(facts, data):
    """Raise a ValueError that says how data differ from those that a training began with.

    Args:
        facts: those of its state.
        data: `data_facts` of the data to go on with.
    """
    reason = _other_data(facts["data"], data)
    if reason:
        raise ValueError(
            f"resume=True needs the data that the training began with: {reason}. Give that data, "
            f"or begin another training without --resume."
        )


def _flat(settings, prefix=""):
    """{"train": {"epochs": 3}} -> {"train.epochs": 3}"""
    flat = {}
    for name, value in settings.items():
        inner = isinstance(value, dict)
        flat.update(_flat(value, f"{prefix}{name}.") if inner else {prefix + name: value})
    return flat


def _other_data(old, new):
    """How two `data_facts` differ, in words; None if they do not."""
    if old["classes"] != new["classes"]:
        return "its classes are others"
    if old["multi_label"] != new["multi_label"]:
        return "its clips have one label where they had several, or the other way round"
    for split in ("train", "validation"):
        before, now = old[split], new[split]
        if before["clips"] != now["clips"]:
            return f"it had {before['clips']:,} {split} clips, now {now['clips']:,}"
        if before["digest"] != now["digest"]:
            return f"the names, labels, lengths or weights of its {split} clips are others"
    if any(abs(old[name] - new[name]) > MEASURED for name in ("mean", "std")):
        return "the sound in its clips is another"
    return None
