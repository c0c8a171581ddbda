"""Training with plain `compile` and `fit`: loss, schedule, callbacks, and a run at the end."""

import dataclasses
import math
import warnings

import keras

from keras_flexast.evaluation import clip_outputs, score_clips
from keras_flexast.files import atomic_folder
from keras_flexast.models import PackedAST
from keras_flexast.runs import Run, save_run
from tf_data_pipelines.settings import (
    BASE_PATCH,
    PATCH_SIZES,
    FbankSettings,
    PackSettings,
    PatchSettings,
    check_choice,
    check_positive,
)

DTYPES = ("float32", "mixed_bfloat16", "mixed_float16")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How long, how fast, and in batches of what shape.

    Args:
        epochs: passes over the training clips.
        learning_rate: at the end of the warm-up; a cosine takes it to zero.
        warmup: share of the steps.
        weight_decay: Adam's decoupled weight decay.
        seed: of the weights, the order and the draws.
        batch_tokens: tokens in a batch.
        row_length: tokens in a row; None for the longest clip's, 256 to 4,096.
        segments: clip slots in a row.
        overlong: "error" or "crop", for clips longer than a row.
        dtype: "float32", "mixed_bfloat16" or "mixed_float16", what the model computes with
            while it trains; its weights, and the run that is saved, are float32.
        rematerialise: less memory for more time, see `PackedModel.rematerialise`.
        accumulate: batches to each step of the optimizer, which takes the mean of their
            gradients: batches of a size that does not fit into memory.
    """

    epochs: int = 20
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 5e-7
    seed: int = 1337
    batch_tokens: int = 4096
    row_length: int | None = None
    segments: int = 16
    overlong: str = "error"
    dtype: str = "float32"
    rematerialise: bool = False
    accumulate: int = 1

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        check_positive("accumulate", self.accumulate, int)

    def packing(self, data, fbank, patches):
        """PackSettings for these clips."""
        from tf_data_pipelines.pipeline import clip_tokens

        row_length = self.row_length
        if row_length is None:
            most = int(clip_tokens(data, fbank, patches).max())
            row_length = min(4096, max(256, -(-most // 64) * 64))
        rows = max(1, self.batch_tokens // row_length)
        return PackSettings(rows, row_length, self.segments, overlong=self.overlong)


def packed_loss(multi_label=False):
    """Loss over the clips of a packed batch, divided by the number of clips.

    The default reduction would divide by rows x segments: the learning rate would shrink
    with every empty slot.
    """
    losses = keras.losses
    kind = losses.BinaryCrossentropy if multi_label else losses.SparseCategoricalCrossentropy
    return kind(from_logits=True, reduction="mean_with_sample_weight")


def compile_packed(
    model, learning_rate, multi_label=False, weight_decay=5e-7, row_length=0, accumulate=1
):
    """Compile a packed model: Adam, the loss above, accuracy of single-label clips, XLA.

    Args:
        model: PackedAST.
        learning_rate: float or schedule.
        multi_label: the labels are (rows, segments, classes).
        weight_decay: of the optimizer.
        row_length: tokens in a row, so that long rows can attend clip by clip, see
            `PackedModel.choose_attention`; 0 for a dense mask.
        accumulate: batches to each step of the optimizer; a schedule still counts batches.
    """
    by_clip = model.choose_attention(row_length)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    optimizer = keras.optimizers.Adam(
        learning_rate, 0.95, 0.999, weight_decay=weight_decay,
        gradient_accumulation_steps=accumulate if accumulate > 1 else None,
    )  # fmt: skip
    if model.get_layer("patch_embed").compute_dtype == "float16":  # its gradients underflow
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer,
        packed_loss(multi_label),
        weighted_metrics=[] if multi_label else [accuracy],
        jit_compile=_can_compile(by_clip),
    )
    model.optimizer.build(model.trainable_variables)  # else TensorFlow traces the step twice


def _can_compile(by_clip):
    """Whether XLA takes the step: on TensorFlow not clip by clip, nor over several devices."""
    if keras.backend.backend() != "tensorflow":
        return True
    import tensorflow as tf

    return not by_clip and tf.distribute.get_strategy().num_replicas_in_sync == 1


@keras.saving.register_keras_serializable(package="keras_flexast")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up and cosine decay to zero, once for each stage of a training.

    Args:
        learning_rate: at the end of each warm-up.
        stages: steps of each stage; several restart the schedule without compiling again.
        warmup: share of a stage's steps.
    """

    def __init__(self, learning_rate, stages, warmup=0.1):
        self.learning_rate = learning_rate
        self.stages = tuple(stages)
        self.warmup = warmup

    def __call__(self, step):
        ops = keras.ops
        step = ops.cast(step, "float32")
        value, start = ops.zeros(()), 0
        for steps in self.stages:
            rise = max(1.0, self.warmup * steps)
            done = step - start
            part = ops.clip((done - rise) / max(1.0, steps - rise), 0, 1)
            here = ops.minimum((done + 1) / rise, 0.5 * (1 + ops.cos(math.pi * part)))
            value = ops.where(done >= 0, self.learning_rate * here, value)
            start += steps
        return value

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "stages": self.stages,
            "warmup": self.warmup,
        }


class MeanAveragePrecision(keras.callbacks.Callback):
    """Adds the exact `val_mAP` to the logs at the end of each epoch (multi-label data).

    Args:
        batches: of `tf_data_pipelines.evaluation_batches`.
        source: Source of the validation clips.
    """

    def __init__(self, batches, source):
        super().__init__()
        self.batches = batches
        self.source = source

    def on_epoch_end(self, epoch, logs=None):
        logits, _ = clip_outputs(self.model, self.batches, len(self.source))
        logs["val_mAP"] = score_clips(self.source, logits)[1]


