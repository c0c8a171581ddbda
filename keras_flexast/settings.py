"""Choices and defaults that Python and the command line share.

Without Keras, because help texts need them at once.
What turns a waveform into tokens has its settings in `tf_data_pipelines.settings`.
"""

import dataclasses

from tf_data_pipelines.settings import (
    OVERLONGS,
    SHARES,
    Settings,
    check_between,
    check_choice,
    check_flag,
    check_positive,
    checked_shares,
    patch_pair,
)

VERSION = "0.1.0"
SIZES = {  # name: (dim, depth, num_heads)
    "nano": (96, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}
DEFAULT_SIZE, DEFAULT_POOLING = "tiny", "attention"
POOLINGS = {"attention": 0, "cls": 1, "cls_distillation": 2, "mean": 0}  # name: prefix tokens
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16")
FAMILIES = ("ast", "ssast", "flexiast", "elasticast", "vit", "deit")  # of published checkpoints
TARGETS = ("flexiast", "elasticast")  # that a checkpoint can start
TABLE_RULES = ("ast", "resize")  # how a position table is resized
FORMATS = ("serving", "mobile", "onnx", "mediapipe")
PRECISIONS = ("float32", "float16", "dynamic", "int8")
INPUTS = ("waveform", "features")
DEFAULT_WINDOW = 1.0  # seconds of a timeline's windows
MAX_SEED = 2**32 - 1  # NumPy takes no larger one
MAX_DROPOUT = 0.9
MAX_TEMPERATURE = 100.0
EXPORT_PATCH_SIZES = (8, 16, 24, 32, 48)
MAX_SERVED_SECONDS = 60.0
LONGEST_CLIP = 86400  # seconds, a day
KEPT_VERSIONS = 2  # of a served model: the server loads two


@dataclasses.dataclass(frozen=True)
class DistillSettings(Settings):
    """How a student learns from a teacher beside the labels.

    Args:
        weight: share of the teacher's loss in the whole, 0 to 1; the rest is that of the labels.
        temperature: what both models' logits are divided by in the teacher's loss: a higher one
            tells more of the classes that the teacher holds for unlikely.
        patch_size: int or (frequency, time), at which the teacher hears every clip; None for its
            base patch.
    """

    weight: float = 0.5
    temperature: float = 2.0
    _: dataclasses.KW_ONLY
    patch_size: int | tuple | None = None

    def __post_init__(self):
        check_between("weight", self.weight, 0, 1)
        check_between("temperature", self.temperature, 0.1, MAX_TEMPERATURE)
        if self.patch_size is not None:
            object.__setattr__(self, "patch_size", patch_pair(self.patch_size))


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
    """How a model is trained: how long, how fast, and in batches of what shape.

    Args:
        epochs: number of passes over the training clips.
        learning_rate: learning rate at the end of the warm-up; a cosine takes it to zero.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: decoupled weight decay of Adam.
        seed: random seed of the weights, the clip order and the patch size draws.
        batch_tokens: number of tokens in a batch.
        row_length: number of tokens in a row; None for what the longest clip of any split
            needs, 256 to 4,096. A longer clip draws only from the patch sizes at which it fits.
        segments: number of clip slots in a row.
        overlong: what happens to clips longer than a row at every patch size: "error" or
            "crop".
        dtype: what the model computes with while it trains: "float32", "mixed_bfloat16" or
            "mixed_float16". Its weights, and the run that is saved, are float32.
        remat: gradient checkpointing, see EncoderBlock: less memory for more time.
        accumulate: number of batches to each step of the optimizer, which takes the mean of
            their gradients: for batches that do not fit into memory.
        validation: share of the clips of each class for validation, where the data has no
            splits.
        test: share of the clips of each class for the test, likewise.
    """

    epochs: int = 20
    learning_rate: float = 1e-3
    _: dataclasses.KW_ONLY
    warmup: float = 0.1
    weight_decay: float = 5e-7
    seed: int = 1337
    batch_tokens: int = 4096
    row_length: int | None = None
    segments: int = 16
    overlong: str = "error"
    dtype: str = "float32"
    remat: bool = False
    accumulate: int = 1
    validation: float = SHARES[0]
    test: float = SHARES[1]

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("overlong", self.overlong, OVERLONGS)
        for name in ("epochs", "batch_tokens", "segments", "accumulate"):
            check_positive(name, getattr(self, name), int)
        check_positive("learning_rate", self.learning_rate)
        checked_shares((self.validation, self.test))
        for name in ("warmup", "weight_decay"):
            check_between(name, getattr(self, name), 0, 1)
        check_between("seed", self.seed, 0, MAX_SEED, kind=int)
        check_flag("remat", self.remat)
        if self.row_length is not None:
            check_positive("row_length", self.row_length, int)
