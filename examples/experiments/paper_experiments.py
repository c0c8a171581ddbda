"""What the experiments of FlexiAST and ElasticAST, and ours, train and evaluate, as data."""

import dataclasses

from keras_flexast.settings import BETWEEN_SIZES, Recipe, TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings, FbankSettings

ALL_SIZES = tuple(range(8, 49, 2))
WIDE_SIZES = (4, *ALL_SIZES, 56, 64)
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 20)  # seconds
SHIFTS = (10, 15, 20, 30, 40)  # milliseconds
# From AST/16, with as many passes as the flexible ones; and with as many as the longest of them.
SPECIALISTS = {8: "AST/8", 16: "AST/16, continued", 32: "AST/32"}
LONG = ", four times as long"
LONG_SPECIALISTS = {size: f"AST/{size}{LONG}" for size in SPECIALISTS}
GRID = (8, 128)  # cells of the position tables: 20 s, the longest sentences
CASCADES = (48, 24, 8), (32, 16, 8), (24, 8), None  # None: sizes found on the validation clips
# Of an exported file, whose cascade is found among them.
COST_SIZES = (8, 12, 16, 24, 32, 40, 48)
OURS = "FlexiAST, all sizes"
LONGER = OURS + LONG
TAUGHT = LONGER + ", distilled"
COSTED = {LONGER: "20 passes", TAUGHT: "20 passes with a teacher"}  # as the figure names them
MEAN_OF_ASTS = "mean of the ASTs of 8, 16, 32"
UNIFIED = {data: f"unified, {data}" for data in ("words", "speakers")}
BETWEEN = {
    size: (max(p for p in PATCH_SIZES if p < size), min(p for p in PATCH_SIZES if p > size))
    for size in BETWEEN_SIZES
}
SWEPT_SIZES = (*PATCH_SIZES, *BETWEEN, (16, 12), (24, 16))


def weights_of(sizes):
    """Options of patches that draw sizes evenly in the logarithm of the size."""
    ends = 2 * sizes[0] - sizes[1], *sizes, 2 * sizes[-1] - sizes[-2]
    gaps = [(after - before) / 4 for before, after in zip(ends, ends[2:], strict=False)]
    return {"patch_weights": tuple(gap / size for gap, size in zip(gaps, sizes, strict=True))}


def stages_text(stages):
    """Name of one of CASCADES in a result."""
    return "auto" if stages is None else ",".join(map(str, stages))


def mean_of(name):
    """Name of the experiment that takes the mean of one model's scores at three sizes."""
    return f"mean of {name}, at 8, 16, 32"


EVENLY = weights_of(ALL_SIZES)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained, and how fast."""

    size: str
    clips: dict  # of each data set: clips of each class for training, validation and test
    scratch_epochs: int = 1
    epochs: dict = dataclasses.field(default_factory=lambda: {"words": 1, "speakers": 1})
    scratch_learning_rate: float = 4e-3
    learning_rate: float = 2e-3  # from another run
    batch_clips: int = 16
    dtype: str = "float32"


SCALES = {
    "quick": Scale("nano", {"words": (4, 2, 2), "speakers": (4, 2, 2)}),
    "small": Scale(
        "nano", {"words": (360, 25, 50), "speakers": (75, 8, 16)},
        scratch_epochs=20, epochs={"words": 5, "speakers": 10},
    ),
    "gpu": Scale(
        "tiny", {"words": (200, 30, 60), "speakers": (60, 10, 20)},
        scratch_epochs=100, epochs={"words": 40, "speakers": 60},
        scratch_learning_rate=3e-3, learning_rate=1e-3, batch_clips=64, dtype="mixed_bfloat16",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One row of the tables: what is trained, and what it is evaluated on."""

    data: str
    recipe: dict  # what is replaced in the recipe of all
    sweeps: tuple = ("patch-size",)
    init: str | None = "AST/16"  # name of the experiment that it starts from; None from scratch
    teacher: str | None = None
    cascade: bool = False  # whether CASCADES are evaluated
    trained: str | None = None  # another experiment, whose run is evaluated
    resize: str | None = None  # of the evaluation
    times: int = 1  # as many passes as others
    members: tuple = ()  # (experiment, patch size) whose mean scores are evaluated; nothing trained


