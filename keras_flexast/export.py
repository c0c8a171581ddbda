"""A run as something that needs neither Keras nor this package: SavedModel and TFLite.

Waveform in, scores out: the front end and the score activation are in the graph. Needs
the TensorFlow backend; a model trained on JAX is loaded from its `.keras` file.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import keras
from rich.console import Console
from rich.progress import track

from keras_flexast.evaluation import patch_name
from keras_flexast.models import fixed_model
from keras_flexast.runs import check_free, load_run, whole_folder, write_whole
from tf_data_pipelines.settings import check_choice, check_positive, patch_pair

FORMATS = ("saved_model", "tflite")


def export_folder(
    folder, patch_sizes, format, out=None, seconds=None, frame_shift_ms=None, resize=None,
    overwrite=False,
):  # fmt: skip
    """Export a run at several patch sizes, on any backend, with a progress bar.

    On another backend than TensorFlow a process of its own does it.

    Args:
        folder: of the run.
        patch_sizes: ints or (frequency, time) pairs, each a model of its own.
        format, seconds, frame_shift_ms, overwrite: as `export_run`.
        resize: "pi" or "bilinear"; None for the run's own.
        out: folder; None for FOLDER/export.

    Returns:
        {patch name: path}, such as {"16": OUT/flexast_16.tflite} or
        {"16": OUT/saved_model_16}.

    Raises:
        RuntimeError: the other process failed; its message is given. Else as `export_run`.
    """
    check_choice("format", format, FORMATS)
    out = pathlib.Path(folder, "export") if out is None else pathlib.Path(out)
    targets = {}
    for pair in map(patch_pair, patch_sizes):
        name = patch_name(pair)
        file = f"flexast_{name}.tflite" if format == "tflite" else f"saved_model_{name}"
        check_free(out / file, overwrite)
        targets[name] = out / file
    if keras.backend.backend() == "tensorflow":
        run = load_run(folder)
        run = run.resized(resize) if resize else run
        for target, pair in track(
            zip(targets.values(), patch_sizes, strict=True), f"Exporting {format}", len(targets)
        ):
            export_run(run, pair, format, target, seconds, frame_shift_ms, overwrite)
        return targets
    command = [
        sys.executable, "-m", "keras_flexast.cli", "export", str(folder), "--format", format,
        "--patch-size", ",".join(targets), "--out", str(out), "--seconds", str(seconds or 0),
        "--frame-shift-ms", str(frame_shift_ms or 0),
    ] + ["--overwrite"] * overwrite + ["--resize", resize] * bool(resize)  # fmt: skip
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    with Console().status("Exporting in a TensorFlow process"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the export in a TensorFlow process failed:\n{done.stderr[-2000:]}")
    return targets


def export_run(run, patch_size, format, out, seconds=None, frame_shift_ms=None, overwrite=False):
    """Export one patch size of a run.

    Args:
        run: Run.
        patch_size: int or (frequency, time).
        format: "saved_model", a folder whose `serving_default` takes `waveform` float32
            (batch, samples) at the run's sample rate and gives `scores` float32 (batch,
            classes); or "tflite", one file with one clip at a time, (1, samples), of
            built-in operations only.
        out: path of the folder or file.
        seconds: length of every clip; None for the longest training clip, or what a
            converted checkpoint cuts its clips to.
        frame_shift_ms: milliseconds; None for that of training. 20 halves the cost.
        overwrite: replace what is there.

    Returns:
        pathlib.Path of the artefact; `labels.txt` lies in a SavedModel's `assets`, and
        beside a `.tflite` as NAME.labels.txt.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
        ValueError: unknown format, or a patch larger than the clip's spectrogram.
        FileExistsError: `out` exists.
    """
    check_choice("format", format, FORMATS)
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"Export needs the TensorFlow backend, and Keras runs on {keras.backend.backend()}. "
            f"Save the run and use `flexast export`, which starts a TensorFlow process."
        )
    if seconds is None:
        seconds = run.clip_seconds
    else:
        check_positive("seconds", seconds)
        run = run.own_length()
    out = pathlib.Path(out)
    check_free(out, overwrite)
    model, samples = scoring_model(run, patch_size, seconds, frame_shift_ms)
    labels = "".join(f"{name}\n" for name in run.classes)
    if format == "saved_model":
        with whole_folder(out, overwrite) as folder:
            _write_saved_model(model, samples, folder)
            write_whole(folder / "assets" / "labels.txt", labels)
    else:
        write_whole(out, _tflite_bytes(model, samples))
        write_whole(out.with_suffix(".labels.txt"), labels)
    return out


def scoring_model(run, patch_size, seconds, frame_shift_ms=None):
    """TensorFlow function from waveforms to scores, and the samples it takes.

    Returns:
        (tf.Module with `__call__(waveform float32 (batch, samples))`, samples).
    """
    import tensorflow as tf

    from tf_data_pipelines.fbank import log_mel, normalise

    fbank, scale = _front_end(run, frame_shift_ms)
    samples = round(seconds * fbank.sample_rate)
    frames = int(fbank.frames(samples))
    patch_f, patch_t = patch_pair(patch_size)
    if frames < patch_t or fbank.mel_bins < patch_f:
        raise ValueError(
            f"patch_size={patch_name((patch_f, patch_t))} is larger than the spectrogram of "
            f"{seconds} s: {fbank.mel_bins} mel bins, {frames} frames. Choose a smaller patch, "
            f"or more --seconds."
        )

    class Scoring(tf.Module):
        def __init__(self):
            super().__init__()
            self.model = _fixed(run, patch_size, frames, scale)
            self.activation = tf.nn.sigmoid if run.multi_label else tf.nn.softmax

        def __call__(self, waveform):
            features = normalise(log_mel(waveform, fbank), fbank)
            return {"scores": self.activation(self.model(features))}

    return Scoring(), samples


def fixed_scores(run, patch_size, waveforms, frame_shift_ms=None):
    """Scores of equally long clips by the fixed face, on whatever backend Keras runs.

    Args:
        run: Run.
        patch_size: int or (frequency, time).
        waveforms: float32 (clips, samples).
        frame_shift_ms: milliseconds; None for that of training.

    Returns:
        float32 (clips, classes).
    """
    return fixed_scorer(run, patch_size, waveforms.shape[1], frame_shift_ms)(waveforms)


def fixed_scorer(run, patch_size, samples, frame_shift_ms=None):
    """`fixed_scores` as a function of waveforms float32 (clips, samples), to call often."""
    from tf_data_pipelines.fbank import log_mel, normalise

    fbank, scale = _front_end(run, frame_shift_ms)
    model = _fixed(run, patch_size, int(fbank.frames(samples)), scale)
    # TensorFlow's own graph is ready at once; XLA takes seconds to compile for a CPU.
    model.compile(jit_compile=keras.backend.backend() != "tensorflow")

    def scores(waveforms):
        features = normalise(log_mel(waveforms, fbank), fbank).numpy()
        return run.scores(model.predict_on_batch(features))

    return scores


def _fixed(run, patch_size, frames, frame_shift_scale):
    policies = run.patches.remainder, run.patches.position, run.patches.resize
    return fixed_model(run.model, patch_size, frames, *policies, frame_shift_scale)


def _front_end(run, frame_shift_ms):
    """(FbankSettings at a frame shift, that shift over the run's own)."""
    if frame_shift_ms is None:
        return run.fbank, 1.0
    fbank = dataclasses.replace(run.fbank, frame_shift_ms=frame_shift_ms)
    return fbank, frame_shift_ms / run.fbank.frame_shift_ms


def _write_saved_model(model, samples, folder, batch=None):
    import tensorflow as tf

    archive = keras.export.ExportArchive()
    archive.track(model.model)
    waveform = tf.TensorSpec([batch, samples], tf.float32, name="waveform")
    archive.add_endpoint("serving_default", model.__call__, input_signature=[waveform])
    archive.write_out(str(folder), verbose=False)


def _tflite_bytes(model, samples):
    import tensorflow as tf

    # By way of ExportArchive: the converter freezes the variables only where it tracks them,
    # and otherwise writes a file that answers nan.
    with tempfile.TemporaryDirectory() as folder:
        _write_saved_model(model, samples, folder, batch=1)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        return converter.convert()
