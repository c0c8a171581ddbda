"""A run: a packed model with everything that is needed to use it, in memory and on disk.

RUN/model.keras     the packed model
RUN/settings.json   how a waveform becomes tokens, the classes, and how the run was made
RUN/labels.txt      one class a line, in the order of the scores
RUN/history.json    {metric: values of all epochs} of a training
"""

import dataclasses
import json
import os
import pathlib
import platform
import sys
import warnings
import zipfile
from collections.abc import Sequence
from typing import Self

import keras
import numpy as np

from keras_flexast.hints import Tensor
from keras_flexast.models import PackedAST
from keras_flexast.settings import VERSION
from tf_data_pipelines.atomic import PARTIAL, atomic_write, hidden
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.settings import (
    SHARES,
    DataWarning,
    FbankSettings,
    PackSettings,
    PatchSettings,
    check_flag,
    check_positive,
    checked_shares,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A packed model with everything that is needed to use it, which fits the model.

    Args:
        model: PackedAST.
        fbank: FbankSettings, with the training data's mean and std.
        patches: PatchSettings of the training.
        packing: PackSettings of the training.
        classes: class names in the order of the model's outputs.
        multi_label: whether a clip may have several classes: scores are sigmoid, else softmax.
        clip_seconds: length of the longest training clip, at most what fbank hears of it; what an
            export of fixed length defaults to.
        shares: shares of validation and test clips that were drawn where the training data has
            no splits, so that the same clips are drawn again.
        made_by: how the run was made: what the user chose, the name of the data, versions.
            A dictionary for JSON. Only `seed` and a training that goes on read it.

    Raises:
        ValueError: a setting is of the wrong kind, or does not fit the model; the message names
            it, what came and what was expected.
    """

    model: PackedAST
    fbank: FbankSettings
    _: dataclasses.KW_ONLY
    patches: PatchSettings
    packing: PackSettings
    classes: Sequence[str]
    multi_label: bool = False
    clip_seconds: float = 10.0
    shares: tuple = SHARES
    made_by: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        names = self.classes
        if not isinstance(names, tuple | list) or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f"classes={names!r} must be a list of names.")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"classes has {twice!r} twice. Rename one of them.")
        object.__setattr__(self, "classes", tuple(names))
        check_flag("multi_label", self.multi_label)
        check_positive("clip_seconds", self.clip_seconds)
        heard = heard_seconds(self.fbank)
        if heard is not None:  # a buffer for phones holds no more than is heard of it
            object.__setattr__(self, "clip_seconds", min(self.clip_seconds, round(heard, 3)))
        object.__setattr__(self, "shares", checked_shares(self.shares))
        if not isinstance(self.made_by, dict):
            raise ValueError(f"made_by={self.made_by!r} must be a dictionary.")
        model, own = self.model, self.model.patch_settings()
        for name, came, expected in (
            ("the number of classes", len(names), model.num_classes),
            ("fbank.mel_bins", self.fbank.mel_bins, model.mel_bins),
            ("patches.base_patch", self.patches.base_patch, own.base_patch),
            ("patches.stride", self.patches.stride, own.stride),
            ("patches.grid", self.patches.grid, own.grid),
            ("patches.prefix_tokens", self.patches.prefix_tokens, own.prefix_tokens),
            ("packing.segments", self.packing.segments, model.segments),
        ):
            if came != expected:
                raise ValueError(f"{name} is {came}, but the model has {expected}.")

    @property
    def seed(self) -> int | None:
        """Seed of the training; None where no one knows it."""
        settings = self.made_by.get("settings")
        return (settings if isinstance(settings, dict) else self.made_by).get("seed")

    def scores(self, logits: Tensor) -> np.ndarray:
        """Logits (..., classes) as scores in [0, 1], NumPy float32: softmax, or sigmoid."""
        activation = keras.ops.sigmoid if self.multi_label else keras.ops.softmax
        return keras.ops.convert_to_numpy(activation(logits))

    def full_length(self) -> Self:
        """This run, hearing every clip at its full length (a converted AST cuts or fills up)."""
        return dataclasses.replace(self, fbank=dataclasses.replace(self.fbank, clip_ms=None))

    def resized(self, resize: str) -> Self:
        """This run with "pi" or "bilinear" for patch sizes other than the base patch."""
        return dataclasses.replace(self, patches=dataclasses.replace(self.patches, resize=resize))

    def patches_at(
        self,
        patch_sizes: Sequence[PatchSize],
        frame_shift_ms: float | None = None,
        pool_frames: int = 1,
    ) -> PatchSettings:
        """The run's PatchSettings at other patch sizes and one time resolution.

        Args:
            patch_sizes: ints or (frequency, time) pairs.
            frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.
            pool_frames: number of neighboring frames that are pooled to one.
        """
        return self.patches.at(patch_sizes, frame_shift_ms, pool_frames)

    def front_end(self, frame_shift_ms: float | None = None) -> tuple[FbankSettings, float]:
        """The run's FbankSettings at a frame shift, and that shift over the one of training."""
        fbank = self.fbank.with_frame_shift(frame_shift_ms)
        return fbank, fbank.frame_shift_ms / self.fbank.frame_shift_ms


def save_run(run, folder):
    """Write a run into an existing folder; each of its files is replaced whole."""
    folder = pathlib.Path(folder)
    save_model(run.model, folder / "model.keras")
    atomic_write(folder / "settings.json", json.dumps(run_settings(run), indent=2) + "\n")
    atomic_write(folder / "labels.txt", labels_text(run.classes))


def run_settings(run):
    """What settings.json says of a run: a dictionary for JSON."""
    return {
        "classes": list(run.classes),
        "multi_label": run.multi_label,
        "clip_seconds": run.clip_seconds,
        "shares": list(run.shares),
        "fbank": run.fbank.to_dict(),
        "patches": run.patches.to_dict(),
        "packing": run.packing.to_dict(),
        "made_by": run.made_by,
    }


def save_history(history, folder):
    """Write {metric: values of all epochs} into the folder of a run."""
    history = {name: [float(value) for value in values] for name, values in history.items()}
    atomic_write(pathlib.Path(folder) / "history.json", json.dumps(history, indent=2) + "\n")


def save_model(model, path):
    """Write a `.keras` file, whole or not at all."""
    partial = hidden(path).with_suffix(f"{PARTIAL}.keras")  # an ending that Keras asks for
    try:
        model.save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_run(folder: PathLike) -> Run:
    """Read a run written on any backend.

    Raises:
        FileNotFoundError: the folder, or one of its files, is missing.
        ValueError: settings.json is damaged, or does not fit the model; the message names the
            setting, what came and what was expected. Or the model is no PackedAST, or its
            training diverged.
    """
    folder = pathlib.Path(folder)
    for path in (folder, folder / "settings.json", folder / "model.keras"):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist, so {folder} is not a run. `flexast train`, "
                f"`flexast convert` and `flexast demo` write one."
            )
    fields = _read_settings(folder / "settings.json")
    if not zipfile.is_zipfile(folder / "model.keras"):  # Keras says that there is no such file
        raise ValueError(
            f"{folder / 'model.keras'} is damaged: its end is missing, or it is something else. "
            f"Copy it again, or train again."
        )
    try:
        model = keras.saving.load_model(folder / "model.keras", compile=False)
    except Exception as error:  # Keras raises whatever zipfile, json or h5py met
        raise ValueError(
            f"{folder / 'model.keras'} cannot be loaded: {error}. Copy it again, or train again."
        ) from error
    _check_model(model, folder / "model.keras")
    try:
        return Run(model, **fields)
    except ValueError as error:
        raise ValueError(
            f"{folder / 'settings.json'} does not fit: {error} Train or convert again, or copy "
            f"the settings.json that was written with model.keras."
        ) from error


