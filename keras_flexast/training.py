"""Training with plain `compile` and `fit`: from data to a run."""

import dataclasses
import math
import os
import pathlib
import warnings

import keras
import numpy as np

from keras_flexast.callbacks import KeepBest, MeanAveragePrecision, StopDiverged
from keras_flexast.distillation import Distillation
from keras_flexast.distribution import batch_devices
from keras_flexast.files import RUN, atomic_folder, refuse_overwrite, refuse_partial
from keras_flexast.models import PackedAST
from keras_flexast.optimizers import compile_packed
from keras_flexast.runs import Run, as_run, save_run, versions
from keras_flexast.schedules import WarmupCosine
from keras_flexast.settings import DEFAULT_SIZE, MAX_DROPOUT, DistillSettings, TrainSettings
from tf_data_pipelines.resize import patch_count
from tf_data_pipelines.settings import (
    BASE_PATCH,
    PATCH_SIZES,
    DataWarning,
    FbankSettings,
    base_and_stride,
    check_between,
)

FIXED_BY_INIT = {
    "size", "dim", "depth", "num_heads", "mlp_ratio", "pooling", "prefix_tokens", "table", "grid",
    "base_patch", "stride", "mel_bins",
}  # fmt: skip


def train_run(
    data, out, *, settings=None, patch_sizes=PATCH_SIZES, frame_shifts_ms=None, augment=None,
    fbank=None, model_options=None, init=None, teacher=None, distill=None, overwrite=False,
    progress=False,
):  # fmt: skip
    """Train a model on sounds and write the run to `out`.

    The best epoch on the validation clips is kept. While it trains, `OUT.partial` is a run of
    the best weights so far, with the TensorBoard logs; an interrupted training leaves it there.

    Args:
        data: folder or .csv manifest, see `tf_data_pipelines.load_source`, or a ScannedSource
            with train and validation clips.
        out: folder of the run.
        settings: TrainSettings; None for the defaults.
        patch_sizes: ints or (frequency, time) pairs; each clip draws one of them.
        frame_shifts_ms: frame shifts in milliseconds; each clip draws one of them. None for
            the filterbank's own.
        augment: AugmentSettings; None for no augmentation.
        fbank: FbankSettings; its mean and std are measured on the data. None for the defaults, or
            for those of `init`, which no others can replace.
        model_options: dictionary of arguments of PackedAST, such as size, pooling, remainder
            or dropout.
        init: Run, or its folder, to start from, such as a converted checkpoint: its weights,
            its options where model_options name no others, and its filterbank, with the new
            clips' mean and std and at their full lengths. Its head is kept for the same
            classes.
        teacher: Run, or its folder, of the same classes, from whose scores of the same clips the
            model learns beside the labels; without fbank and init its filterbank is used.
        distill: DistillSettings; None for the defaults.
        overwrite: whether to replace an existing run.
        progress: whether to show a progress bar while the files are read.

    Returns:
        Run with the best weights on the validation clips, as saved, and Keras's History.

    Raises:
        FileExistsError: `out` exists.
        ValueError: the data cannot be used, a class has no training clip, a clip is longer than
            a row at every patch size, a patch is larger than a spectrogram, model_options do not
            fit the data or `init`, the teacher has other classes or hears another spectrogram, or
            the loss became NaN or infinite.
    """
    from tf_data_pipelines.clips import check_trained
    from tf_data_pipelines.shards import damage_named
    from tf_data_pipelines.sources import read_data

    inputs = [one for one in (data, init, teacher) if isinstance(one, str | os.PathLike)]
    refuse_overwrite(out, overwrite, kind=RUN, inputs=inputs)
    refuse_partial(out)
    settings, options = settings or TrainSettings(), dict(model_options or {})
    resized = sorted(FIXED_BY_INIT & set(options))
    if init is not None and resized:
        raise ValueError(
            f"model_options: {', '.join(resized)} cannot change, because the weights of init are "
            f"made for their own. Leave them out, or train without init."
        )
    init_name = _name_of(init)
    init = None if init is None else as_run(init).full_length()
    if init is not None and fbank is not None:
        raise ValueError("fbank cannot change, because the weights of init hear with their own.")
    data_name, teacher_name = _name_of(data), _name_of(teacher)
    teacher = None if teacher is None else as_run(teacher).full_length()
    heard = init or teacher
    front_end = fbank or (heard.fbank if heard else FbankSettings())
    shares = settings.validation, settings.test
    check_between("dropout", options.get("dropout", 0), 0, MAX_DROPOUT)
    data = read_data(data, front_end, shares=shares, progress=progress)
    check_trained(data.source)
    train, validation = data.split("train"), data.split("validation")
    fbank = dataclasses.replace(front_end, mean=data.mean, std=data.std)
    keras.utils.set_random_seed(settings.seed)
    model = _new_model(train, fbank, settings=settings, options=options, init=init)
    patches = model.patch_settings(patch_sizes, frame_shifts_ms=tuple(frame_shifts_ms or ()))
    packing = _packing(data, fbank, patches=patches, settings=settings, segments=model.segments)
    run = Run(
        model,
        fbank,
        patches=patches,
        packing=packing,
        classes=data.source.classes,
        multi_label=data.source.multi_label,
        clip_seconds=round(float(max(train.durations)), 3),
        shares=shares,
        made_by={
            "command": "train",
            "data": data_name,
            "settings": settings.to_dict(),
            "augment": augment and augment.to_dict(),
            "model_options": options,
            "init": init and {"name": init_name, **init.made_by},
            "teacher": teacher and {"name": teacher_name, **teacher.made_by},
            "distill": teacher and (distill or DistillSettings()).to_dict(),
            "versions": versions(),
        },
    )
    taught = teacher and Distillation(run, teacher, distill or DistillSettings())
    with damage_named(train):  # the validation clips are counted
        fit = _prepare(
            run, train=train, validation=validation, settings=settings, augment=augment,
            taught=taught,
        )  # fmt: skip
    with atomic_folder(out, overwrite, kind=RUN, inputs=inputs, keep_partial=True) as folder:
        with damage_named(train):
            history = fit(folder)
        model.load_weights(folder / "model.keras")
        if settings.dtype != "float32":
            config = {**model.get_config(), "dtype": "float32"}
            run = dataclasses.replace(run, model=PackedAST.from_config(config))
            run.model.set_weights(model.get_weights())
            save_run(run, folder)
    return run, history


