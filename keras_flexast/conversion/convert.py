"""Published checkpoints as our models: the same numbers first, then any patch size and length."""

import dataclasses

import keras
import numpy as np

from keras_flexast.conversion.checkpoints import read_checkpoint
from keras_flexast.conversion.weight_names import FAMILIES, IMAGES, Names, family_of, read_model
from keras_flexast.models import PREFIX_TOKENS, PackedAST
from keras_flexast.runs import Run
from tf_data_pipelines.resize import bilinear_matrix, resize_kernel, token_count
from tf_data_pipelines.settings import (
    BASE_PATCH,
    RESIZES,
    FbankSettings,
    PackSettings,
    check_choice,
    check_positive,
    patch_pair,
)

TARGETS = ("flexiast", "elasticast")
TABLE_RULES = ("ast", "resize")
FRAMES = 1024  # about ten seconds, the papers' default

# Mean and std of the papers' data sets, by family and number of classes.
_STATISTICS = {
    "elasticast": {
        527: ("AudioSet", -4.414, 4.905),
        309: ("VGGSound", -5.08, 4.453),
        1251: ("VoxCeleb1", -5.842545, 3.88305),
    },
    "": {
        527: ("AudioSet", -4.2677393, 4.5689974),
        309: ("VGGSound", -5.0767093, 4.4533687),
        50: ("ESC-50", -6.6268077, 5.358466),
        35: ("Speech Commands v2", -6.845978, 5.5654526),
        1251: ("VoxCeleb1", -3.7614744, 4.2011642),
    },
}
AUDIOSET_CLASSES = 527  # the one of these whose clips have several labels


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted checkpoint and the account of its names.

    Args:
        run: Run, as if trained here.
        family: what the checkpoint was taken for.
        used: source names that became weights, or told a size.
        ignored: {source name: reason}.
        new: {layer: reason} of layers that the source has no weights for.
        notes: what was assumed where the source does not say.
    """

    run: Run
    family: str
    used: tuple
    ignored: dict
    new: dict
    notes: tuple

    def to_dict(self):
        """The account, for JSON."""
        return {
            "family": self.family,
            "used": list(self.used),
            "ignored": self.ignored,
            "new": self.new,
            "notes": list(self.notes),
        }


def convert_checkpoint(source, family=None, **options):
    """The packed model of a published checkpoint. See `convert_run`.

    Example:
        model = convert_checkpoint("MIT/ast-finetuned-audioset-10-10-0.4593")
        fixed = fixed_model(model, patch_size=24, frames=1024)
    """
    return convert_run(source, family, **options).run.model


def convert_run(
    source,
    family=None,
    to=None,
    classes=None,
    num_heads=None,
    mel_bins=None,
    frames=None,
    stride=None,
    base_patch=None,
    table=None,
    resize="pi",
    mean=None,
    std=None,
    ignore=(),
    seed=1337,
):
    """A published checkpoint as a run: the same numbers, or a new model initialized from it.

    Args:
        source: file, folder, hub name or KerasHub backbone, see `read_checkpoint`.
        family: "ast" (Hugging Face's or the authors'), "ssast", "flexiast", "elasticast",
            "vit" or "deit"; None to tell from the names. A fine-tuned SSAST is named like
            an AST but averages its patches: say "ssast".
        to: None keeps the model as published (an image model becomes a "flexiast").
            "flexiast" and "elasticast" initialize such a model as the papers do: patches
            side by side, the table resized to their grid; an ElasticAST's pooling is the
            mean of the encoder's attention, its tables the additive part of the joint one.
        classes: names of the classes, or their number. As many as the checkpoint's head
            has name them; another number starts a new head. None keeps the checkpoint's.
        num_heads: None for the configuration's, or width / 64.
        mel_bins, frames: of the spectrogram: the checkpoint's where the file does not say;
            with `to` the new model's. None for the checkpoint's, or 128 and 1,024 for image
            models.
        stride: int or (frequency, time) of the checkpoint; None to tell from the table.
        base_patch: of the initialized model; None for 16. The kernel is resized.
        table: how a position table is brought to another grid: "ast" cuts its middle or
            stretches it without antialias, "resize" always resizes it, antialiased. None
            for "ast" with image models, else "resize", as the papers.
        resize: "pi" or "bilinear", for the kernel here and in the model.
        mean, std: of log-mel; None for the checkpoint's, or its data set's.
        ignore: regular expressions of further source names to leave out.
        seed: of new weights.

    Returns:
        Conversion.

    Raises:
        ValueError: a name is missing, misshapen or unknown; the family, the configuration
            or an option contradicts the weights. Else as `read_checkpoint`.

    Reference: AST, arXiv:2104.01778; SSAST, arXiv:2110.09784; FlexiAST, arXiv:2307.09286;
        ElasticAST, arXiv:2407.08691; ViT, arXiv:2010.11929; DeiT, arXiv:2012.12877.
    """
    for name, value, choices in (
        ("family", family, (None, *FAMILIES)), ("to", to, (None, *TARGETS)),
        ("table", table, (None, *TABLE_RULES)), ("resize", resize, RESIZES),
    ):  # fmt: skip
        check_choice(name, value, choices)
    checkpoint = read_checkpoint(source)
    family = family_of(checkpoint, family)
    if family in IMAGES and to is None:
        to = "flexiast"
    names = Names(checkpoint, family)
    own = (None, None) if to else (mel_bins, frames)
    parts, options = read_model(names, family, num_heads, *own, stride)
    ignored = {**checkpoint.ignored, **names.leftover(ignore)}
    trained_frames, new = options.pop("frames"), {}
    if to is not None:
        if family in IMAGES:
            frames, mel_bins, table = frames or FRAMES, mel_bins or 128, table or "ast"
        frames = frames or trained_frames or _span(options, 1)
        mel_bins, table = mel_bins or options["mel_bins"], table or "resize"
        base_patch = patch_pair(base_patch or BASE_PATCH, "base_patch")
        ignored.update(
            _initialize(parts, options, names, to, base_patch, mel_bins, frames, table, resize)
        )
        trained_frames = None
    elif base_patch is not None or table is not None:
        raise ValueError(
            "base_patch and table are for initializing another model; give to='flexiast' or "
            "to='elasticast' too."
        )
    labels = _labels(checkpoint, parts, classes, new)
    keras.utils.set_random_seed(seed)
    model = PackedAST(len(labels), resize=resize, remainder="crop", **options)
    _assign(model, parts, new)
    fbank = _front_end(names, family, parts, model.mel_bins, trained_frames, mean, std)
    patches = model.patch_settings()
    frames = trained_frames or _span(options, 1)
    tokens = int(token_count(frames, model.mel_bins, model.base_patch, patches))
    row_length = max(256, -(-tokens // 64) * 64)
    packing = PackSettings(max(1, 4096 // row_length), row_length, model.segments)
    run = Run(
        model, fbank, patches, packing, labels, _multi_label(checkpoint, labels),
        clip_seconds=round(frames * fbank.frame_shift_ms / 1000, 3),
    )  # fmt: skip
    return Conversion(run, family, tuple(sorted(names.used)), ignored, new, tuple(names.notes))


# === Initializing another model ===


def _span(options, axis):
    """Bins or frames that a grid covers."""
    stride = (options.get("stride") or options["base_patch"])[axis]
    return (options["grid"][axis] - 1) * stride + options["base_patch"][axis]


def _initialize(parts, options, names, to, base_patch, mel_bins, frames, rule, resize):
    """Turn the parts of one model into the start of another, as the papers do.

    Returns:
        {source name: reason} of what the other model has no place for.
    """
    dropped = {}
    kernel, grid = parts["kernel"], (mel_bins // base_patch[0], frames // base_patch[1])
    if min(grid) < 1:
        raise ValueError(
            f"a spectrogram of {mel_bins} mel bins and {frames} frames holds no patch of "
            f"{base_patch[0]}x{base_patch[1]}."
        )
    parts["kernel"] = resize_kernel(kernel, base_patch, resize).astype("float32")
    if "joint" in parts:
        over_f, over_t = (
            _table_matrix(before, after, rule)
            for before, after in zip(parts["joint"].shape, grid, strict=False)
        )
        parts["joint"] = np.einsum("if,jt,ftd->ijd", over_f, over_t, parts["joint"])
    else:
        for axis, name in enumerate(("freq", "time")):
            matrix = _table_matrix(len(parts[name]), grid[axis], rule)
            parts[name] = matrix @ parts[name]
    options.update(grid=grid, base_patch=base_patch, stride=None, mel_bins=mel_bins)
    if to == "flexiast":
        if "prefix" not in parts:
            raise ValueError(
                f"{names.checkpoint.origin} is an ElasticAST, without the [CLS] token that a "
                f"FlexiAST starts from. Use to='elasticast'."
            )
        prefix = len(parts["prefix"])
        pooling = {count: name for name, count in PREFIX_TOKENS.items() if count}[prefix]
        options.update(pooling=pooling, position="grid")
        return dropped
    options.update(pooling="attention", prefix_tokens=0, position="physical")
    if "joint" in parts:
        joint = parts.pop("joint")
        mean = joint.mean((0, 1))  # counted once: half of it in either table
        parts["freq"], parts["time"] = joint.mean(1) - mean / 2, joint.mean(0) - mean / 2
        del parts["prefix"]
        for name in ("cls_token", "dist_token"):
            if names.has(name):
                dropped[names.theirs(name)] = "an ElasticAST has no prefix tokens"
                names.used.discard(names.theirs(name))
    if "pool" not in parts:
        layers = [block["attention"] for block in parts["blocks"]]
        parts["pool"] = [
            [np.mean(arrays, 0) for arrays in zip(*projections, strict=True)]
            for projections in zip(*layers, strict=True)
        ]
    return dropped


def _table_matrix(before, after, rule):
    """Matrix (after, before) that brings one axis of a position table to another size."""
    if rule == "resize":
        return bilinear_matrix(before, after, antialias=True)
    if after > before:
        return bilinear_matrix(before, after)
    start = before // 2 - after // 2
    return np.eye(before)[start : start + after]


# === Our model ===


def _labels(checkpoint, parts, classes, new):
    """Names of the classes; notes in `new`, and drops, a head that does not fit them."""
    rows = parts["head"][0].shape[1] if "head" in parts else None
    if isinstance(classes, int):
        check_positive("classes", classes, int)
        classes = [f"class {index}" for index in range(classes)] if classes != rows else None
    if classes is not None:
        classes = tuple(map(str, classes))
        if len(set(classes)) != len(classes) or not classes:
            raise ValueError(f"classes={classes!r} must be different names, at least one.")
        if rows is not None and len(classes) != rows:
            new["head"] = f"{len(classes)} classes instead of the checkpoint's {rows}"
            del parts["head"]
        return classes
    if rows is None:
        raise ValueError(
            f"{checkpoint.origin} has no classifier. Give classes= (--classes), their names or "
            f"number, for a new one."
        )
    labels = checkpoint.config.get("id2label")
    if labels is None:
        return tuple(f"class {index}" for index in range(rows))
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


def _assign(model, parts, new):
    """Put the parts into the model's layers; what is missing stays new."""

    def put(layer, *values):
        model.get_layer(layer).set_weights(values)

    def put_attention(layer, projections):
        names = ("query", "key", "value", "output")
        for name, values in zip(names, projections, strict=True):
            getattr(layer, f"{name}_dense").set_weights(values)

    put("patch_embed", parts["kernel"], parts["kernel_bias"])
    if "joint" in parts:
        put("position_embed", parts["joint"])
    else:
        put("position_embed", parts["freq"], parts["time"])
    if model.prefix_tokens:
        put("prefix_tokens", parts["prefix"])
    for index, part in enumerate(parts["blocks"]):
        block = model.get_layer(f"block_{index}")
        put_attention(block.attention, part["attention"])
        for name in ("attention_norm", "mlp_norm", "mlp_hidden", "mlp_output"):
            getattr(block, name).set_weights(part[name])
    put("norm", *parts["norm"])
    if model.pooling == "attention":
        put_attention(model.get_layer("pooling"), parts["pool"])
        if "query" in parts:
            model.get_layer("pooling").query.assign(parts["query"])
        else:
            new["pooling's query"] = "the source pools otherwise"
    for name in ("head_norm", "head"):
        if name in parts:
            put(name, *parts[name])
        elif name not in new:
            new[name] = "the source has no classifier of sounds"