SECTIONS = {"fbank": FbankSettings, "patches": PatchSettings, "packing": PackSettings}
ENTRIES = ("classes", "multi_label", "clip_seconds", "shares", "made_by")  # checked by Run itself


def _read_settings(path):
    """The arguments of Run that a settings.json holds."""
    name = "the file"
    try:
        settings, fields = json.loads(path.read_text(encoding="utf-8")), {}
        settings.setdefault("shares", SHARES)  # what a run without them was trained with
        for name in (*SECTIONS, *ENTRIES):
            fields[name] = _field(settings, name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: {name}: {described(error)}. Train or convert again, or copy the "
            f"settings.json that was written with model.keras."
        ) from error
    return fields


def fields_of(settings):
    """The arguments of Run, without the model, from what `run_settings` gave."""
    return {name: _field(settings, name) for name in (*SECTIONS, *ENTRIES)}


def _field(settings, name):
    value = settings[name]
    return SECTIONS[name].from_dict(value) if name in SECTIONS else value


def _check_model(model, path):
    """Raise a ValueError unless a model is a PackedAST of finite weights."""
    if not isinstance(model, PackedAST):
        raise ValueError(f"{path} holds a {type(model).__name__}; a run holds a PackedAST.")
    weights = ((one.path, keras.ops.convert_to_numpy(one.value)) for one in model.weights)
    lost = [name for name, value in weights if not np.isfinite(value).all()]
    if lost:
        raise ValueError(
            f"{path}: {len(lost)} of {len(model.weights)} weights hold NaN or infinity, such as "
            f"{lost[0]}: its training diverged. Train again with a lower learning rate."
        )


