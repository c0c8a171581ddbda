"""What happens between the epochs of a training."""

import math

import keras
import numpy as np

from keras_flexast.evaluation import score_clips
from keras_flexast.inference.scoring import PackedPredictor, packed_outputs
from keras_flexast.runs import save_model


class MeanAveragePrecision(keras.callbacks.Callback):
    """Adds the exact `val_mAP` to the logs at the end of each epoch (multi-label data).

    Args:
        batches: batches of `tf_data_pipelines.evaluation_batches`.
        source: Source of the validation clips.
    """

    def __init__(self, batches, source):
        super().__init__()
        self.batches = batches
        self.source = source

    def on_train_begin(self, logs=None):
        self.predictor = PackedPredictor(self.model)

    def on_epoch_end(self, epoch, logs=None):
        logits, _ = packed_outputs(self.predictor, self.batches, len(self.source))
        logs["val_mAP"] = score_clips(self.source, logits)["value"]


class StopDiverged(keras.callbacks.Callback):
    """Raises a ValueError as soon as a loss is NaN or infinite, before such weights are saved.

    Args:
        folder: where the best weights so far are, for the message.
        steps: number of batches in an epoch.
    """

    def __init__(self, folder, steps):
        super().__init__()
        self.folder = folder
        self.steps = steps
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        start = self.epoch * self.steps + batch
        self._check(logs["loss"], f"step {batch + 1} of", start)

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs.get("val_loss", 0.0), "the validation after")

    def _check(self, loss, place, start=None):
        if math.isfinite(loss):
            return
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        kept = "the best weights so far" if self.epoch else "the weights from before the training"
        clips = (
            f", on the clips of training_batches(..., start={start})" if start is not None else ""
        )
        raise ValueError(
            f"the loss is {loss} in {place} epoch {self.epoch + 1}, at a learning rate of "
            f"{rate:g}{clips}. Lower it (learning_rate, --learning-rate). {self.folder} holds "
            f"{kept}."
        )


class KeepBest(keras.callbacks.Callback):
    """Saves the model at the end of each epoch that is the best so far, of equal ones the last.

    The file is replaced whole: a kill at any moment leaves the one or the other. NaN never wins.

    Args:
        path: path of the `.keras` file.
        metric: name of a metric in the logs; larger is better, from 0.
        always: whether to save after every epoch, the best or not.
        patience: number of epochs that are not better after which the training stops; None for
            any number.
    """

    def __init__(self, path, metric, *, always=False, patience=None):
        super().__init__()
        self.path = path
        self.metric = metric
        self.always = always
        self.patience = patience
        self.best = 0.0
        self.waited = 0

    def state(self):
        return {"best": self.best, "waited": self.waited}, []

    def restore(self, numbers, arrays):
        self.best, self.waited = numbers["best"], numbers["waited"]

    def on_epoch_end(self, epoch, logs=None):
        value = float(logs[self.metric])
        self.waited = 0 if value > self.best else self.waited + 1
        if value >= self.best or self.always:
            save_model(self.model, self.path)
        self.best = max(self.best, value) if math.isfinite(value) else self.best
        if self.patience is not None and self.waited >= self.patience:
            self.model.stop_training = True


class Averages(keras.callbacks.Callback):
    """Averaged weights while the model is validated and saved; then it trains on as it was.

    They are the optimizer's exponential moving average, or the mean over the ends of epochs. It
    comes after the callbacks that save or measure the model, and before the Checkpoint.

    Args:
        first_epoch: first epoch that the mean covers; None for the optimizer's own average.
    """

    def __init__(self, first_epoch=None):
        super().__init__()
        self.first_epoch = first_epoch
        self.epoch = 0
        self.count = 0
        self.mean = []
        self.kept = None

    def state(self):
        return {"count": self.count}, self.mean

    def restore(self, numbers, arrays):
        self.count, self.mean = numbers["count"], arrays

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_test_begin(self, logs=None):
        variables = self.model.trainable_variables
        kept = [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]
        averages = self._averages(kept)
        if averages is not None:
            self.kept = kept
            self._assign(averages)

    def on_epoch_end(self, epoch, logs=None):
        if self.kept is not None:
            self._assign(self.kept)
            self.kept = None

    def _averages(self, weights):
        """What replaces the weights now, a list of arrays; None for nothing."""
        if self.first_epoch is None:
            optimizer = self.model.optimizer
            optimizer = getattr(optimizer, "inner_optimizer", optimizer)
            averages = optimizer._model_variables_moving_average
            return [np.array(keras.ops.convert_to_numpy(average)) for average in averages]
        if self.epoch < self.first_epoch:
            return None
        self.count += 1
        pairs = zip(self.mean or weights, weights, strict=True)
        self.mean = [mean + (weight - mean) / self.count for mean, weight in pairs]
        return self.mean

    def _assign(self, values):
        for variable, value in zip(self.model.trainable_variables, values, strict=True):
            variable.assign(value)
