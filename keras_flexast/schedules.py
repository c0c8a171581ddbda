"""Learning-rate schedules: a linear warm-up, then a cosine, steps, or nothing."""

import math

import keras

MAX_STEP = 2**31 - 1  # an int32, which counts the steps


@keras.saving.register_keras_serializable(package="keras_flexast")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up and cosine decay to zero, once for each stage of a training.

    Args:
        learning_rate: learning rate at the end of each warm-up.
        stages: number of steps of each stage; several restart the schedule without compiling
            again.
        warmup: share of a stage's steps in which the learning rate rises.
        warmup_steps: number of these steps; None for the share.
    """

    def __init__(self, learning_rate, stages, warmup=0.1, warmup_steps=None):
        self.learning_rate = learning_rate
        self.stages = tuple(stages)
        self.warmup = warmup
        self.warmup_steps = warmup_steps

    def __call__(self, step):
        ops = keras.ops
        step = ops.cast(step, "float32")
        value, start = ops.zeros(()), 0
        for steps in self.stages:
            rise = max(1.0, self.warmup_steps or self.warmup * steps)
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
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable(package="keras_flexast")
class WarmupStep(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then a factor on the learning rate at one step and at regular ones after it.

    Args:
        learning_rate: learning rate at the end of the warm-up.
        warmup_steps: number of steps in which the learning rate rises.
        start: step of the first decay; None for none.
        every: number of steps from one decay to the next.
        factor: factor of each decay.

    Reference: AST, Gong et al. 2021 (arXiv:2104.01778).
    """

    def __init__(self, learning_rate, warmup_steps, start=None, every=1, factor=0.5):
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.start = start
        self.every = every
        self.factor = factor

    def __call__(self, step):
        ops = keras.ops
        done = ops.cast(step, "float32") + 1
        value = self.learning_rate * ops.minimum(1.0, done / max(1.0, self.warmup_steps))
        if self.start is None:
            return value
        # Whole numbers: a float32 counts to 16 million steps only.
        past = ops.cast(step, "int32") - self.start
        decays = ops.maximum(0, ops.floor_divide(past, self.every) + 1)
        return value * ops.power(ops.cast(self.factor, "float32"), ops.cast(decays, "float32"))

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "start": self.start,
            "every": self.every,
            "factor": self.factor,
        }


def schedule_of(settings, steps):
    """The schedule of a training.

    Args:
        settings: TrainSettings.
        steps: number of batches in an epoch.

    Returns:
        keras.optimizers.schedules.LearningRateSchedule that counts batches.
    """
    total, rate = steps * settings.epochs, settings.learning_rate
    if settings.schedule == "cosine":
        return WarmupCosine(rate, [total], settings.warmup, settings.warmup_steps)
    warmup = settings.warmup_steps or round(settings.warmup * total)
    if settings.schedule == "constant":
        return WarmupStep(rate, warmup)
    return WarmupStep(
        rate,
        warmup,
        start=min(MAX_STEP, settings.decay_start * steps),
        every=min(MAX_STEP, settings.decay_every * steps),
        factor=settings.decay_factor,
    )
