"""Training with plain `compile` and `fit`: from data to a run."""

import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras

import tf_data_pipelines
from keras_flexast.callbacks import Averages, KeepBest, MeanAveragePrecision, StopDiverged
from keras_flexast.checkpoints import (
    Checkpoint,
    check_data,
    check_recipe,
    check_teacher,
    data_facts,
    read_facts,
    read_state,
)
from keras_flexast.distillation import Distillation, teacher_of
from keras_flexast.distribution import batch_devices, check_devices
from keras_flexast.files import (
    RUN,
    STATE,
    atomic_folder,
    partial_of,
    refuse_overwrite,
    refuse_partial,
    resumable,
)
from keras_flexast.fine_tuning import tune_part
from keras_flexast.losses import class_factors
from keras_flexast.models import PackedAST
from keras_flexast.monitoring import ClipPictures, Meter, TrainingBoard
from keras_flexast.optimizers import COMPILED, compile_packed
from keras_flexast.runs import (
    Run,
    as_run,
    fields_of,
    name_of,
    run_settings,
    save_history,
    save_run,
    versions,
)
from keras_flexast.schedules import schedule_of
from keras_flexast.settings import (
    DEFAULT_SIZE,
    DTYPES,
    FIXED_BY_INIT,
    MAX_DROPOUT,
    DistillSettings,
    Recipe,
    TrainSettings,
)
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.resize import patch_count
from tf_data_pipelines.settings import (
    BASE_PATCH,
    AugmentSettings,
    DataWarning,
    FbankSettings,
    base_and_stride,
    check_between,
    check_choice,
)

FEW_CLIPS = 10  # of validation: one clip is 10 points and more


