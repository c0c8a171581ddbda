"""A run as a folder that another team can deploy, and what each artifact in it is worth.

OUT/serving/      for TensorFlow Serving: <version>/, models.config, batching.config
OUT/mobile/       OUT_16_int8.tflite and so on; OUT_multi_float32.tflite holds every patch size
OUT/onnx/         OUT_16.onnx and so on
OUT/README.md     model card; with card.json and points.png, where test clips were given
"""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import keras
import numpy as np
from rich.progress import track

from keras_flexast.export.tflite import (
    INPUTS,
    PRECISIONS,
    write_multi_tflite,
    write_onnx,
    write_tflite,
)
from keras_flexast.files import atomic_folder, refuse_overwrite
from keras_flexast.runs import load_run
from tf_data_pipelines.settings import check_choice, patch_name, patch_pair

FORMATS = ("serving", "mobile", "onnx")
MOBILE_PATCHES = (8, 16, 24, 32, 48)
CALIBRATION_CLIPS = 100


def export_folder(
    folder, out, patch_sizes=MOBILE_PATCHES, formats=("serving", "mobile"), precisions=None,
    data=None, seconds=None, frame_shift_ms=None, resize=None, input="waveform",
    max_seconds=60.0, overwrite=False,
):  # fmt: skip
    """Export a run, on any backend, with progress bars; with `data`, measured on test clips.

    On another backend than TensorFlow a process of its own does it.

    Args:
        folder: of the run.
        out: folder that appears whole or not at all. Its name is the model's.
        patch_sizes: ints or (frequency, time) pairs.
        formats: of "serving" (one SavedModel with a signature for each patch size), "mobile"
            (a `.tflite` for each patch size and precision, and one of all patch sizes) and "onnx".
        precisions: of "float32", "float16", "dynamic" and "int8", for mobile; None for all
            of them, without int8 where there is no `data`.
        data: folder or manifest as for training: its train split gives int8 its scales, its
            test split measures every artifact. None for no model card.
        seconds: length of every clip of mobile and onnx; None for the longest training clip,
            or what a converted checkpoint cuts its clips to.
        frame_shift_ms: milliseconds; None for that of training. 20 halves the cost.
        resize: "pi" or "bilinear"; None for the run's own.
        input: "waveform" or "features" (normalized log-mel), of mobile and onnx.
        max_seconds: of the longest clip that serving accepts.
        overwrite: replace what is there; the versions in OUT/serving stay, beside a new one.

    Returns:
        list of pathlib.Path: the artifacts.

    Raises:
        ValueError: an unknown format, precision or input, int8 without data, or a patch larger than
            the clip's spectrogram.
        FileExistsError: `out` exists.
        RuntimeError: the other process was stopped.
    """
    precisions = precisions or (PRECISIONS if data else PRECISIONS[:3])
    for name, chosen, known in (
        ("formats", formats, FORMATS),
        ("precisions", precisions, PRECISIONS),
        ("input", [input], INPUTS),
    ):
        for one in chosen:
            check_choice(name, one, known)
    if not patch_sizes:
        raise ValueError("patch_sizes is empty; give at least one size, such as [16].")
    if "int8" in precisions and "mobile" in formats and data is None:
        raise ValueError(
            "precisions: int8 measures its scales on training clips. Give them with --data, or "
            "leave int8 out; dynamic needs none."
        )
    if data and input == "features":
        raise ValueError("input='features' cannot be measured on sound files; leave data out.")
    out = pathlib.Path(out)
    refuse_overwrite(out, overwrite)
    if keras.backend.backend() != "tensorflow":
        sizes = [patch_pair(size) for size in patch_sizes]
        return _in_tensorflow_process(
            folder=str(folder), out=str(out), patch_sizes=sizes, formats=formats,
            precisions=precisions, data=data and str(data), seconds=seconds,
            frame_shift_ms=frame_shift_ms, resize=resize, input=input, max_seconds=max_seconds,
            overwrite=overwrite,
        )  # fmt: skip
    from keras_flexast.export.model_card import describe_run, operating_points, write_card

    run = load_run(folder)
    run = run.resized(resize) if resize else run
    train, test = _splits(data, run) if data else (None, None)
    with atomic_folder(out, overwrite) as building:
        if (out / "serving").exists():
            shutil.copytree(out / "serving", building / "serving")
        writers = _writers(
            run, building, out.name, patch_sizes, formats, precisions, train, seconds,
            frame_shift_ms, input, max_seconds,
        )  # fmt: skip
        written = [write() for write in track(writers, "Exporting")]
        if test:
            points = operating_points(written, test, progress=True)
            command = f"flexast export {folder} --out {out} --data {data}"
            facts = {"data": f"the test split of {pathlib.Path(data).name}", "command": command}
            write_card(building, points, {**describe_run(run, out.name), **facts})
    return [out / path.absolute().relative_to(building.absolute()) for path in written]