def as_run(run: Run | PathLike) -> Run:
    """A Run as it is, or the one in a folder."""
    return run if isinstance(run, Run) else load_run(run)


def described(error):
    """An error in one line, without the content that it may carry."""
    return f"{type(error).__name__}: {error}"


def labels_text(classes):
    """What a file of labels holds: one class a line, in the order of the scores."""
    return "".join(f"{name}\n" for name in classes)


def versions():
    """{name: version} of what makes a run, for `Run.made_by`."""
    backend = keras.backend.backend()
    return {
        "keras_flexast": VERSION,
        "keras": keras.__version__,
        "backend": backend,
        backend: sys.modules[backend].__version__,
        "python": platform.python_version(),
    }


def configured_run(
    run: Run | PathLike, *, resize: str | None = None, full_length: bool = False
) -> Run:
    """A Run or the run in a folder, with another resize or at the clips' full lengths."""
    run = as_run(run)
    run = run.resized(resize) if resize else run
    return run.full_length() if full_length else run


def name_of(path):
    """Name of a file or folder; None for what is in memory."""
    return pathlib.Path(path).resolve().name if isinstance(path, str | os.PathLike) else None


def heard_seconds(fbank):
    """Seconds of a clip that a front end of a fixed length hears; None for all of it."""
    if fbank.clip_ms is None:
        return None
    return ((fbank.clip_frames - 1) * fbank.frame_shift_ms + fbank.window_ms) / 1000


def is_cut(fbank, seconds):
    """Whether a clip is longer than what a front end of a fixed length hears of it."""
    if fbank.clip_ms is None:
        return False
    return seconds * 1000 >= fbank.clip_ms + fbank.window_ms  # below it no whole frame is lost


def warn_of_cuts(run, cut, clips):
    """Warn where clips are longer than what a front end of a fixed length hears of them."""
    if cut:
        warnings.warn(
            f"{cut} of {clips} clips are longer than the {heard_seconds(run.fbank):.2f} s that "
            f"this checkpoint was made for; the rest of them is not heard. full_length "
            f"(--full-length) hears all of it.",
            DataWarning,
            stacklevel=3,
        )