def _front_end(names, family, parts, mel_bins, frames, mean, std):
    """FbankSettings that the checkpoint was trained with."""
    features = {} if family in IMAGES else names.checkpoint.features
    values = {"mel_bins": mel_bins}
    if features:
        normalized = features.get("do_normalize", True)
        values.update(
            mean=features.get("mean", FbankSettings.mean) if normalized else 0.0,
            std=features.get("std", FbankSettings.std) if normalized else 0.5,
            sample_rate=features.get("sampling_rate", FbankSettings.sample_rate),
            remove_clip_mean=False,  # Hugging Face's extractor does not
        )
    elif mean is None or std is None:
        known = _STATISTICS.get(family, _STATISTICS[""])
        rows = parts["head"][0].shape[1] if "head" in parts else 527
        if rows in known:
            name, values["mean"], values["std"] = known[rows]
            names.notes.append(f"mean and std of log-mel are {name}'s")
        else:
            names.notes.append(
                "mean and std of log-mel are AudioSet's; --mean and --std give the training "
                "data's own, which flexast stats measures"
            )
    values.update({k: v for k, v in (("mean", mean), ("std", std)) if v is not None})
    fbank = FbankSettings(**values)
    if frames is None:
        return fbank
    return dataclasses.replace(fbank, clip_ms=frames * fbank.frame_shift_ms)


def _multi_label(checkpoint, labels):
    """Whether the scores are sigmoid, each label on its own."""
    problem = checkpoint.config.get("problem_type")
    if problem is not None:
        return problem == "multi_label_classification"
    return len(labels) == AUDIOSET_CLASSES