def _writers(
    run, folder, name, patch_sizes, formats, precisions, train, seconds, frame_shift_ms, input,
    max_seconds,
):  # fmt: skip
    """Functions that each write one artifact and return its path."""
    from keras_flexast.export.serving import write_serving

    sizes = {patch_name(patch_pair(size)): patch_pair(size) for size in patch_sizes}
    fixed = {"seconds": seconds, "frame_shift_ms": frame_shift_ms, "input": input}
    writers = []
    if "serving" in formats:
        writers.append(
            lambda: write_serving(
                run, folder / "serving", tuple(sizes.values()), max_seconds=max_seconds,
                frame_shift_ms=frame_shift_ms, name=name,
            )
        )  # fmt: skip
    if "mobile" in formats:
        (folder / "mobile").mkdir()
        sound = None
        if "int8" in precisions:
            sound = _calibration(
                train, round((seconds or run.clip_seconds) * run.fbank.sample_rate)
            )
        for precision in precisions:
            options = {**fixed, "precision": precision}
            if precision == "int8":
                options["calibration"] = sound
            for label, size in sizes.items():
                path = folder / "mobile" / f"{name}_{label}_{precision}.tflite"
                writers.append(functools.partial(write_tflite, run, path, size, **options))
            if precision == precisions[0] and len(sizes) > 1:
                path = folder / "mobile" / f"{name}_multi_{precision}.tflite"
                writers.append(
                    functools.partial(write_multi_tflite, run, path, sizes.values(), **options)
                )
    if "onnx" in formats:
        (folder / "onnx").mkdir()
        for label, size in sizes.items():
            path = folder / "onnx" / f"{name}_{label}.onnx"
            writers.append(functools.partial(write_onnx, run, path, size, **fixed))
    return writers


def _splits(data, run):
    """scanned sources of the train and the test clips."""
    from tf_data_pipelines.sources import load_source, scan_source

    found = scan_source(load_source(data, classes=run.classes), run.fbank, progress=True)
    return found.split("train"), found.split("test")


def _calibration(train, samples):
    """Training clips from the whole split, cut or filled up: float32 (clips, samples)."""
    from tf_data_pipelines.decode import read_audio

    every = max(1, len(train.source) // CALIBRATION_CLIPS)
    clips = train.source.clips[::every][:CALIBRATION_CLIPS]
    waveforms = np.zeros((len(clips), samples), "float32")
    for row, clip in zip(waveforms, clips, strict=True):
        waveform = read_audio(clip.path)[:samples]
        row[: len(waveform)] = waveform
    return waveforms


def _in_tensorflow_process(**arguments):
    """`export_folder` where Keras runs on TensorFlow; its bars are shown here."""
    code = """
import json, sys
from keras_flexast.export.folder import export_folder
try:
    answer = {"paths": [str(path) for path in export_folder(**json.loads(sys.argv[1]))]}
except (ValueError, OSError, ImportError) as error:
    answer = {"error": str(error)}
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
        answer = json.loads(path.read_text())
    if "error" in answer:
        raise ValueError(answer["error"])
    return [pathlib.Path(path) for path in answer["paths"]]
