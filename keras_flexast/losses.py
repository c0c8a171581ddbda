"""The loss of a packed batch."""

import keras

from keras_flexast.distribution import sum_over_devices


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedLoss(keras.losses.Loss):
    """Cross-entropy over the clips of a packed batch, divided by the number of clips.

    The default reduction would divide by rows x segments: the learning rate would shrink
    with every empty slot. Keras's mean over the weights would, on several devices, be the mean
    of the devices' means, in which a clip counts less where its device holds more of them.

    Args:
        multi_label: whether the labels are (rows, segments, classes).
        name: name of the loss.
    """

    def __init__(self, multi_label=False, name="packed_loss"):
        super().__init__(name=name, reduction="sum")
        self.multi_label = multi_label

    def call(self, labels, logits):
        kind = "binary" if self.multi_label else "sparse_categorical"
        return getattr(keras.losses, f"{kind}_crossentropy")(labels, logits, from_logits=True)

    def __call__(self, y_true, y_pred, sample_weight=None):
        if sample_weight is None:
            sample_weight = keras.ops.ones(keras.ops.shape(y_pred)[:-1])
        total = super().__call__(y_true, y_pred, sample_weight)
        total, clips, devices = sum_over_devices(
            total, keras.ops.cast(keras.ops.sum(sample_weight), total.dtype)
        )
        # Keras adds up the gradients of the devices, and multiplies the values that it reports.
        return keras.ops.divide_no_nan(total, clips) / devices

    def get_config(self):
        return {"multi_label": self.multi_label, "name": self.name}


def packed_loss(multi_label=False):
    """The loss of a packed batch, see PackedLoss."""
    return PackedLoss(multi_label)