WORDS, SPEAKERS = {"data": "words"}, {"data": "speakers"}
AT_16 = {"patch_sizes": (16,)}
AT_ALL = {"patch_sizes": ALL_SIZES, "patches": EVENLY}
GRIDDED = {"position": "grid", "remainder": "crop"}  # as the papers
ALL_SWEEPS = ("patch-size", "length", "frame-shift")
# AST/16 on words is what others start from, as the papers' start from AudioSet's.
EXPERIMENTS = {
    # FlexiAST, on words
    "AST/16": Experiment(**WORDS, recipe=AT_16, init=None),
    "AST/16, bilinear": Experiment(**WORDS, recipe={}, trained="AST/16", resize="bilinear"),
    "AST/16, continued": Experiment(**WORDS, recipe=AT_16),
    "AST/8": Experiment(**WORDS, recipe={"patch_sizes": (8,)}),
    "AST/32": Experiment(**WORDS, recipe={"patch_sizes": (32,)}),
    "FlexiAST": Experiment(**WORDS, recipe={}),
    OURS: Experiment(**WORDS, recipe=AT_ALL, cascade=True),
    # ElasticAST, on speakers
    **{
        "ElasticAST" + LONG * (times > 1): Experiment(
            **SPEAKERS, recipe=AT_16, sweeps=("length", "frame-shift"), times=times
        )
        for times in (1, 4)
    },
    **{
        f"AST, {seconds} s": Experiment(
            **SPEAKERS, sweeps=("length",),
            recipe={**AT_16, "fbank": FbankSettings(clip_ms=1000 * seconds)},
        )
        for seconds in (2, 4, 8)
    },
    "ElasticAST, mixed frame shifts": Experiment(
        **SPEAKERS, recipe={**AT_16, "augment": {"frame_shift_range_ms": (10, 40)}},
        sweeps=("length", "frame-shift"),
    ),
    **{
        f"ElasticAST, {shift} ms": Experiment(
            **SPEAKERS, recipe={**AT_16, "frame_shifts_ms": (shift,)}, sweeps=("frame-shift",)
        )
        for shift in (20, 30, 40)
    },
    # Ours: any patch size, native length and any frame shift, in the same rows
    **{
        name + LONG * (times > 1): Experiment(
            data, {**AT_ALL, "augment": {"frame_shift_range_ms": (10, 40)}},
            sweeps=ALL_SWEEPS, cascade=data == "words", times=times,
        )
        for times in (1, 4) for data, name in UNIFIED.items()
    },
    # The ablations of both papers
    "FlexiAST, distilled": Experiment(**WORDS, recipe={}, teacher="AST/16"),
    "FlexiAST, bilinear": Experiment(**WORDS, recipe={"model": {"resize": "bilinear"}}),
    **{
        f"FlexiAST, {axis}": Experiment(**SPEAKERS, recipe={"patch_sizes": sizes})
        for axis, sizes in {
            "both axes": PATCH_SIZES,
            "time": tuple((16, size) for size in PATCH_SIZES),
            "frequency": tuple((size, 16) for size in PATCH_SIZES),
        }.items()
    },
    # Which sizes it is trained on
    "FlexiAST, few sizes": Experiment(**WORDS, recipe={"patch_sizes": (8, 16, 32, 48)}),
    "FlexiAST, sizes uniformly": Experiment(**WORDS, recipe={"patch_sizes": ALL_SIZES}),
    "FlexiAST, large sizes often": Experiment(
        **WORDS, recipe={"patch_sizes": ALL_SIZES, "patches": {"patch_weights": ALL_SIZES}}
    ),
    LONGER: Experiment(**WORDS, recipe=AT_ALL, times=4, cascade=True),
    **{
        name: Experiment(**WORDS, recipe={"patch_sizes": (size,)}, times=4)
        for size, name in LONG_SPECIALISTS.items()
    },
    f"{OURS}, distilled": Experiment(**WORDS, recipe=AT_ALL, teacher="AST/16", cascade=True),
    TAUGHT: Experiment(
        **WORDS, recipe=AT_ALL, times=4, teacher="AST/16", cascade=True
    ),
    "FlexiAST, sizes 4 to 64": Experiment(
        **WORDS, recipe={"patch_sizes": WIDE_SIZES, "patches": weights_of(WIDE_SIZES)}
    ),
    # One model at three sizes, and three models: equal cost when they are used; the one that is
    # trained four times as long has about as many tokens as the three together
    **{
        mean_of(name): Experiment(
            **WORDS, recipe={}, sweeps=(), init=None, members=tuple((name, p) for p in SPECIALISTS)
        )
        for name in (OURS, LONGER)
    },
    MEAN_OF_ASTS: Experiment(
        **WORDS, recipe={}, sweeps=(), init=None,
        members=tuple((name, p) for p, name in SPECIALISTS.items()),
    ),
    # From scratch, where the model differs
    "FlexiAST, from scratch": Experiment(**WORDS, recipe={}, init=None),
    "AST/16, the papers' grid and [CLS]": Experiment(
        **WORDS, recipe={**AT_16, "model": {"pooling": "cls", **GRIDDED}}, init=None
    ),
    "FlexiAST, the papers' grid and [CLS]": Experiment(
        **WORDS, recipe={"model": GRIDDED, "patches": {"clips_per_draw": "a batch"}},
        init="AST/16, the papers' grid and [CLS]",
    ),
    # and each of its parts alone
    "AST/16, the papers' grid": Experiment(**WORDS, recipe={**AT_16, "model": GRIDDED}, init=None),
    "FlexiAST, the papers' grid": Experiment(
        **WORDS, recipe={"model": GRIDDED}, init="AST/16, the papers' grid"
    ),
    "AST/16, [CLS]": Experiment(
        **WORDS, recipe={**AT_16, "model": {"pooling": "cls"}}, init=None
    ),
    "FlexiAST, [CLS]": Experiment(**WORDS, recipe={}, init="AST/16, [CLS]"),
    "FlexiAST, one size in a batch": Experiment(
        **WORDS, recipe={"patches": {"clips_per_draw": "a batch"}}
    ),
    "AST/16, average": Experiment(
        **WORDS, recipe={**AT_16, "model": {"pooling": "mean"}}, init=None
    ),
    "ElasticAST, average": Experiment(
        **SPEAKERS, recipe=AT_16, sweeps=("length",), init="AST/16, average"
    ),
    "AST/16, joint table": Experiment(
        **WORDS, recipe={**AT_16, "model": {"table": "joint"}}, init=None
    ),
}  # fmt: skip


