"""Choices and defaults that Python and the command line share.

Without Keras, because help texts need them at once.
What turns a waveform into tokens has its settings in `tf_data_pipelines.settings`.
"""

import dataclasses

from tf_data_pipelines.settings import Settings, check_choice, check_positive

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
FORMATS = ("serving", "mobile", "onnx")
PRECISIONS = ("float32", "float16", "dynamic", "int8")
INPUTS = ("waveform", "features")
DEFAULT_WINDOW = 1.0  # seconds of a timeline's windows
MAX_PEAK = 16.0  # of a waveform whose full scale is 1; more are integers, not divided
EXPORT_PATCH_SIZES = (8, 16, 24, 32, 48)
MAX_SERVED_SECONDS = 60.0


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
            needs, 256 to 4,096.
        segments: number of clip slots in a row.
        overlong: what happens to clips longer than a row: "error" or "crop".
        dtype: what the model computes with while it trains: "float32", "mixed_bfloat16" or
            "mixed_float16". Its weights, and the run that is saved, are float32.
        remat: gradient checkpointing, see EncoderBlock: less memory for more time.
        accumulate: number of batches to each step of the optimizer, which takes the mean of
            their gradients: for batches that do not fit into memory.
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

    def __post_init__(self):
        check_choice("dtype", self.dtype, DTYPES)
        for name in ("epochs", "batch_tokens", "segments", "accumulate"):
            check_positive(name, getattr(self, name), int)
        check_positive("learning_rate", self.learning_rate)
        if self.row_length is not None:
            check_positive("row_length", self.row_length, int)
