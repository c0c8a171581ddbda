"""Learning-rate schedules."""

import math

import keras


@keras.saving.register_keras_serializable(package="keras_flexast")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up and cosine decay to zero, once for each stage of a training.

    Args:
        learning_rate: learning rate at the end of each warm-up.
        stages: number of steps of each stage; several restart the schedule without compiling
            again.
        warmup: share of a stage's steps in which the learning rate rises.
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
