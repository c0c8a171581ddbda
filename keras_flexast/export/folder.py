"""A run as a folder to deploy, with a model card in which every artifact is measured on itself.

OUT/serving/      for TensorFlow Serving: <version>/, models.config, batching.config
OUT/mobile/       OUT_16_int8.tflite and so on; OUT_multi_float32.tflite holds every patch size
OUT/onnx/         OUT_16.onnx and so on
OUT/README.md     model card, with card.json and points.png; only where test clips are given
"""

import builtins
import dataclasses
import inspect
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable

import keras
from rich.progress import track

from keras_flexast.export.common import FixedOptions
from keras_flexast.export.model_card import describe_run, operating_points, write_card
from keras_flexast.export.onnx import write_onnx
from keras_flexast.export.serving import write_serving
from keras_flexast.export.tflite import write_multi_tflite, write_tflite
from keras_flexast.files import EXPORT, atomic_folder, refuse_overwrite
from keras_flexast.runs import configured_run
from keras_flexast.settings import (
    EXPORT_PATCH_SIZES,
    FORMATS,
    INPUTS,
    MAX_SERVED_SECONDS,
    PRECISIONS,
)
from tf_data_pipelines.settings import check_choice, patch_name, patch_pair

CALIBRATION_CLIPS = 100


def export_run(
    run,
    out=None,
    *,
    patch_sizes=EXPORT_PATCH_SIZES,
    formats=("serving", "mobile"),
    precisions=None,
    data=None,
    seconds=None,
    frame_shift_ms=None,
    resize=None,
    input="waveform",
    max_seconds=MAX_SERVED_SECONDS,
    overwrite=False,
    command=None,
):
    """Export a run as a folder to deploy, with progress bars.

    On another backend than TensorFlow, a TensorFlow process of its own does the work.

    Args:
        run: folder of the run.
        out: folder that appears whole or not at all; its name becomes the name of the model.
            None for saved_models/NAME OF THE RUN.
        patch_sizes: list of ints or (frequency, time) pairs.
        formats: list of "serving" (one SavedModel with a signature for each patch size),
            "mobile" (a `.tflite` for each patch size and precision, and one of all patch
            sizes) and "onnx" (an `.onnx` for each patch size).
        precisions: list of precisions of the `.tflite` files, see `FixedOptions`. None for all
            of them; int8 is left out where there is no data.
        data: folder or manifest, as for training. Its training clips give int8 its scales, and
            its test clips measure every artifact for the model card. None for no model card.
        seconds: length of every clip of mobile and onnx; None for the length of the longest
            training clip, or for the length to which a converted checkpoint brings its clips.
        frame_shift_ms: frame shift in milliseconds; None for that of training.
        resize: method of the patch resize, "pi" or "bilinear"; None for the run's own.
        input: input of mobile and onnx, "waveform" or "features" (normalized log-mel).
        max_seconds: length of the longest clip that serving accepts.
        overwrite: whether to replace an existing folder. The versions in OUT/serving stay,
            and a new one is added to them.
        command: text that the model card names as the command that made it; None for this
            call.

    Returns:
        list of pathlib.Path: the artifacts.

    Raises:
        FileNotFoundError: the run or the data does not exist.
        FileExistsError: the folder `out` exists.
        ValueError: a format, precision or input is unknown, int8 has no data, or a patch is
            larger than the clip's spectrogram.
        RuntimeError: the other process failed.

    Example:
        export_run("digits", patch_sizes=[16, 32], precisions=["dynamic"], data="sounds")
    """
    arguments = _plain(locals())
    if not isinstance(run, (str, os.PathLike)):
        raise ValueError(
            f"run is a {type(run).__name__}; expected the folder of a run. `save_run` writes one."
        )
    if precisions is None:
        precisions = [name for name in PRECISIONS if data or name != "int8"]
    _check(arguments, precisions)
    sizes = {patch_name(patch_pair(size)): patch_pair(size) for size in arguments["patch_sizes"]}
    out = pathlib.Path(out or pathlib.Path("saved_models", pathlib.Path(run).resolve().name))
    inputs = [run] if data is None else [run, data]
    refuse_overwrite(out, overwrite, kind=EXPORT, inputs=inputs)
    command = command or _call_text(arguments)
    if keras.backend.backend() != "tensorflow":
        arguments |= {"patch_sizes": list(sizes.values()), "command": command}
        return _in_tensorflow_process(arguments)

    plan = _Plan(
        out.name,
        sizes,
        formats=formats,
        precisions=precisions,
        options=FixedOptions(seconds, frame_shift_ms, input=input),
        max_seconds=max_seconds,
    )
    loaded = configured_run(run, resize=resize)
    train, test = _splits(data, loaded) if data else (None, None)
    with atomic_folder(out, overwrite, kind=EXPORT, inputs=inputs) as building:
        if (out / "serving").exists():
            shutil.copytree(out / "serving", building / "serving")
        writers = _writers(loaded, building, plan, train)
        written = [
            write(loaded, path, **keywords) for write, path, keywords in track(writers, "Exporting")
        ]
        if test:
            points = operating_points(written, test, progress=True)
            facts = {"data": f"the test split of {pathlib.Path(data).name}", "command": command}
            write_card(
                building, points, {**describe_run(loaded, out.name, frame_shift_ms), **facts}
            )
    return [out / path.absolute().relative_to(building.absolute()) for path in written]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is exported: under which name, at which {name: patch size}, in which formats."""

    name: str
    sizes: dict
    _: dataclasses.KW_ONLY
    formats: list
    precisions: list
    options: FixedOptions
    max_seconds: float


def _writers(run, folder, plan, train):
    """What writes each artifact: list of (function, path in the folder, keyword arguments)."""
    writers, options, sizes = [], plan.options, plan.sizes
    if "serving" in plan.formats:
        keywords = {
            "patch_sizes": list(sizes.values()),
            "max_seconds": plan.max_seconds,
            "frame_shift_ms": options.frame_shift_ms,
            "name": plan.name,
        }
        writers.append((write_serving, folder / "serving", keywords))
    if "mobile" in plan.formats:
        (folder / "mobile").mkdir()
        waveforms = None
        if "int8" in plan.precisions:
            waveforms = calibration_waveforms(run, train, options.seconds)
        for precision in plan.precisions:
            chosen = dataclasses.replace(options, precision=precision, calibration=waveforms)
            for label, size in sizes.items():
                path = folder / "mobile" / f"{plan.name}_{label}_{precision}.tflite"
                writers.append((write_tflite, path, {"patch_size": size, "options": chosen}))
            if precision == plan.precisions[0] and len(sizes) > 1:
                path = folder / "mobile" / f"{plan.name}_multi_{precision}.tflite"
                keywords = {"patch_sizes": list(sizes.values()), "options": chosen}
                writers.append((write_multi_tflite, path, keywords))
    if "onnx" in plan.formats:
        (folder / "onnx").mkdir()
        for label, size in sizes.items():
            path = folder / "onnx" / f"{plan.name}_{label}.onnx"
            writers.append((write_onnx, path, {"patch_size": size, "options": options}))
    return writers


def calibration_waveforms(run, data, seconds=None):
    """Clips on which int8 measures its scales, taken evenly from all of the data.

    Args:
        run: Run.
        data: ScannedSource of training clips.
        seconds: length of every waveform: longer clips are cut, shorter ones end in zeros.
            None for the run's own.

    Returns:
        float32 (clips, samples) at the run's sample rate.
    """
    from tf_data_pipelines.audio import read_waveforms

    sample_rate = run.fbank.sample_rate
    samples = round((seconds or run.clip_seconds) * sample_rate)
    every = max(1, len(data.source) // CALIBRATION_CLIPS)
    clips = data.source.clips[::every][:CALIBRATION_CLIPS]
    return read_waveforms([clip.path for clip in clips], samples, sample_rate)


def _splits(data, run):
    """ScannedSource of the training clips, and of the test clips."""
    from tf_data_pipelines.sources import read_data

    found = read_data(data, run.fbank, classes=run.classes, progress=True)
    return found.split("train"), found.split("test")


def _check(arguments, precisions):
    """Raise ValueError for choices of `export_run` that are unknown or do not fit together."""
    chosen = {"formats": arguments["formats"], "precisions": precisions}
    for name, values in {**chosen, "patch_sizes": arguments["patch_sizes"]}.items():
        if not values:
            raise ValueError(f"{name} is empty; give at least one.")
    for name, values, known in (
        ("formats", chosen["formats"], FORMATS),
        ("precisions", chosen["precisions"], PRECISIONS),
        ("input", [arguments["input"]], INPUTS),
    ):
        for value in values:
            check_choice(name, value, known)
    data = arguments["data"]
    if "int8" in precisions and "mobile" in chosen["formats"] and data is None:
        raise ValueError(
            "precisions: int8 measures its scales on training clips. Give data (--data) that has "
            "them, or leave int8 out; dynamic needs none."
        )
    if data and arguments["input"] == "features":
        raise ValueError("input='features' cannot be measured on sound files; leave data out.")


def _plain(arguments):
    """Arguments as JSON can hold them: paths as text, tuples and views as lists."""
    plain = {}
    for name, value in arguments.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, Iterable) and not isinstance(value, str):
            value = list(value)
        plain[name] = value
    return plain


def _call_text(arguments):
    """The call of `export_run` as text, without arguments that have their default."""
    parameters = inspect.signature(export_run).parameters
    defaults = _plain({name: one.default for name, one in parameters.items()})
    texts = [repr(arguments["run"])]
    for name, value in arguments.items():
        if name != "run" and value != defaults[name]:
            texts.append(f"{name}={value!r}")
    return f"export_run({', '.join(texts)})"


def _in_tensorflow_process(arguments):
    """`export_run` where Keras runs on TensorFlow; its progress bars are shown here."""
    code = """
import json, sys
from keras_flexast.export import export_run
try:
    answer = {"paths": [str(path) for path in export_run(**json.loads(sys.argv[1]))]}
except (ValueError, OSError, ImportError) as error:
    kinds = (FileNotFoundError, FileExistsError, OSError, ImportError, ValueError)
    kind = next(kind for kind in kinds if isinstance(error, kind))
    answer = {"error": str(error), "kind": kind.__name__}
with open(sys.argv[2], "w") as file:
    json.dump(answer, file)
"""
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "answer.json")
        command = [sys.executable, "-c", code, json.dumps(arguments), str(path)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(
                f"the TensorFlow process that exports failed:\n{done.stderr[-2000:]}"
            )
        answer = json.loads(path.read_text(encoding="utf-8"))
    if "error" in answer:
        raise getattr(builtins, answer["kind"])(answer["error"])
    return [pathlib.Path(path) for path in answer["paths"]]
