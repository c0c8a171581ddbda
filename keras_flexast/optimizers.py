"""A packed model made ready for `fit`: optimizer, loss, metrics, XLA."""

import keras

from keras_flexast.distribution import batch_devices
from keras_flexast.layers import MaskedSelfAttention
from keras_flexast.layers.kernels import choose_kernel, current_site
from keras_flexast.losses import packed_loss


def compile_packed(
    model, learning_rate, *, multi_label=False, weight_decay=5e-7, row_length=None, accumulate=1
):
    """Compile a packed model: Adam, the loss above, accuracy of single-label clips, XLA.

    Args:
        model: PackedAST, or another model on packed batches.
        learning_rate: float or schedule.
        multi_label: whether the labels are (rows, segments, classes).
        weight_decay: decoupled weight decay of the optimizer.
        row_length: tokens in a row of the batches to come, so that XLA compiles the step
            where it is fastest; None leaves that to Keras's `jit_compile="auto"`.
        accumulate: batches to each step of the optimizer; a schedule still counts batches.

    Raises:
        ValueError: accumulate is above 1 for several devices of TensorFlow's.
    """
    if accumulate > 1 and keras.backend.backend() == "tensorflow" and batch_devices() > 1:
        raise ValueError(
            f"accumulate={accumulate}: Keras cannot accumulate gradients inside a strategy of "
            f"tf.distribute. Leave it out, pass fewer batch_tokens, or use JAX."
        )
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    optimizer = keras.optimizers.Adam(
        learning_rate, 0.95, 0.999, weight_decay=weight_decay,
        gradient_accumulation_steps=accumulate if accumulate > 1 else None,
    )  # fmt: skip
    if any(layer.compute_dtype == "float16" for layer in model._flatten_layers()):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)  # its gradients underflow
    model.compile(
        optimizer,
        packed_loss(multi_label),
        weighted_metrics=[] if multi_label else [accuracy],
        jit_compile=_jit_compile(model, row_length),
    )
    model.optimizer.build(model.trainable_variables)  # else TensorFlow traces the step twice


def _jit_compile(model, row_length):
    """Whether XLA compiles the step. Keras's "auto" leaves it out on a CPU, where it is faster."""
    site = current_site(row_length)
    if row_length is None or site.device != "cpu" or site.distributed:
        return "auto"
    layers = [one for one in model._flatten_layers() if isinstance(one, MaskedSelfAttention)]
    return all(choose_kernel(layer.attention, site).supports_jit for layer in layers)
