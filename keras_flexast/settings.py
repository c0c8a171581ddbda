"""Choices and defaults that Python and the command line share.

Without Keras, because help texts need them at once.
What turns a waveform into tokens has its settings in `tf_data_pipelines.settings`.
"""

import dataclasses

from tf_data_pipelines.settings import (
    MAX_ROW_LENGTH,
    OVERLONGS,
    PATCH_SIZES,
    SHARES,
    AugmentSettings,
    FbankSettings,
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
FIXED_BY_INIT = (  # arguments of a model for which the weights that it starts from are made
    "size", "dim", "depth", "num_heads", "mlp_ratio", "pooling", "prefix_tokens", "table", "grid",
    "base_patch", "stride", "mel_bins",
)  # fmt: skip
SWEEPS = {  # of an evaluation, with the title of the axis
    "patch-size": "patch size (mel bins x frames)",
    "length": "clip length (seconds)",
    "frame-shift": "frame shift (milliseconds)",
    "pooling": "frames pooled",
}
BETWEEN_SIZES = (14, 18, 22, 28, 36, 44)  # patch sizes that PATCH_SIZES leaves out
PATCH_OPTIONS = ("patch_weights", "clips_per_draw", "pool_frames", "pooling")
DTYPES = ("float32", "mixed_bfloat16", "mixed_float16")
WEIGHT_DECAYS = {"adam": 5e-7, "adamw": 0.05, "muon": 0.05}  # where none is given
OPTIMIZERS = tuple(WEIGHT_DECAYS)
SCHEDULES = ("cosine", "step", "constant")
LOSSES = ("auto", "cross_entropy", "binary")
KEPT = ("best", "last")  # epochs whose weights become the run
FAMILIES = ("ast", "ssast", "flexiast", "elasticast", "vit", "deit")  # of published checkpoints
TARGETS = ("flexiast", "elasticast")  # that a checkpoint can start
TABLE_RULES = ("ast", "resize")  # how a position table is resized
FORMATS = ("serving", "mobile", "onnx", "mediapipe")
PRECISIONS = ("float32", "float16", "dynamic", "int8")
INPUTS = ("waveform", "features")
DEFAULT_WINDOW = 1.0  # seconds of a timeline's windows
DEFAULT_THRESHOLD = 0.9  # score at which a cascade believes a class
MAX_SEED = 2**32 - 1  # NumPy takes no larger one
MAX_DROPOUT = 0.9
MAX_TEMPERATURE = 100.0
MAX_EPOCHS = 1_000_000
MAX_COUNT = 2**31 - 1  # an int32, which counts steps and tokens
MAX_EMA = 0.999999  # a momentum of 1 would never learn
MAX_SMOOTHING = 0.9
MIN_LAYER_DECAY = 0.01
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
    """How a model is trained: how long, how fast, on what loss, and in batches of what shape.

    Args:
        epochs: number of passes over the training clips.
        learning_rate: learning rate at the end of the warm-up.
        schedule: "cosine" takes the learning rate to zero, "step" multiplies it by `decay_factor`
            after the epoch `decay_start` and after every `decay_every` further ones, as AST;
            "constant" leaves it.
        warmup: share of the steps in which the learning rate rises.
        warmup_steps: number of these steps; None for the share.
        decay_start, decay_every, decay_factor: of the schedule "step", in epochs.
        optimizer: "adam", whose weight decay is added to the gradient (the papers), "adamw",
            whose weight decay is decoupled from it, or "muon": AdamW, but Muon for the matrices of
            the encoder's blocks, which learns more in as many steps.
        betas: decay rates of the two moments of Adam and AdamW, also of Muon's AdamW.
        weight_decay: weight decay.
        decay_all: whether biases, norms, position tables and prefix tokens decay, too.
        clip_norm: largest norm of the gradient of all weights; a larger one is scaled down. None
            for any norm.
        layer_decay: factor on the learning rate from each block to the one below it; 1 for the
            same everywhere.
        frozen: whether the encoder stays as it is: only pooling and head learn.
        lora_rank: rank of the change of each query, value and output matrix, while the rest of
            the encoder stays as it is (LoRA). It is merged when the run is saved. None changes
            whole matrices.
        loss: "cross_entropy" of the one label, "binary" cross-entropy of each class (what the
            papers train AudioSet, VGGSound and Speech Commands with), or "auto": binary where
            clips may have several labels.
        label_smoothing: share of each label that is spread over all classes.
        class_weights: "balanced" makes every class count alike, whatever its number of clips;
            None makes every clip count alike.
        ema: momentum of an exponential moving average of the weights after each batch, which is
            what is validated and saved; None for the weights themselves.
        average_epochs: number of last epochs whose weights are averaged for that, as AST; 1
            averages none.
        patience: number of epochs without a better validation after which the training stops;
            None trains all of them.
        keep: "best" keeps the weights of the best validation, "last" those of the last epoch.
        save_minutes: time between two savings of the state inside an epoch, in minutes.
        seed: random seed of the weights, the clip order and the patch size draws.
        batch_tokens: number of tokens in a batch.
        batch_clips: number of clips in a batch, on average and rounded to whole rows, of which
            there is at least one; it takes the place of batch_tokens. None for batch_tokens.
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

    Reference: AST, Gong et al. 2021 (arXiv:2104.01778): schedule and average; LoRA, Hu et al. 2021
    (arXiv:2106.09685); layer-wise decay, Clark et al. 2020 (arXiv:2003.10555).
    """

    epochs: int = 20
    learning_rate: float = 1e-3
    _: dataclasses.KW_ONLY
    schedule: str = "cosine"
    warmup: float = 0.1
    warmup_steps: int | None = None
    decay_start: int = 2
    decay_every: int = 1
    decay_factor: float = 0.5
    optimizer: str = "adam"
    betas: tuple = (0.95, 0.999)
    weight_decay: float = WEIGHT_DECAYS["adam"]
    decay_all: bool = True
    clip_norm: float | None = None
    layer_decay: float = 1.0
    frozen: bool = False
    lora_rank: int | None = None
    loss: str = "auto"
    label_smoothing: float = 0.0
    class_weights: str | None = None
    ema: float | None = None
    average_epochs: int = 1
    patience: int | None = None
    keep: str = "best"
    save_minutes: float = 15.0
    seed: int = 1337
    batch_tokens: int = 4096
    batch_clips: int | None = None
    row_length: int | None = None
    segments: int = 16
    overlong: str = "error"
    dtype: str = "float32"
    remat: bool = False
    accumulate: int = 1
    validation: float = SHARES[0]
    test: float = SHARES[1]

    def __post_init__(self):
        for name, choices in (
            ("dtype", DTYPES), ("overlong", OVERLONGS), ("optimizer", OPTIMIZERS), ("keep", KEPT),
            ("schedule", SCHEDULES), ("loss", LOSSES), ("class_weights", (None, "balanced")),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        for name in ("epochs", "decay_every", "average_epochs"):
            check_positive(name, getattr(self, name), int, most=MAX_EPOCHS)
        for name in ("batch_tokens", "accumulate"):
            check_positive(name, getattr(self, name), int, most=MAX_COUNT)
        check_positive("segments", self.segments, int, most=MAX_ROW_LENGTH)
        for name in ("learning_rate", "save_minutes"):
            check_positive(name, getattr(self, name))
        checked_shares((self.validation, self.test))
        for name in ("warmup", "weight_decay", "decay_factor"):
            check_between(name, getattr(self, name), 0, 1)
        check_between("decay_start", self.decay_start, 0, MAX_EPOCHS, kind=int)
        check_between("layer_decay", self.layer_decay, MIN_LAYER_DECAY, 1)
        check_between("label_smoothing", self.label_smoothing, 0, MAX_SMOOTHING)
        check_between("seed", self.seed, 0, MAX_SEED, kind=int)
        for name in ("remat", "decay_all", "frozen"):
            check_flag(name, getattr(self, name))
        for name, kind in (
            ("row_length", int), ("batch_clips", int), ("warmup_steps", int),
            ("clip_norm", (int, float)), ("lora_rank", int), ("patience", int),
        ):  # fmt: skip
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name), kind, most=MAX_COUNT)
        if self.ema is not None:
            check_between("ema", self.ema, 0, MAX_EMA)
        object.__setattr__(self, "betas", _checked_betas(self.betas))
        self._check_together()

    def _check_together(self):
        """Raise where two settings exclude each other."""
        if self.frozen and self.lora_rank:
            raise ValueError(
                f"lora_rank={self.lora_rank} trains the encoder, which frozen keeps as it is. "
                f"Choose one of the two."
            )
        if self.average_epochs > 1:
            for name in ("ema", "patience"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"average_epochs={self.average_epochs} is the mean of the last epochs and "
                        f"does not go with {name}={getattr(self, name)}. Choose one of the two."
                    )
            if self.average_epochs > self.epochs:
                raise ValueError(
                    f"average_epochs={self.average_epochs} must be at most epochs={self.epochs}."
                )