def train_run(
    data: "PathLike | tf_data_pipelines.ScannedSource",
    out: PathLike,
    *,
    settings: TrainSettings | None = None,
    patch_sizes: Sequence[PatchSize] | None = None,
    frame_shifts_ms: Sequence[float] | None = None,
    augment: AugmentSettings | None = None,
    fbank: FbankSettings | None = None,
    patch_options: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    init: Run | PathLike | None = None,
    teacher: Run | PathLike | None = None,
    distill: DistillSettings | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    command_line: str | None = None,
) -> tuple[Run, keras.callbacks.History]:
    """Train a model on sounds and write the run to `out`.

    The best epoch on the validation clips is kept. While it trains, `OUT.partial` is a run of
    the best weights so far, with the TensorBoard logs and the state of the training; an
    interrupted training leaves it there, and `resume` goes on from it. On a CPU it ends with the
    weights of an unbroken one, bit for bit.

    Args:
        data: folder or .csv manifest, see `tf_data_pipelines.load_source`, or a ScannedSource
            with train and validation clips.
        out: folder of the run.
        settings: TrainSettings; None for the defaults.
        patch_sizes: ints or (frequency, time) pairs; each clip draws one of them. None for
            PATCH_SIZES.
        frame_shifts_ms: frame shifts in milliseconds; each clip draws one of them. None for
            the filterbank's own.
        augment: AugmentSettings; None for no augmentation.
        fbank: FbankSettings; its mean and std are measured on the data. None for the defaults, or
            for those of `init`, of which only clip_ms can change.
        patch_options: dictionary of how patch sizes are drawn, and of the pooling of frames
            before that: settings of PatchSettings, such as patch_weights, clips_per_draw or
            pool_frames. None draws all sizes equally often, one for each clip.
        model_options: dictionary of arguments of PackedAST, such as size, pooling, remainder
            or dropout.
        init: Run, or its folder, to start from, such as a converted checkpoint: its weights,
            its options where model_options name no others, and its filterbank, with the new
            clips' mean and std and, unless fbank has a clip_ms, at their full lengths. Its head is
            kept for the same classes.
        teacher: Run, or its folder, of the same classes, from whose scores of the same clips the
            model learns beside the labels; without fbank and init its filterbank is used.
        distill: DistillSettings; None for the defaults.
        resume: go on with the training that left `OUT.partial`. What is None is as it was there.
        overwrite: whether to replace an existing run.
        progress: whether to show progress bars while the files are read and while the place of
            a training to resume is found.
        command_line: what was typed, to be kept with the run; None in Python.

    Returns:
        Run with the best weights on the validation clips, as saved, and Keras's History.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: there is nothing to resume.
        ValueError: the data cannot be used, a class has no training clip, a clip is longer than
            a row at every patch size, a patch is larger than a spectrogram, model_options do not
            fit the data or `init`, the teacher has other classes or hears another spectrogram,
            the loss became NaN or infinite, or data or options are not those of the training to
            resume.
    """
    from tf_data_pipelines.clips import check_trained
    from tf_data_pipelines.shards import damage_named
    from tf_data_pipelines.sources import read_data

    inputs = [one for one in (data, init, teacher) if isinstance(one, str | os.PathLike)]
    facts = read_facts(partial_of(out)) if resume and resumable(out) else None
    refuse_overwrite(out, overwrite, kind=RUN, inputs=inputs)
    if not resume:
        refuse_partial(out)
    recipe = (Recipe.from_dict(facts["recipe"]) if facts else Recipe()).replaced(
        train=settings, patch_sizes=patch_sizes, frame_shifts_ms=frame_shifts_ms, augment=augment,
        patches=patch_options and dict(patch_options), fbank=fbank,
        model=model_options and dict(model_options), init=_path_of(init),
        teacher=_path_of(teacher), distill=distill,
    )  # fmt: skip
    tutor = teacher_of(recipe.teacher if teacher is None else teacher)
    if facts:
        check_recipe(facts, recipe.to_dict())
        check_teacher(facts, tutor)
        init, front_end = None, FbankSettings.from_dict(facts["run"]["fbank"])
    else:
        init, front_end = _beginning(init, recipe, tutor)
    names = {"data": name_of(data), "init": name_of(recipe.init)}
    shares = recipe.train.validation, recipe.train.test
    data = read_data(data, front_end, shares=shares, progress=progress)
    check_trained(data.source)
    _warn_of_few(data, recipe.train.keep)
    known = data_facts(data)
    keras.utils.set_random_seed(recipe.train.seed)
    if facts:
        check_data(facts, known)
        run = Run(PackedAST.from_config(facts["model"]), **fields_of(facts["run"]))
        check_devices(run.packing)
    else:
        run = _new_run(data, front_end, recipe=recipe, init=init, names=names)
        if command_line:
            run.made_by["command_line"] = command_line
        if tutor:
            run.made_by["teacher"] = {"name": name_of(recipe.teacher), **tutor.made_by}
            run.made_by["distill"] = recipe.distill.to_dict()
        facts = {
            "recipe": recipe.to_dict(),
            "data": known,
            "model": run.model.get_config(),
            "run": run_settings(run),
            "versions": versions(),
            "place": 0,
        }
    train = data.split("train")
    with damage_named(train):  # the validation clips are counted
        taught = tutor and Distillation(run, tutor, recipe.distill, recipe.augment)
        fit = _prepare(run, recipe, data=data, facts=facts, taught=taught, progress=progress)
    with atomic_folder(
        out, overwrite, kind=RUN, inputs=inputs, keep_partial=True, resume=resume
    ) as folder:
        with damage_named(train):
            history = fit(folder)
        save_history(history.history, folder)
        run = _finished(run, folder, recipe)
    (pathlib.Path(out) / STATE).unlink()
    return run, history


