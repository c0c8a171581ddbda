"""A packed model made ready for `fit`: optimizer, loss, metrics, XLA."""

import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_flexast.distribution import batch_devices
from keras_flexast.layers import MaskedSelfAttention
from keras_flexast.layers.kernels import current_site
from keras_flexast.losses import PackedAccuracy, PackedLoss
from keras_flexast.settings import TrainSettings

COMPILED = (  # settings that `compile_packed` takes
    "optimizer", "betas", "weight_decay", "decay_all", "clip_norm", "layer_decay", "accumulate",
    "ema", "loss", "label_smoothing",
)  # fmt: skip
BLOCK, BELOW = re.compile(r"\bblock_(\d+)/"), re.compile(r"\b(patch_embed|position_embed|prefix)")


def compile_packed(
    model: keras.Model,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    *,
    multi_label: bool = False,
    row_length: int | None = None,
    class_weights: Sequence[float] | np.ndarray | None = None,
    **settings: Any,
) -> None:
    """Compile a packed model: optimizer, PackedLoss, accuracy of single-label clips, XLA.

    Args:
        model: PackedAST, or another model on packed batches.
        learning_rate: float or schedule; a schedule counts batches.
        multi_label: whether a clip may have several labels.
        row_length: tokens in a row of the batches to come, so that XLA compiles the step
            where it is fastest; None leaves that to Keras's `jit_compile="auto"`.
        class_weights: float (classes,), see PackedLoss.
        **settings: those of TrainSettings that are named in COMPILED.

    Raises:
        ValueError: a setting is unknown or wrong, or accumulate is above 1 or clip_norm is given
            for several devices of TensorFlow's.
    """
    unknown = sorted(set(settings) - set(COMPILED))
    if unknown:
        raise ValueError(
            f"compile_packed has no setting {', '.join(unknown)}; it has {', '.join(COMPILED)}."
        )
    checked = TrainSettings(**settings)
    _check_devices(checked)
    optimizer = _optimizer(learning_rate, checked)
    optimizer = scaled(optimizer, model)
    loss = PackedLoss(
        multi_label,
        from_logits=getattr(model, "activation", None) is None,  # AudioClassifier has scores
        kind=checked.loss,
        label_smoothing=checked.label_smoothing,
        class_weights=class_weights,
    )
    model.compile(
        optimizer,
        loss,
        weighted_metrics=[] if multi_label else [PackedAccuracy()],
        jit_compile=jit_compile(model, row_length),
    )
    model.optimizer.build(model.trainable_variables)  # else TensorFlow traces the step twice


def scaled(optimizer, model):
    """An optimizer that scales the loss where a layer computes in float16: gradients underflow."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer
    if all(layer.compute_dtype != "float16" for layer in model._flatten_layers()):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer)


def _check_devices(settings):
    """Raise where Keras computes something else inside a tf.distribute strategy."""
    if keras.backend.backend() != "tensorflow" or batch_devices() == 1:
        return
    if settings.accumulate > 1:
        raise ValueError(
            f"accumulate={settings.accumulate}: Keras cannot accumulate gradients inside a "
            f"strategy of tf.distribute. Leave it out, pass fewer batch_clips, or use JAX."
        )
    if settings.clip_norm is not None:
        raise ValueError(
            f"clip_norm={settings.clip_norm}: Keras clips the gradient of each device alone inside "
            f"a strategy of tf.distribute. Leave it out, or use JAX."
        )


def _optimizer(learning_rate, settings):
    kind, options = PackedMuon, {}
    if settings.optimizer != "muon":
        kind, options = PackedAdam, {"decoupled": settings.optimizer == "adamw"}
    if settings.ema is not None:
        options |= {"use_ema": True, "ema_momentum": settings.ema}
    return kind(
        learning_rate, *settings.betas,
        weight_decay=settings.weight_decay,
        decay_all=settings.decay_all,
        layer_decay=settings.layer_decay,
        global_clipnorm=settings.clip_norm,
        gradient_accumulation_steps=settings.accumulate if settings.accumulate > 1 else None,
        **options,
    )  # fmt: skip


def jit_compile(model, row_length):
    """Whether XLA compiles the step. Keras's "auto" leaves it out on a CPU, where it is faster."""
    site = current_site(row_length)
    if row_length is None or site.device != "cpu" or site.distributed:
        return "auto"
    layers = [one for one in model._flatten_layers() if isinstance(one, MaskedSelfAttention)]
    return all(layer.kernel(row_length).supports_jit for layer in layers)


