"""Published checkpoints as runs: the same numbers first, then any patch size and length."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import keras

from keras_flexast.conversion.checkpoints import read_checkpoint
from keras_flexast.conversion.class_names import fit_classes, read_classes
from keras_flexast.conversion.front_end import AUDIOSET_CLASSES, front_end
from keras_flexast.conversion.initialization import initialize
from keras_flexast.conversion.model_parts import read_parts
from keras_flexast.conversion.weight_names import IMAGE_FAMILIES, WeightNames, family_of
from keras_flexast.files import RUN, atomic_folder, refuse_overwrite
from keras_flexast.models import PackedAST
from keras_flexast.runs import Run, save_run, versions
from keras_flexast.settings import FAMILIES, MAX_SEED, TABLE_RULES, TARGETS, TrainSettings
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.resize import token_count
from tf_data_pipelines.settings import (
    BASE_PATCH,
    RESIZES,
    PackSettings,
    check_between,
    check_choice,
    check_positive,
    patch_pair,
    training_row_length,
)

# Size of the spectrograms of a model that starts from an image model, as in the papers.
IMAGE_MEL_BINS, IMAGE_FRAMES = 128, 1024
MAX_FRAMES = 100_000  # 1,000 s at 10 ms


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted checkpoint, and the account of its names.

    Args:
        run: Run with the packed model and its settings.
        family: family of the checkpoint.
        used: published names that became weights, or gave a size.
        ignored: {published name: reason} of the others.
        new: {layer: reason} of layers that the checkpoint has no weights for.
        notes: sentences on what was assumed where the checkpoint does not say.
    """

    run: Run
    family: str
    _: dataclasses.KW_ONLY
    used: tuple
    ignored: dict
    new: dict
    notes: tuple

    def to_dict(self) -> dict[str, Any]:
        """The account, as a dictionary for JSON."""
        return {
            "family": self.family,
            "used": list(self.used),
            "ignored": self.ignored,
            "new": self.new,
            "notes": list(self.notes),
        }


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `convert_run` that say what to convert, with the same defaults."""

    _: dataclasses.KW_ONLY
    family: str | None = None
    to: str | None = None
    classes: object = None
    num_heads: int | None = None
    mel_bins: int | None = None
    frames: int | None = None
    stride: int | tuple | None = None
    base_patch: int | tuple | None = None
    table: str | None = None
    resize: str = "pi"
    mean: float | None = None
    std: float | None = None
    ignore: str | Sequence[str] = ()
    seed: int = 1337

    def __post_init__(self):
        if isinstance(self.classes, os.PathLike):
            object.__setattr__(self, "classes", os.fspath(self.classes))
        elif not isinstance(self.classes, (str, int, type(None))):
            object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        ignore = (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore)
        object.__setattr__(self, "ignore", ignore)
        check_choice("family", self.family, (None, *FAMILIES))
        check_choice("to", self.to, (None, *TARGETS))
        check_choice("table", self.table, (None, *TABLE_RULES))
        check_choice("resize", self.resize, RESIZES)
        for name in ("num_heads", "mel_bins", "frames"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name), int, most=MAX_FRAMES)
        check_between("seed", self.seed, 0, MAX_SEED, kind=int)

    def chosen(self):
        """{name: value} of the options that are not at their default, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}


def convert_checkpoint(
    source: str | pathlib.Path | keras.Model, family: str | None = None, **options: Any
) -> PackedAST:
    """The packed model of a published checkpoint.

    Args:
        source, family, **options: as in `convert_run`.

    Returns:
        PackedAST.

    Example:
        model = convert_checkpoint("MIT/ast-finetuned-audioset-10-10-0.4593")
        fixed = fixed_model(model, patch_size=24, frames=1024)
    """
    return convert_run(source, family=family, **options).run.model