def steps_per_epoch(data, fbank, patches, packing):
    """Batches in one pass over the clips, from their mean tokens over what they draw."""
    from tf_data_pipelines.pipeline import clip_tokens, drawn_sizes

    tokens = clip_tokens(data, fbank, patches)
    drawn = drawn_sizes(tokens, packing)
    tokens = np.minimum(tokens, packing.row_length).mean(0, where=drawn).sum()
    by_tokens = tokens / (packing.rows * packing.row_length)
    by_slots = len(data.source) / (packing.rows * packing.segments)
    return max(1, math.ceil(max(by_tokens, by_slots)))


def time_cells(data, fbank, stride=BASE_PATCH):
    """Time cells, of `stride` frames each, that cover the longest clip; at least 64."""
    seconds = float(max(data.durations))
    return max(64, math.ceil(seconds * 1000 / (fbank.frame_shift_ms * stride)))


def _name_of(path):
    """Name of a file or folder; None for what is in memory."""
    return pathlib.Path(path).resolve().name if isinstance(path, str | os.PathLike) else None


def _new_model(train, fbank, *, settings, options, init):
    """A PackedAST for the training clips, or one that starts from the weights of `init`."""
    options = {
        "segments": settings.segments, "dtype": settings.dtype, "remat": settings.remat, **options
    }  # fmt: skip
    classes = train.source.classes
    if init is not None:
        return _warm_start(init, classes, options)
    base, stride = base_and_stride(options.get("base_patch", BASE_PATCH), options.get("stride"))
    if base[0] > fbank.mel_bins:
        raise ValueError(
            f"base_patch={base} is larger than the {fbank.mel_bins} mel bins; choose a smaller one."
        )
    bands = patch_count(fbank.mel_bins, base[0], stride[0], options.get("remainder", "cover"))
    own = {"grid": (bands, time_cells(train, fbank, stride[1])), "mel_bins": fbank.mel_bins}
    return PackedAST(len(classes), **{"size": DEFAULT_SIZE, **own, **options})


