"""Distillation: a student at a random patch size learns from a teacher at its own, beside it.

Both hear the same clips in the same slots of packed rows; see `tf_data_pipelines.distillation`.
"""

import dataclasses

import keras
from keras import ops

from keras_flexast.losses import PackedLoss
from keras_flexast.models import PackedAST
from keras_flexast.runs import Run, as_run
from keras_flexast.settings import DistillSettings
from tf_data_pipelines.settings import MAX_ROW_LENGTH, AugmentSettings, round_row_length

PREFIX = "teacher_"  # of what the teacher hears, among the inputs
SLACK = 1.25  # of the teacher's rows over what its clips need on average: ours are 95 to 100 % full
PARTS = ("backbone", "pooling", "head_norm", "head")  # of a PackedAST


@keras.saving.register_keras_serializable(package="keras_flexast")
class DistillationLoss(PackedLoss):
    """Kullback-Leibler divergence from a teacher's scores to a student's, a mean over the clips.

    Both models' logits are divided by the temperature, and the divergence is multiplied by its
    square, so that the gradient keeps its size (Hinton et al. 2015, arXiv:1503.02531). Of
    multi-label clips it is that of each label on its own (sigmoid), a mean over the classes as in
    binary cross-entropy.

    Args:
        multi_label: whether scores are independent (sigmoid), else softmax.
        temperature: what the logits are divided by.
        name: name of the loss.

    Call arguments:
        y_true: logits of the teacher, float (rows, segments, classes).
        y_pred: logits of the student, likewise.
        sample_weight: float (rows, segments), 0 for an empty slot.
    """

    def __init__(self, multi_label=False, temperature=1.0, name="distillation_loss"):
        super().__init__(multi_label, name=name)
        self.multi_label = multi_label
        self.temperature = temperature

    def call(self, teacher, student):
        teacher, student = (
            ops.cast(logits, "float32") / self.temperature for logits in (teacher, student)
        )
        if self.multi_label:
            target = ops.sigmoid(teacher)
            each = target * (ops.log_sigmoid(teacher) - ops.log_sigmoid(student))
            each += (1 - target) * (ops.log_sigmoid(-teacher) - ops.log_sigmoid(-student))
            return self.temperature**2 * ops.mean(each, -1)
        gap = ops.log_softmax(teacher) - ops.log_softmax(student)
        return self.temperature**2 * ops.sum(ops.softmax(teacher) * gap, -1)

    def get_config(self):
        return {
            "multi_label": self.multi_label, "temperature": self.temperature, "name": self.name
        }  # fmt: skip


class DistilledModel(keras.Model):
    """A student as a functional model of its own layers, which learns from a frozen teacher.

    Compile and fit it like the student, on batches of `training_batches(..., teacher=...)`. On
    batches without a teacher's tokens, such as the validation's, its loss and metrics are those
    of the student alone, and `save` saves the student.

    Args:
        student: PackedAST; its layers are shared.
        teacher: PackedAST of the same classes and segments.
        loss: DistillationLoss.
        weight: share of the teacher's loss in the whole.
    """

    def __init__(self, student, teacher, *, loss, weight):
        super().__init__(inputs=student.input, outputs=student.output, name=student.name)
        teacher.trainable = False
        self.student, self.teacher = student, teacher
        self.distillation_loss, self.weight = loss, weight
        for name in (*PARTS, "pooling_name"):
            setattr(self, name, getattr(student, name))

    def call(self, inputs, training=None, mask=None):
        own = {name: inputs[name] for name in self.student.input}
        return super().call(own, training=training, mask=mask)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred=y_pred, sample_weight=sample_weight)
        if f"{PREFIX}tokens" not in x:
            return loss
        heard = {name: x[PREFIX + name] for name in self.teacher.input}
        logits = ops.stop_gradient(self.teacher(heard, training=False))
        taught = self.distillation_loss(logits, y_pred, sample_weight=sample_weight)
        return (1 - self.weight) * loss + self.weight * taught

    def save(self, filepath, overwrite=True, **options):
        self.student.save(filepath, overwrite=overwrite, **options)