def convert_run(
    source: str | pathlib.Path | keras.Model,
    out: PathLike | None = None,
    *,
    family: str | None = None,
    to: str | None = None,
    classes: Sequence[str] | int | PathLike | None = None,
    num_heads: int | None = None,
    mel_bins: int | None = None,
    frames: int | None = None,
    stride: PatchSize | None = None,
    base_patch: PatchSize | None = None,
    table: str | None = None,
    resize: str = "pi",
    mean: float | None = None,
    std: float | None = None,
    ignore: str | Sequence[str] = (),
    seed: int = 1337,
    overwrite: bool = False,
) -> Conversion:
    """Convert a published checkpoint to a run: the same numbers, or the start of a new model.

    Args:
        source: file, folder, hub name or KerasHub backbone, see `read_checkpoint`.
        out: folder for the run, and for conversion.json, which says what became of every
            published name; None to write nothing.
        family: "ast" (Hugging Face's or the authors'), "ssast", "flexiast", "elasticast",
            "vit" or "deit"; None to recognize it by the names of the weights. A fine-tuned
            SSAST has the names of an AST, but averages its patches: give "ssast".
        to: model to start from the checkpoint, "flexiast" or "elasticast", as the papers do:
            patches side by side, and the position table resized to their grid. An ElasticAST's
            pooling is the mean of the encoder's attention layers, and its two tables are the
            additive part of the joint one. None keeps the model as published; an image model
            then starts a FlexiAST.
        classes: names of the classes; or their number; or path of a file that names them, one
            a line or as AudioSet's class_labels_indices.csv. The head is kept if its number of
            outputs fits, else it starts anew. None keeps the checkpoint's classes.
        num_heads: number of attention heads; None for the configuration's, or dim / 64.
        mel_bins, frames: size of the spectrograms. With `to` it is that of the new model,
            without it that of the checkpoint, where its files do not say. None for the
            checkpoint's; with image models 128 and 1,024.
        stride: int or (frequency, time): bins and frames from one patch of the checkpoint to
            the next; None to find it from the position table.
        base_patch: int or (frequency, time): bins and frames of the new model's kernel, with
            `to`; None for 16.
        table: rule for the position table, with `to`. "ast" cuts out its middle, or stretches
            it without antialiasing; "resize" resizes it with antialiasing. None for the
            papers' choice: "ast" with image models, else "resize".
        resize: "pi" or "bilinear": how the kernel is resized, here and in the model.
        mean, std: mean and standard deviation of log-mel over the training data; None for the
            checkpoint's, or those of its data set.
        ignore: regular expressions of published names to leave out, beside the known ones.
        seed: random seed of new weights.
        overwrite: whether to replace what `out` holds.

    Returns:
        Conversion.

    Raises:
        FileExistsError: `out` exists and overwrite is False.
        ValueError: a name is missing, misshapen or unknown; or the family, the configuration
            or an option contradicts the weights. Other errors as in `read_checkpoint`.

    Example:
        convert_run("MIT/ast-finetuned-audioset-10-10-0.4593", "runs/ast")
        convert_run("ast.pth", "runs/start", to="elasticast", classes=["cat", "dog"])

    Reference: AST, arXiv:2104.01778; SSAST, arXiv:2110.09784; FlexiAST, arXiv:2307.09286;
        ElasticAST, arXiv:2407.08691; ViT, arXiv:2010.11929; DeiT, arXiv:2012.12877.
    """
    if out is not None:
        refuse_overwrite(out, overwrite, kind=RUN, inputs=_paths(source))
    options = Options(
        family=family, to=to, classes=classes, num_heads=num_heads, mel_bins=mel_bins,
        frames=frames, stride=stride, base_patch=base_patch, table=table, resize=resize,
        mean=mean, std=std, ignore=ignore, seed=seed,
    )  # fmt: skip
    conversion = _convert(source, options)
    if out is not None:
        account = json.dumps(conversion.to_dict(), indent=2)
        with atomic_folder(out, overwrite, kind=RUN, inputs=_paths(source)) as folder:
            save_run(conversion.run, folder)
            atomic_write(folder / "conversion.json", account + "\n")
    return conversion


def _paths(source):
    """The source as a list of paths; empty for a name on a hub or a model in memory."""
    on_disk = isinstance(source, str | os.PathLike) and os.path.exists(source)
    return [source] if on_disk else []