def steps_per_epoch(data, fbank, patches, packing):
    """Batches in one pass over the clips, from their mean tokens over the patch sizes."""
    from tf_data_pipelines.pipeline import clip_tokens

    tokens = clip_tokens(data, fbank, patches).mean(0).sum()
    by_tokens = tokens / (packing.rows * packing.row_length)
    by_slots = len(data.source) / (packing.rows * packing.segments)
    return max(1, math.ceil(max(by_tokens, by_slots)))


def train_run(
    train, validation, out, patches=None, settings=None, model_options=None, overwrite=False,
    init=None,
):  # fmt: skip
    """Train a model on scanned clips and write the run to `out`.

    While it trains, `OUT.partial` is a run of the best weights so far, with the TensorBoard
    logs; an interrupted training leaves it there.

    Args:
        train, validation: scanned sources of the two splits.
        out: folder of the run.
        patches: PatchSettings; None for random sizes of PATCH_SIZES, cover, physical. Its
            grid, base patch and prefix tokens follow from the model.
        settings: TrainSettings.
        model_options: keyword arguments of PackedAST, such as size or pooling.
        overwrite: replace an existing run.
        init: Run to start from, such as a converted checkpoint: its weights, sizes and
            filterbank, with the new clips' mean and std and at their own lengths. Its head
            is kept for the same classes.

    Returns:
        Run with the best weights on the validation clips, as saved, and Keras's History.

    Raises:
        FileExistsError: `out` exists.
        ValueError: a clip is longer than a row, or a patch larger than a spectrogram.
    """
    from tf_data_pipelines.pipeline import evaluation_batches, training_batches

    settings = settings or TrainSettings()
    patches = patches or PatchSettings(patch_sizes=PATCH_SIZES)
    source = train.source
    front_end = FbankSettings() if init is None else init.full_length().fbank
    fbank = dataclasses.replace(front_end, mean=train.mean, std=train.std)
    keras.utils.set_random_seed(settings.seed)
    options = {
        "segments": settings.segments,
        "remainder": patches.remainder,
        "position": patches.position,
        "resize": patches.resize,
        "dtype": settings.dtype,
        **(model_options or {}),
    }
    if init is None:
        grid = fbank.mel_bins // BASE_PATCH, time_cells(train, fbank)
        model = PackedAST(len(source.classes), **{"size": "tiny", "grid": grid, **options})
    else:
        model = _warm_start(init, source.classes, options)
    patches = model.patch_settings(patches.patch_sizes, frame_shifts_ms=patches.frame_shifts_ms)
    packing = settings.packing(train, fbank, patches)

    # Whole steps of the optimizer, so that no gradient waits for the next epoch.
    steps = steps_per_epoch(train, fbank, patches, packing)
    steps = -(-steps // settings.accumulate) * settings.accumulate
    batches = training_batches(train, fbank, patches, packing, settings.seed)
    held_out = evaluation_batches(validation, fbank, patches, packing, settings.seed)
    schedule = WarmupCosine(settings.learning_rate, [steps * settings.epochs], settings.warmup)
    if settings.rematerialise:
        model.rematerialise()
    compile_packed(
        model, schedule, source.multi_label, settings.weight_decay, packing.row_length,
        settings.accumulate,
    )  # fmt: skip
    run = Run(
        model, fbank, patches, packing, source.classes, source.multi_label,
        clip_seconds=round(float(max(train.durations)), 3),
    )  # fmt: skip
    with atomic_folder(out, overwrite, keep_partial=True) as folder:
        save_run(run, folder)  # the checkpoint replaces the model, so it is a run all along
        checkpoint = keras.callbacks.ModelCheckpoint(
            folder / "model.keras",
            "val_mAP" if source.multi_label else "val_accuracy",
            save_best_only=True,
            mode="max",
            initial_value_threshold=0.0,
        )
        checkpoint.monitor_op = keras.ops.greater_equal  # of equal epochs the last
        callbacks = [checkpoint, keras.callbacks.TensorBoard(folder / "logs", write_graph=False)]
        if source.multi_label:
            callbacks.insert(0, MeanAveragePrecision(held_out, validation.source))
        with warnings.catch_warnings():
            # Keras takes a validation set of unknown size for one that ended too early.
            warnings.filterwarnings("ignore", "Your input ran out of data")
            history = model.fit(
                batches,
                steps_per_epoch=steps,
                epochs=settings.epochs,
                validation_data=held_out.map(lambda *batch: batch[:3]),
                callbacks=callbacks,
                shuffle=False,
            )
        model.load_weights(folder / "model.keras")
        if settings.dtype != "float32":
            config = {**model.get_config(), "dtype": "float32"}
            run = dataclasses.replace(run, model=PackedAST.from_config(config))
            run.model.set_weights(model.get_weights())
            save_run(run, folder)
    return run, history


def _warm_start(init, classes, options):
    """A model for these classes with the weights of a run; other classes have a new head."""
    model = PackedAST.from_config(
        {**init.model.get_config(), "num_classes": len(classes), **options}
    )
    for layer in model.layers:
        if layer.name != "head" or tuple(classes) == tuple(init.classes):
            layer.set_weights(init.model.get_layer(layer.name).get_weights())
    return model


def time_cells(data, fbank):
    """Time cells of a position table that covers the longest clip, at least 64."""
    seconds = float(max(data.durations))
    return max(64, math.ceil(seconds * 1000 / (fbank.frame_shift_ms * BASE_PATCH)))