def teacher_of(run):
    """A Run or the run in a folder as a teacher, which hears whole clips; None for None."""
    return None if run is None else as_run(run).full_length()


@dataclasses.dataclass(frozen=True)
class Distillation:
    """A teacher beside the training of a run.

    Args:
        run: Run of the student.
        teacher: Run that teaches, see `teacher_of`.
        settings: DistillSettings.
        augment: AugmentSettings of the training.

    Raises:
        ValueError: the teacher has other classes, or hears another spectrogram than the student.
    """

    run: Run
    teacher: Run
    settings: DistillSettings
    augment: AugmentSettings

    def __post_init__(self):
        self._check_answers()
        self._check_ears()

    def _check_answers(self):
        run, teacher = self.run, self.teacher
        if teacher.classes != run.classes:
            lone = sorted({*teacher.classes} ^ {*run.classes})
            what = f"only one of them has {lone[0]!r}" if lone else "their order differs"
            raise ValueError(
                f"teacher has {len(teacher.classes)} classes, the data {len(run.classes)}: {what}. "
                f"Choose a teacher that was trained on the same classes."
            )
        if teacher.multi_label != run.multi_label:
            kinds = {True: "each label on its own", False: "one label a clip"}
            raise ValueError(
                f"teacher scores {kinds[teacher.multi_label]}, the data has "
                f"{kinds[run.multi_label]}. Choose a teacher that was trained on such data."
            )

    def _check_ears(self):
        ours, theirs = self.run.fbank, self.teacher.fbank
        for field in dataclasses.fields(ours):
            came, expected = getattr(theirs, field.name), getattr(ours, field.name)
            if field.name not in ("mean", "std", "clip_ms") and came != expected:
                raise ValueError(
                    f"teacher hears with {field.name}={came}, the student with {expected}. Train "
                    f"with the teacher's filterbank (fbank, or the same --init)."
                )
        heard = self.teacher.patches.frame_shifts_ms or (theirs.frame_shift_ms,)
        listed, drawn = self.run.patches.frame_shifts_ms, self.augment.frame_shift_range_ms
        other = sorted({*listed} - {*heard})
        other += [one for one in drawn if not min(heard) <= one <= max(heard)]
        if other:
            raise ValueError(
                f"frame_shifts_ms={listed or drawn} must be within those of the teacher, "
                f"{', '.join(f'{one:g}' for one in heard)}; it was not trained at {other[0]:g}."
            )

    def tokens(self, train):
        """TeacherTokens for `training_batches`.

        Their rows are long enough for every clip, and for the clips of one of the student's rows.

        Args:
            train: ScannedSource of the training clips.
        """
        from tf_data_pipelines.distillation import TeacherTokens
        from tf_data_pipelines.lengths import clip_tokens, mean_tokens

        run, augment = self.run, self.augment
        size = self.settings.patch_size or self.teacher.model.backbone.base_patch
        patches = self.teacher.patches_at([size])
        counted = dataclasses.replace(patches, frame_shifts_ms=run.patches.frame_shifts_ms)
        (theirs,) = clip_tokens(train, run.fbank, counted, augment)
        ours = mean_tokens(
            train, run.fbank, patches=run.patches, packing=run.packing, augment=augment
        )
        beside = SLACK * run.packing.row_length * theirs.sum() / ours.sum()
        row_length = round_row_length(int(max(theirs.max(), beside)))
        return TeacherTokens(self.teacher.fbank, patches, min(MAX_ROW_LENGTH, row_length))

    def model(self):
        """DistilledModel of the run's own model; the teacher computes with the student's dtype."""
        student, given = self.run.model, self.teacher.model
        policy = student.get_config()["dtype"]
        teacher = PackedAST.from_config(
            {**given.get_config(), "segments": student.segments, "dtype": policy, "remat": False}
        )
        teacher.set_weights(given.get_weights())
        settings = self.settings
        loss = DistillationLoss(self.run.multi_label, settings.temperature)
        return DistilledModel(student, teacher, loss=loss, weight=settings.weight)
