"""The loss of a packed batch, and its accuracy, on labels that are hard or soft."""

import keras
from keras import ops

from keras_flexast.distribution import sum_over_devices
from keras_flexast.settings import LOSSES, MAX_SMOOTHING
from tf_data_pipelines.settings import check_between, check_choice


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedLoss(keras.losses.Loss):
    """Cross-entropy over the clips of a packed batch, divided by the number of clips.

    The default reduction would divide by rows x segments: the learning rate would shrink
    with every empty slot. Keras's mean over the weights would, on several devices, be the mean
    of the devices' means, in which a clip counts less where its device holds more of them.

    Args:
        multi_label: whether a clip may have several labels.
        kind: "cross_entropy" over the classes, "binary" cross-entropy of each class, or "auto":
            binary if multi_label.
        label_smoothing: share of each label that is spread: over all classes, or, in binary
            cross-entropy, between yes and no.
        class_weights: float (classes,), factor on the loss of a clip of each class; the mean over
            the classes of a clip that has several. None for 1.
        from_logits: whether the model gives logits, or else scores: sigmoid of several labels,
            softmax of one.
        name: name of the loss.

    Call arguments:
        y_true: int (rows, segments), or float (rows, segments, classes): several labels, or one
            that is shared out, as after mixup.
        y_pred: logits or scores, float (rows, segments, classes).
        sample_weight: float (rows, segments); 0 in empty slots.
    """

    def __init__(
        self, multi_label=False, *, kind="auto", label_smoothing=0.0, class_weights=None,
        from_logits=True, name="packed_loss",
    ):  # fmt: skip
        super().__init__(name=name, reduction="sum")
        check_choice("kind", kind, LOSSES)
        check_between("label_smoothing", label_smoothing, 0, MAX_SMOOTHING)
        self.multi_label = multi_label
        self.kind = kind
        self.label_smoothing = label_smoothing
        self.class_weights = None if class_weights is None else tuple(map(float, class_weights))
        self.from_logits = from_logits

    def call(self, labels, logits):
        binary = self.kind == "binary" or (self.kind == "auto" and self.multi_label)
        if not self.from_logits:
            logits = _logits_of(logits, binary)
        hard = len(labels.shape) < len(logits.shape)
        if hard and not (binary or self.label_smoothing or self.class_weights):
            return keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        classes = logits.shape[-1]
        shares = ops.one_hot(ops.cast(labels, "int32"), classes) if hard else labels
        shares = ops.cast(shares, logits.dtype)
        smooth = self.label_smoothing
        targets = shares * (1 - smooth) + smooth / (2 if binary else classes)
        if binary:
            loss = keras.losses.binary_crossentropy(targets, logits, from_logits=True)
        else:
            loss = -ops.sum(targets * ops.log_softmax(logits), -1)
        return loss if self.class_weights is None else loss * self._weights_of(shares)

    def _weights_of(self, shares):
        """Factor on each clip (rows, segments), from the classes that it has; 1 without any."""
        weights = ops.convert_to_tensor(self.class_weights, dtype=shares.dtype)
        total = ops.sum(shares, -1)
        mean = ops.divide_no_nan(ops.sum(shares * weights, -1), total)
        return ops.where(total > 0, mean, 1.0)

    def __call__(self, y_true, y_pred, sample_weight=None):
        if sample_weight is None:
            sample_weight = ops.ones(ops.shape(y_pred)[:-1])
        total = super().__call__(y_true, y_pred, sample_weight)
        total, clips, devices = sum_over_devices(
            total, ops.cast(ops.sum(sample_weight), total.dtype)
        )
        # Keras adds up the gradients of the devices, and multiplies the values that it reports.
        return ops.divide_no_nan(total, clips) / devices

    def get_config(self):
        return {
            "multi_label": self.multi_label,
            "kind": self.kind,
            "label_smoothing": self.label_smoothing,
            "class_weights": self.class_weights,
            "from_logits": self.from_logits,
            "name": self.name,
        }


def _logits_of(scores, binary):
    """Logits of which each sigmoid, or else the softmax, is these scores."""
    scores = ops.clip(scores, keras.config.epsilon(), 1 - keras.config.epsilon())
    return ops.log(scores) - (ops.log(1 - scores) if binary else 0)


@keras.saving.register_keras_serializable(package="keras_flexast")
def packed_accuracy(labels, logits):
    """Whether the largest logit is that of the label, or of its largest share, (rows, segments)."""
    if len(labels.shape) == len(logits.shape):
        labels = ops.argmax(labels, -1)
    return ops.cast(ops.equal(ops.argmax(logits, -1), ops.cast(labels, "int32")), "float32")


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedAccuracy(keras.metrics.MeanMetricWrapper):
    """Share of clips whose largest logit is their label's, or that of its largest share."""

    def __init__(self, name="accuracy", dtype=None):
        super().__init__(packed_accuracy, name=name, dtype=dtype)

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype}


def class_factors(source):
    """Factor for each class by which all classes count alike in the loss, float (classes,).

    Args:
        source: Source of the training clips. A class without clips has the factor 1.
    """
    counts = [0] * len(source.classes)
    for (label, _), count in source.label_counts().items():
        counts[label] += count
    present = sum(count > 0 for count in counts)
    return tuple(sum(counts) / (present * count) if count else 1.0 for count in counts)