def _checked_betas(betas):
    """Both decay rates of Adam as a tuple; a ValueError unless they are numbers below 1."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas={betas!r} must be two numbers, such as (0.9, 0.999).")
    for beta in betas:
        check_between("betas", beta, 0, MAX_EMA)
    return tuple(betas)


@dataclasses.dataclass(frozen=True)
class Recipe(Settings):
    """All that a training is made of, apart from its sounds.

    Args:
        train: TrainSettings.
        augment: AugmentSettings.
        patch_sizes: ints or (frequency, time) pairs; each clip draws one of them.
        frame_shifts_ms: frame shifts in milliseconds; each clip draws one of them. Empty for
            the filterbank's own.
        patches: dictionary of how they are drawn, and of the frames before that: the settings
            patch_weights, clips_per_draw, pool_frames and pooling of PatchSettings.
        fbank: FbankSettings; None for the defaults, or for those of init.
        model: dictionary of arguments of PackedAST, such as size, pooling or dropout.
        init: folder of the run to start from; None starts from scratch.
        teacher: folder of the run to learn from beside the labels; None for no teacher.
        distill: DistillSettings, how the model learns from the teacher.
    """

    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    augment: AugmentSettings = dataclasses.field(default_factory=AugmentSettings)
    _: dataclasses.KW_ONLY
    patch_sizes: tuple = PATCH_SIZES
    frame_shifts_ms: tuple = ()
    patches: dict = dataclasses.field(default_factory=dict)
    fbank: FbankSettings | None = None
    model: dict = dataclasses.field(default_factory=dict)
    init: str | None = None
    teacher: str | None = None
    distill: DistillSettings = dataclasses.field(default_factory=DistillSettings)

    def __post_init__(self):
        for name, kind in (
            ("train", TrainSettings), ("augment", AugmentSettings), ("model", dict),
            ("fbank", FbankSettings | None), ("patch_sizes", tuple | list),
            ("frame_shifts_ms", tuple | list), ("patches", dict),
            ("distill", DistillSettings),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, kind):
                expected = getattr(kind, "__name__", kind)
                raise ValueError(f"{name}={value!r} must be of the kind {expected}.")
        unknown = sorted(set(self.patches) - set(PATCH_OPTIONS))
        if unknown:
            raise ValueError(
                f"patches has no setting {', '.join(unknown)}; it has {', '.join(PATCH_OPTIONS)}."
            )
        frames = self.patches.get("pool_frames", (1,))
        if isinstance(frames, tuple | list) and 1 not in frames:
            raise ValueError(
                f"pool_frames={frames} must have 1 among them, because evaluation and export pool "
                f"no frames. Add 1, or take a larger frame_shift_ms."
            )
        patches = {k: tuple(v) if isinstance(v, list) else v for k, v in self.patches.items()}
        object.__setattr__(self, "patches", patches)
        sizes = tuple(patch_pair(size, "patch_sizes") for size in self.patch_sizes)
        object.__setattr__(self, "patch_sizes", sizes)
        object.__setattr__(self, "frame_shifts_ms", tuple(self.frame_shifts_ms))

    @classmethod
    def from_dict(cls, values):
        """The recipe that `to_dict` gave."""
        kinds = {
            "train": TrainSettings, "augment": AugmentSettings, "fbank": FbankSettings,
            "distill": DistillSettings,
        }  # fmt: skip
        settings = {
            name: kind.from_dict(values[name])
            for name, kind in kinds.items()
            if values.get(name) is not None
        }
        return super().from_dict({**values, **settings})

    def arguments(self):
        """What `train_run` takes by name: train_run(data, out, **recipe.arguments())."""
        others = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        renamed = {"settings": "train", "model_options": "model", "patch_options": "patches"}
        return {name: others.pop(own) for name, own in renamed.items()} | others

    def replaced(self, **choices):
        """This recipe with other choices; None leaves a choice as it is."""
        return dataclasses.replace(
            self, **{name: value for name, value in choices.items() if value is not None}
        )
