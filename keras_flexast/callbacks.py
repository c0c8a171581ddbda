"""What happens between the epochs of a training."""

import math

import keras

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
    """

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self._check(logs["loss"], f"step {batch + 1} of")

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs.get("val_loss", 0.0), "the validation after")

    def _check(self, loss, place):
        if math.isfinite(loss):
            return
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        kept = "the best weights so far" if self.epoch else "the weights from before the training"
        raise ValueError(
            f"the loss is {loss} in {place} epoch {self.epoch + 1}, at a learning rate of "
            f"{rate:g}. Lower it (learning_rate, --learning-rate). {self.folder} holds {kept}."
        )


class KeepBest(keras.callbacks.Callback):
    """Saves the model at the end of each epoch that is the best so far, of equal ones the last.

    The file is replaced whole: a kill at any moment leaves the one or the other. NaN never wins.

    Args:
        path: path of the `.keras` file.
        metric: name of a metric in the logs; larger is better, from 0.
    """

    def __init__(self, path, metric):
        super().__init__()
        self.path = path
        self.metric = metric
        self.best = 0.0

    def on_epoch_end(self, epoch, logs=None):
        if logs[self.metric] >= self.best:
            self.best = logs[self.metric]
            save_model(self.model, self.path)
