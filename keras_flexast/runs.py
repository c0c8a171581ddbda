"""A run: a packed model with everything that is needed to use it, in memory and on disk.

RUN/model.keras     the packed model
RUN/settings.json   how a waveform becomes tokens, the classes, and how the run was made
RUN/labels.txt      one class a line, in the order of the scores
"""

import dataclasses
import json
import os
import pathlib
import platform
import warnings

import keras

from keras_flexast.files import atomic_write
from keras_flexast.models import PackedAST
from keras_flexast.settings import VERSION
from tf_data_pipelines.settings import DataWarning, FbankSettings, PackSettings, PatchSettings


@dataclasses.dataclass(frozen=True)
class Run:
    """A packed model with everything that is needed to use it.

    Args:
        model: PackedAST.
        fbank: FbankSettings, with the training data's mean and std.
        patches: PatchSettings of the training.
        packing: PackSettings of the training.
        classes: class names in the order of the model's outputs.
        multi_label: whether a clip may have several classes: scores are sigmoid, else softmax.
        clip_seconds: length of the longest training clip; what an export of fixed length
            defaults to.
        made_by: how the run was made: what the user chose, the name of the data, versions.
            A dictionary for JSON; nothing reads it but people.
    """

    model: PackedAST
    fbank: FbankSettings
    _: dataclasses.KW_ONLY
    patches: PatchSettings
    packing: PackSettings
    classes: tuple
    multi_label: bool = False
    clip_seconds: float = 10.0
    made_by: dict = dataclasses.field(default_factory=dict)

    def scores(self, logits):
        """Logits (..., classes) as scores in [0, 1], NumPy float32: softmax, or sigmoid."""
        activation = keras.ops.sigmoid if self.multi_label else keras.ops.softmax
        return keras.ops.convert_to_numpy(activation(logits))

    def full_length(self):
        """This run, hearing every clip at its full length (a converted AST cuts or fills up)."""
        return dataclasses.replace(self, fbank=dataclasses.replace(self.fbank, clip_ms=None))

    def resized(self, resize):
        """This run with "pi" or "bilinear" for patch sizes other than the base patch."""
        return dataclasses.replace(self, patches=dataclasses.replace(self.patches, resize=resize))

    def patches_at(self, patch_sizes, frame_shift_ms=None):
        """The run's PatchSettings at other patch sizes and one frame shift.

        Args:
            patch_sizes: ints or (frequency, time) pairs.
            frame_shift_ms: frame shift in milliseconds; None for that of training.
        """
        shifts = () if frame_shift_ms is None else (frame_shift_ms,)
        return dataclasses.replace(
            self.patches, patch_sizes=tuple(patch_sizes), frame_shifts_ms=shifts
        )

    def front_end(self, frame_shift_ms=None):
        """The run's FbankSettings at a frame shift, and that shift over the one of training."""
        fbank = self.fbank.with_frame_shift(frame_shift_ms)
        return fbank, fbank.frame_shift_ms / self.fbank.frame_shift_ms


def save_run(run, folder):
    """Write a run into an existing folder; each of its files is replaced whole."""
    folder = pathlib.Path(folder)
    save_model(run.model, folder / "model.keras")
    settings = {
        "classes": list(run.classes),
        "multi_label": run.multi_label,
        "clip_seconds": run.clip_seconds,
        "fbank": run.fbank.to_dict(),
        "patches": run.patches.to_dict(),
        "packing": run.packing.to_dict(),
        "made_by": run.made_by,
    }
    atomic_write(folder / "settings.json", json.dumps(settings, indent=2) + "\n")
    atomic_write(folder / "labels.txt", labels_text(run.classes))


def save_model(model, path):
    """Write a `.keras` file, whole or not at all."""
    partial = pathlib.Path(path).with_suffix(".part.keras")
    model.save(partial)
    os.replace(partial, path)


def load_run(folder):
    """Read a run written on any backend.

    Raises:
        FileNotFoundError: the folder, or one of its files, is missing.
        ValueError: settings.json is damaged, or does not fit the model.
    """
    folder = pathlib.Path(folder)
    for path in (folder, folder / "settings.json", folder / "model.keras"):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist, so {folder} is not a run. `flexast train`, "
                f"`flexast convert` and `flexast demo` write one."
            )
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        fields = {
            "patches": PatchSettings.from_dict(settings["patches"]),
            "packing": PackSettings.from_dict(settings["packing"]),
            "classes": tuple(settings["classes"]),
            "multi_label": settings["multi_label"],
            "clip_seconds": settings["clip_seconds"],
            "made_by": settings["made_by"],
        }
        fbank = FbankSettings.from_dict(settings["fbank"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'settings.json'} is damaged: {described(error)}.") from error
    try:
        model = keras.saving.load_model(folder / "model.keras", compile=False)
    except Exception as error:  # Keras raises whatever zipfile, json or h5py met
        raise ValueError(f"{folder / 'model.keras'} cannot be loaded: {error}") from error
    classes = fields["classes"]
    if model.num_classes != len(classes):
        raise ValueError(
            f"{folder}: the model has {model.num_classes} classes, settings.json "
            f"{len(classes)}. They are from different runs; train or convert again."
        )
    return Run(model, fbank, **fields)


def as_run(run):
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
    return {
        "keras_flexast": VERSION,
        "keras": keras.__version__,
        "backend": keras.backend.backend(),
        "python": platform.python_version(),
    }


def configured_run(run, *, resize=None, full_length=False):
    """A Run or the run in a folder, with another resize or at the clips' full lengths."""
    run = as_run(run)
    run = run.resized(resize) if resize else run
    return run.full_length() if full_length else run


def is_cut(fbank, seconds):
    """Whether a clip is longer than what a converted checkpoint hears of it."""
    if fbank.clip_ms is None:
        return False
    return seconds * 1000 > fbank.clip_ms + fbank.window_ms


def warn_of_cuts(run, cut, clips):
    """Warn where clips are longer than what a converted checkpoint hears of them."""
    if cut:
        seconds = (run.fbank.clip_ms - run.fbank.frame_shift_ms + run.fbank.window_ms) / 1000
        warnings.warn(
            f"{cut} of {clips} clips are longer than the {seconds:.2f} s that this checkpoint was "
            f"made for; the rest of them is not heard. full_length (--full-length) hears all of "
            f"it.",
            DataWarning,
            stacklevel=3,
        )