class _ByLayer:
    """An optimizer whose learning rate falls from block to block, and whose decay spares weights.

    Args:
        weight_decay: weight decay.
        decoupled: whether it is decoupled from the gradient, as in AdamW, or added to it.
        decay_all: whether biases, norms, position tables, prefix tokens and the query of the
            pooling decay, too.
        layer_decay: factor on the learning rate from each block to the one below it. Pooling and
            head have the factor 1, the last block layer_decay, and so on; the embeddings are
            below the first block.
        **kwargs: arguments of the optimizer.
    """

    def __init__(self, *, weight_decay, decoupled, decay_all, layer_decay, **kwargs):
        super().__init__(weight_decay=None, **kwargs)  # Keras's own cannot spare weights by layer
        self.decay = weight_decay
        self.decoupled = decoupled
        self.decay_all = decay_all
        self.layer_decay = layer_decay

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        paths = [variable.path for variable in variables]
        blocks = [int(found[1]) for found in map(BLOCK.search, paths) if found]
        depth = 1 + max(blocks, default=-1)
        self._rates = tuple(self.layer_decay ** _layers_above(path, depth) for path in paths)
        self._decays = tuple(
            self.decay if self.decay_all or _is_matrix(variable) else 0.0 for variable in variables
        )

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        rate = ops.cast(learning_rate, variable.dtype) * self._rates[index]
        if self._decays[index] and self.decoupled:
            self.assign_sub(variable, ops.multiply(variable, rate * self._decays[index]))
        elif self._decays[index]:
            gradient = ops.add(gradient, ops.multiply(variable, self._decays[index]))
        super().update_step(gradient, variable, rate)

    def get_config(self):
        return {
            **super().get_config(),
            "weight_decay": self.decay,
            "decay_all": self.decay_all,
            "layer_decay": self.layer_decay,
        }


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedAdam(_ByLayer, keras.optimizers.Adam):
    """Adam whose learning rate falls from block to block, and whose decay may spare weights.

    Args:
        learning_rate, beta_1, beta_2: as in keras.optimizers.Adam.
        weight_decay: weight decay, added to the gradient.
        decoupled: whether it is decoupled from the gradient instead, as in AdamW.
        decay_all: whether biases, norms, position tables, prefix tokens and the query of the
            pooling decay, too.
        layer_decay: factor on the learning rate from each block to the one below it. Pooling and
            head have the factor 1, the last block layer_decay, and so on; the
            embeddings are below the first block.
        **kwargs: as in keras.optimizers.Adam.

    Reference: Loshchilov and Hutter 2019 (arXiv:1711.05101) for the decoupled decay.
    """

    def __init__(
        self, learning_rate=1e-3, beta_1=0.95, beta_2=0.999, *, weight_decay=0.0, decoupled=False,
        decay_all=True, layer_decay=1.0, **kwargs,
    ):  # fmt: skip
        super().__init__(
            learning_rate=learning_rate, beta_1=beta_1, beta_2=beta_2, weight_decay=weight_decay,
            decoupled=decoupled, decay_all=decay_all, layer_decay=layer_decay, **kwargs,
        )  # fmt: skip

    def get_config(self):
        return {**super().get_config(), "decoupled": self.decoupled}


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedMuon(_ByLayer, keras.optimizers.Muon):
    """Muon for the matrices of the encoder's blocks, AdamW for all other weights.

    Muon makes the momentum of a matrix nearly orthogonal before it is subtracted, so that every
    direction moves alike; scaled so that the learning rates and decays of AdamW suit it. In a model
    without EncoderBlocks named block_0, block_1, ... all weights have AdamW.

    Args:
        learning_rate: as in keras.optimizers.Muon.
        adam_beta_1, adam_beta_2: decay rates of AdamW's two moments.
        weight_decay, decay_all, layer_decay: as in PackedAdam; the decay is decoupled.
        **kwargs: as in keras.optimizers.Muon.

    Reference: Liu et al. 2025 (arXiv:2502.16982).
    """

    def __init__(
        self, learning_rate=1e-3, adam_beta_1=0.9, adam_beta_2=0.999, *, weight_decay=0.0,
        decay_all=True, layer_decay=1.0, **kwargs,
    ):  # fmt: skip
        super().__init__(
            learning_rate=learning_rate, adam_beta_1=adam_beta_1, adam_beta_2=adam_beta_2,
            weight_decay=weight_decay, decoupled=True, decay_all=decay_all,
            layer_decay=layer_decay, **{**kwargs, "adam_weight_decay": None},  # _ByLayer decays
        )  # fmt: skip

    def _should_use_adamw(self, variable):
        of_block = BLOCK.search(variable.path) and variable.name == "kernel"
        return not of_block or super()._should_use_adamw(variable)


def _layers_above(path, depth):
    """How many blocks, and one for the head, lie above the weight of this path."""
    block = BLOCK.search(path)
    if block:
        return depth - int(block[1])
    return depth + 1 if BELOW.search(path) else 0


def _is_matrix(variable):
    """Whether a weight is a kernel: no bias, norm, table of positions, or learned token."""
    return len(variable.shape) > 1 and not re.search(
        r"\b(position_embed|prefix_tokens)\b", variable.path
    )