def _beginning(init, recipe, teacher):
    """The Run to start from, or None, and FbankSettings without the mean and std of the data."""
    check_between("dropout", recipe.model.get("dropout", 0), 0, MAX_DROPOUT)
    check_choice("dtype", recipe.model.get("dtype", recipe.train.dtype), DTYPES)
    if init is None:
        return None, recipe.fbank or (teacher.fbank if teacher else FbankSettings())
    resized = sorted(set(FIXED_BY_INIT) & set(recipe.model))
    if resized:
        raise ValueError(
            f"model_options: {', '.join(resized)} cannot change, because the weights of init are "
            f"made for their own. Leave them out, or train without init."
        )
    init = as_run(init).full_length()
    if recipe.fbank is None:
        return init, init.fbank
    own = {name: getattr(init.fbank, name) for name in ("mean", "std")}
    front_end = dataclasses.replace(recipe.fbank, **own)
    came, own = dataclasses.asdict(front_end), dataclasses.asdict(init.fbank)
    changed = [name for name in own if name != "clip_ms" and came[name] != own[name]]
    if changed:
        raise ValueError(
            f"fbank cannot change in {', '.join(changed)}, because the weights of init hear with "
            f"their own. Leave fbank out, or change clip_ms alone: dataclasses.replace(run.fbank, "
            f"clip_ms=2000)."
        )
    return init, front_end


def _new_run(data, front_end, *, recipe, init, names):
    """An untrained Run for the clips of a ScannedSource."""
    settings, train = recipe.train, data.split("train")
    if data.source.multi_label and settings.loss == "cross_entropy":
        raise ValueError(
            "loss='cross_entropy' needs one label for each clip, and this data has several. Choose "
            "'binary' or 'auto'."
        )
    fbank = dataclasses.replace(front_end, mean=data.mean, std=data.std)
    model = _new_model(train, fbank, settings=settings, options=recipe.model, init=init)
    patches = model.patch_settings(
        recipe.patch_sizes, frame_shifts_ms=recipe.frame_shifts_ms, **recipe.patches
    )
    packing = _packing(data, fbank, recipe, patches=patches, segments=model.segments)
    return Run(
        model,
        fbank,
        patches=patches,
        packing=packing,
        classes=data.source.classes,
        multi_label=data.source.multi_label,
        clip_seconds=round(float(max(train.durations)), 3),
        shares=(settings.validation, settings.test),
        made_by={
            "command": "train",
            "data": names["data"],
            "settings": settings.to_dict(),
            "augment": recipe.augment.to_dict(),
            "model_options": recipe.model,
            "init": init and {"name": names["init"], **init.made_by},
            "versions": versions(),
        },
    )


def time_cells(data, fbank, stride=BASE_PATCH):
    """Time cells, of `stride` frames each, that cover the longest clip; at least 64."""
    seconds = float(max(data.durations))
    return max(64, math.ceil(seconds * 1000 / (fbank.frame_shift_ms * stride)))


def _warn_of_few(data, keep):
    """Warn where the best epoch is chosen by chance."""
    count = int((data.source.split_names == "validation").sum())
    if keep == "best" and 0 < count < FEW_CLIPS:
        warnings.warn(
            f"the best epoch is chosen on {count} validation clip{'s' * (count > 1)}, which is "
            f"mostly chance. Give more (at least {FEW_CLIPS}), such as by validation=0.2 "
            f"(--validation), or keep the last epoch (keep='last' in a recipe).",
            DataWarning,
            stacklevel=3,
        )  # fmt: skip


def _path_of(path):
    """Where a file or folder is, as text; None for what is in memory."""
    return str(pathlib.Path(path).resolve()) if isinstance(path, str | os.PathLike) else None


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