def recipe_of(name, scale, seed):
    """The Recipe of an experiment, without where it starts from."""
    own = EXPERIMENTS[name]
    given = dict(own.recipe)
    base = Recipe(
        TrainSettings(
            epochs=own.times * (scale.epochs[own.data] if own.init else scale.scratch_epochs),
            learning_rate=scale.learning_rate if own.init else scale.scratch_learning_rate,
            optimizer="muon", betas=(0.9, 0.99), weight_decay=0.05, decay_all=False,
            batch_clips=scale.batch_clips, seed=seed, dtype=scale.dtype,
        ),
        AugmentSettings(**{"gain_db": 6.0, **given.pop("augment", {})}),
        model={} if own.init else {"size": scale.size, "grid": GRID},
    )  # fmt: skip
    model = {**base.model, **given.pop("model", {})}
    if "clips_per_draw" in given.get("patches", {}):
        given["patches"] = {"clips_per_draw": scale.batch_clips}
    return base.replaced(model=model, **given)


def points_of(experiment):
    """Patch sizes of an evaluation: those along one axis where the training has no others."""
    sizes = experiment.recipe.get("patch_sizes", PATCH_SIZES)
    if any(isinstance(size, tuple) for size in sizes):
        return sizes
    return (*SWEPT_SIZES, 4, 6, 56, 64) if sizes == WIDE_SIZES else SWEPT_SIZES