def _convert(source, options):
    """Conversion of a checkpoint, without writing it."""
    class_names = read_classes(options.classes)
    checkpoint = read_checkpoint(source)
    names = WeightNames(checkpoint, family_of(checkpoint, options.family))
    parts = _read_or_start(names, options)
    classes, new_head = fit_classes(parts, checkpoint, class_names)
    fbank = front_end(parts, names, mean=options.mean, std=options.std)

    keras.utils.set_random_seed(options.seed)
    model = PackedAST(len(classes), resize=options.resize, remainder="crop", **parts.options)
    new = {**_assign(model, parts.weights), **new_head}
    patches, frames = model.patch_settings(), parts.frames or parts.span(1)
    run = Run(
        model,
        fbank,
        patches=patches,
        packing=_packing(model, patches, frames),
        classes=classes,
        multi_label=_is_multi_label(checkpoint, classes),
        clip_seconds=round(frames * fbank.frame_shift_ms / 1000, 3),
        made_by={
            "command": "convert",
            "source": checkpoint.origin,
            "family": names.family,
            "options": options.chosen(),
            "versions": versions(),
        },
    )
    return Conversion(
        run,
        names.family,
        used=tuple(sorted(names.used)),
        ignored=names.ignored,
        new=new,
        notes=tuple(names.notes),
    )


def _read_or_start(names, options):
    """ModelParts of the published model, or of the one that starts from it."""
    is_image = names.family in IMAGE_FAMILIES
    to = "flexiast" if options.to is None and is_image else options.to
    if to is None and (options.base_patch is not None or options.table is not None):
        raise ValueError(
            "base_patch (--base-patch) and table (--table) are for the start of another model; "
            "give to='flexiast' or to='elasticast' (--to) too."
        )
    sizes = {} if to else {"mel_bins": options.mel_bins, "frames": options.frames}
    parts = read_parts(names, num_heads=options.num_heads, stride=options.stride, **sizes)
    names.ignore_rest(options.ignore)
    if to is None:
        return parts
    usual_mel_bins, usual_frames = parts.options["mel_bins"], parts.frames or parts.span(1)
    if is_image:
        usual_mel_bins, usual_frames = IMAGE_MEL_BINS, IMAGE_FRAMES
    return initialize(
        parts,
        names,
        to=to,
        base_patch=patch_pair(options.base_patch or BASE_PATCH, "base_patch"),
        mel_bins=options.mel_bins or usual_mel_bins,
        frames=options.frames or usual_frames,
        table=options.table or ("ast" if is_image else "resize"),
        resize=options.resize,
    )


def _assign(model, weights):
    """Put weights into the layers of a PackedAST.

    Returns:
        {layer: reason} of layers that keep their new weights.
    """
    backbone, new = model.backbone, {}
    backbone.patch_embed.set_weights([weights["kernel"], weights["kernel_bias"]])
    tables = ("joint",) if "joint" in weights else ("freq", "time")
    backbone.position_embed.set_weights([weights[name] for name in tables])
    if backbone.prefix is not None:
        backbone.prefix.set_weights([weights["prefix"]])
    for block, arrays in zip(backbone.blocks, weights["blocks"], strict=True):
        _assign_attention(block.self_attention, arrays["self_attention"])
        for name in ("attention_norm", "mlp_norm", "mlp_hidden", "mlp_output"):
            getattr(block, name).set_weights(arrays[name])
    backbone.norm.set_weights(weights["norm"])
    if model.pooling_name == "attention":
        _assign_attention(model.pooling, weights["pooling"])
        if "pooling_query" in weights:
            model.pooling.query.assign(weights["pooling_query"])
        else:
            new["pooling query"] = "the published model has another pooling"
    for name in ("head_norm", "head"):
        if name in weights:
            getattr(model, name).set_weights(weights[name])
        else:
            new[name] = "the checkpoint has no classifier of sounds"
    return new


def _assign_attention(layer, projections):
    for name, arrays in zip(("query", "key", "value", "output"), projections, strict=True):
        getattr(layer, f"{name}_dense").set_weights(arrays)


def _packing(model, patches, frames):
    """PackSettings with rows that hold a clip of so many frames."""
    tokens = token_count(
        frames, model.mel_bins, patch_size=model.backbone.base_patch, settings=patches
    )
    row_length = training_row_length(int(tokens))
    rows = max(1, TrainSettings.batch_tokens // row_length)
    return PackSettings(rows, row_length, model.segments)


def _is_multi_label(checkpoint, classes):
    """Whether each class has a score of its own: sigmoid, not softmax."""
    problem = checkpoint.config.get("problem_type")
    if problem is not None:
        return problem == "multi_label_classification"
    return len(classes) == AUDIOSET_CLASSES  # its clips have several labels