def _warm_start(init, classes, options):
    """A model for these classes with the weights of a run; other classes have a new head."""
    config = {**init.model.get_config(), "num_classes": len(classes), **options}
    model = PackedAST.from_config(config)
    parts = ["backbone", "pooling", "head_norm"]
    if tuple(classes) == tuple(init.classes):
        parts.append("head")
    for part in parts:
        getattr(model, part).set_weights(getattr(init.model, part).get_weights())
    return model


def _packing(data, fbank, *, patches, settings, segments):
    """PackSettings for training on data; a warning counts the clips that are too long for them."""
    from tf_data_pipelines.pipeline import lengths_warning, training_packing

    packing = training_packing(
        data.splits(), fbank, patches=patches, batch_tokens=settings.batch_tokens,
        row_length=settings.row_length, segments=segments, overlong=settings.overlong,
    )  # fmt: skip
    devices = batch_devices()  # each has as many rows
    packing = dataclasses.replace(packing, rows=-(-packing.rows // devices) * devices)
    heard = [data.split("train"), data.split("validation")]
    message = lengths_warning(heard, fbank, patches=patches, packing=packing)
    if message:
        warnings.warn(message, DataWarning, stacklevel=3)
    return packing


def _prepare(run, *, train, validation, settings, augment, taught):
    """Compile the model of a run and check its clips; a function that trains it in a folder."""
    from tf_data_pipelines.pipeline import counted, evaluation_batches, training_batches

    model = taught.model() if taught else run.model
    how = {"patches": run.patches, "packing": run.packing, "seed": settings.seed}
    tokens = taught and taught.tokens(train)
    batches = training_batches(train, run.fbank, augment=augment, teacher=tokens, **how)
    held_out = counted(evaluation_batches(validation, run.fbank, cache=True, **how))
    # Whole steps of the optimizer, so that no gradient waits for the next epoch.
    steps = steps_per_epoch(train, run.fbank, run.patches, run.packing)
    steps = -(-steps // settings.accumulate) * settings.accumulate
    compile_packed(
        model,
        WarmupCosine(settings.learning_rate, [steps * settings.epochs], settings.warmup),
        multi_label=run.multi_label,
        weight_decay=settings.weight_decay,
        row_length=run.packing.row_length,
        accumulate=settings.accumulate,
    )

    def fit(folder):
        save_run(run, folder)  # the checkpoint replaces the model, so it is a run all along
        return model.fit(
            batches,
            steps_per_epoch=steps,
            epochs=settings.epochs,
            validation_data=held_out.map(lambda *batch: batch[:3]),
            callbacks=_callbacks(run, folder, held_out=held_out, source=validation.source),
            shuffle=False,
        )

    return fit


def _callbacks(run, folder, *, held_out, source):
    """No NaN, the best epoch in the folder, TensorBoard, and mAP for multi-label clips."""
    metric = "val_mAP" if run.multi_label else "val_accuracy"
    measure = [MeanAveragePrecision(held_out, source)] if run.multi_label else []
    board = keras.callbacks.TensorBoard(folder / "logs", write_graph=False)
    return [StopDiverged(folder), *measure, KeepBest(folder / "model.keras", metric), board]