def _packing(data, fbank, recipe, *, patches, segments):
    """PackSettings for training on data; a warning counts the clips that are too long for them."""
    from tf_data_pipelines.lengths import lengths_warning, training_packing

    settings = recipe.train
    packing = training_packing(
        data.splits(), fbank, patches=patches, augment=recipe.augment, segments=segments,
        batch_tokens=None if settings.batch_clips else settings.batch_tokens,
        batch_clips=settings.batch_clips, row_length=settings.row_length,
        overlong=settings.overlong,
    )  # fmt: skip
    devices = batch_devices()  # each has as many rows
    packing = dataclasses.replace(packing, rows=-(-packing.rows // devices) * devices)
    heard = [data.split("train"), data.split("validation")]
    message = lengths_warning(
        heard, fbank, patches=patches, packing=packing, augment=recipe.augment
    )
    if message:
        warnings.warn(message, DataWarning, stacklevel=3)
    return packing


def _prepare(run, recipe, *, data, facts, taught, progress):
    """Compile the model of a run and check its clips; a function that trains it in a folder."""
    from tf_data_pipelines import lengths, pipeline

    settings = recipe.train
    train, validation = data.split("train"), data.split("validation")
    how = {"patches": run.patches, "packing": run.packing, "seed": settings.seed}
    heard = {"augment": recipe.augment, "teacher": taught and taught.tokens(train)}
    batches = pipeline.training_batches(
        train, run.fbank, start=facts["place"], progress=progress, **heard, **how
    )
    held_out = pipeline.evaluation_batches(validation, run.fbank, cache=True, **how)
    held_out = pipeline.counted(held_out)
    scored = held_out.map(lambda *batch: batch[:3]).repeat()  # one iterator for all epochs
    # Whole steps of the optimizer, so that no gradient waits for the next epoch.
    drawn = {"patches": run.patches, "packing": run.packing}
    steps = lengths.batches_per_epoch(train, run.fbank, **heard, **drawn)
    steps = -(-steps // settings.accumulate) * settings.accumulate
    tune_part(run.model, settings)
    model = taught.model() if taught else run.model
    balanced = settings.class_weights == "balanced"
    compile_packed(
        model,
        schedule_of(settings, steps),
        multi_label=run.multi_label,
        row_length=run.packing.row_length,
        class_weights=class_factors(train.source) if balanced else None,
        **{name: getattr(settings, name) for name in COMPILED},
    )
    measure = [MeanAveragePrecision(held_out, validation.source)] if run.multi_label else []
    meter, pictures = Meter(batches), ClipPictures(run, validation)

    def fit(folder):
        saved = read_state(folder) if (folder / STATE).exists() else None
        board = TrainingBoard(folder / "logs", meter, packing=run.packing, pictures=pictures)
        history = keras.callbacks.History()
        measured = [*measure, board, history]
        callbacks = _callbacks(run, folder, settings=settings, measured=measured, steps=steps)
        checkpoint = Checkpoint(
            folder / STATE, facts, history=history, parts=callbacks, steps=steps,
            minutes=settings.save_minutes, saved=saved,
        )  # fmt: skip
        if checkpoint.place % steps:
            model.evaluate(scored.take(1), verbose=0)  # TensorFlow makes its metrics now
        checkpoint.restore(model)
        if saved is None:
            checkpoint.save(0)
        if not RUN.is_whole(folder):
            save_run(run, folder)  # the checkpoint replaces the model, so it is a run all along
        if not checkpoint.stopped:
            model.fit(
                meter.batches,
                steps_per_epoch=steps,
                initial_epoch=checkpoint.epoch,
                epochs=settings.epochs,
                validation_data=scored,
                validation_steps=int(held_out.cardinality()),
                callbacks=[*callbacks, checkpoint],
                shuffle=False,
            )
        return history

    return fit


def _callbacks(run, folder, *, settings, measured, steps):
    """What happens in a training, in this order; `measured` tells what each epoch came to."""
    metric = "val_mAP" if run.multi_label else "val_accuracy"
    keep = KeepBest(
        folder / "model.keras", metric, always=settings.keep == "last", patience=settings.patience
    )
    averages = []
    if settings.ema is not None:
        averages = [Averages()]
    elif settings.average_epochs > 1:
        averages = [Averages(settings.epochs - settings.average_epochs)]
    stop = StopDiverged(folder, steps)
    # First what reads the loss of each step, and so waits for it: `measured` takes the time.
    return [stop, *measured, keep, *averages]


def _finished(run, folder, recipe):
    """The run with the weights that were kept, float32, as it is in the folder."""
    dtype = recipe.model.get("dtype", recipe.train.dtype)
    if dtype == "float32" and not recipe.train.lora_rank:
        run.model.load_weights(folder / "model.keras")
        run.model.backbone.trainable = True
        return run
    model = PackedAST.from_config({**run.model.get_config(), "dtype": "float32"})
    model.load_weights(folder / "model.keras")
    run = dataclasses.replace(run, model=model)
    save_run(run, folder)
    return run
