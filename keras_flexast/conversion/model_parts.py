"""Parts of a published model, as a PackedAST has them: its weights and its options.

Sizes come from the shapes of the weights and from the configuration, which must agree.
"""

import dataclasses
import math
import re

import numpy as np

from keras_flexast.conversion.layouts import image_layout, sound_layout
from keras_flexast.conversion.weight_names import IMAGE_FAMILIES
from tf_data_pipelines.settings import check_positive

HEAD_WIDTH = 64  # of every published ViT, DeiT and AST but the largest
HUGE_DIM, HUGE_HEADS = 1280, 16  # the largest, ViT-H


@dataclasses.dataclass
class ModelParts:
    """A model that is read, but not yet built.

    Args:
        options: arguments of PackedAST, all but num_classes.
        weights: arrays in the layout of Keras, by part. `kernel` (frequency, time, dim) and
            `kernel_bias`; position tables: `joint` (frequency, time, dim), or `freq` and
            `time`; `prefix` (tokens, dim); `blocks`, a list of {layer: arrays}; `norm`;
            `pooling`, four projections, and `pooling_query`; `head_norm`; `head`. A part
            that the model does not have is absent.
        frames: number of frames in the spectrograms that the model was trained on; None for
            any number.
    """

    options: dict
    weights: dict
    frames: int | None = None

    @property
    def classes(self):
        """Number of outputs of the classifier; None without a classifier."""
        return self.weights["head"][0].shape[1] if "head" in self.weights else None

    def span(self, axis):
        """Number of bins (axis 0) or frames (axis 1) that the grid of patches covers."""
        base = self.options["base_patch"][axis]
        stride = (self.options.get("stride") or self.options["base_patch"])[axis]
        return (self.options["grid"][axis] - 1) * stride + base


def read_parts(names, *, num_heads=None, mel_bins=None, frames=None, stride=None):
    """Read the parts of a model as published.

    Args:
        names: WeightNames.
        num_heads: number of attention heads; None for the configuration's, or dim / 64.
        mel_bins, frames: size of the spectrograms; None for what the checkpoint says.
        stride: int or (frequency, time): bins and frames from one patch to the next; None
            for what the checkpoint says.

    Returns:
        ModelParts.

    Raises:
        ValueError: a weight is missing or misshapen, the sizes do not follow from the
            checkpoint, or the configuration contradicts the weights.
    """
    checkpoint = names.checkpoint
    (dim,) = names.get("norm.weight", (None,)).shape
    (hidden,) = names.get("blocks.0.mlp.fc1.bias", (None,)).shape
    blocks = [_read_block(names, f"blocks.{i}", (dim, hidden)) for i in range(_depth(names))]
    options = {
        "dim": dim,
        "depth": len(blocks),
        "num_heads": _num_heads(checkpoint, dim, num_heads),
        "mlp_ratio": hidden / dim,
        "attention_scale": None,
        "norm_epsilon": checkpoint.setting(
            "layer_norm_eps", "layernorm_epsilon_encoder", "layernorm_epsilon", default=1e-6
        ),
        "head_norm_epsilon": checkpoint.setting(
            "layer_norm_eps", "layernorm_epsilon_head", default=1e-5
        ),
    }
    parts = ModelParts(options, {"norm": names.pair("norm", (dim,)), "blocks": blocks})
    if names.family == "elasticast":
        _read_elasticast(parts, names, mel_bins)
    else:
        _read_ast(parts, names, mel_bins=mel_bins, frames=frames, stride=stride)
    head = ("head.weight", "head.bias", "head_norm.weight", "head_norm.bias")
    if names.family not in IMAGE_FAMILIES and any(map(names.has, head)):
        parts.weights["head_norm"] = names.pair("head_norm", (dim,))
        parts.weights["head"] = names.pair("head", (None, dim))
    _check_config(parts, names, hidden)
    return parts


def _depth(names):
    """Number of blocks: the largest number after `blocks.`, as the checkpoint calls it, plus 1."""
    start = names.theirs("blocks.0.norm1.weight").split("0")[0]
    rests = [name.removeprefix(start) for name in names.weights if name.startswith(start)]
    numbers = [re.match(r"\d+", rest) for rest in rests]
    return 1 + max((int(number[0]) for number in numbers if number), default=0)


def _num_heads(checkpoint, dim, num_heads):
    if num_heads is None:
        num_heads = checkpoint.setting("num_attention_heads", "heads")
    if num_heads is None and dim % HEAD_WIDTH == 0:
        num_heads = HUGE_HEADS if dim == HUGE_DIM else dim // HEAD_WIDTH
    if num_heads is None:
        raise ValueError(
            f"{checkpoint.origin} does not say how many attention heads a model of width {dim} "
            f"has. Give num_heads= (--num-heads)."
        )
    check_positive("num_heads", num_heads, int)
    if dim % num_heads:
        raise ValueError(
            f"{checkpoint.origin}: width {dim} is not a multiple of num_heads={num_heads} "
            f"(--num-heads)."
        )
    return num_heads


def _read_block(names, name, widths):
    dim, hidden = widths
    return {
        "attention_norm": names.pair(f"{name}.norm1", (dim,)),
        "self_attention": _read_attention(names, f"{name}.attn", dim),
        "mlp_norm": names.pair(f"{name}.norm2", (dim,)),
        "mlp_hidden": names.pair(f"{name}.mlp.fc1", (hidden, dim)),
        "mlp_output": names.pair(f"{name}.mlp.fc2", (dim, hidden)),
    }


def _read_attention(names, name, dim):
    """query, key, value and output, each [kernel, bias], however the checkpoint joins them."""
    projections = []
    for part, count in names.projections:
        weight = names.get(f"{name}.{part}.weight", (count * dim, dim))
        bias = np.zeros(count * dim)
        if names.biased:
            bias = names.get(f"{name}.{part}.bias", (count * dim,))
        for kernel, offset in zip(np.split(weight, count), np.split(bias, count), strict=True):
            projections.append([kernel.T, offset])
    return [*projections, names.pair(f"{name}.proj", (dim, dim))]


def _read_elasticast(parts, names, mel_bins):
    """Add an ElasticAST's kernel, two position tables and pooling."""
    checkpoint, dim = names.checkpoint, parts.options["dim"]
    weight = names.get("patch_embed.weight", (dim, None))
    side = math.isqrt(weight.shape[1])
    if side**2 != weight.shape[1]:
        raise ValueError(
            f"{checkpoint.origin}: {names.theirs('patch_embed.weight')} has shape "
            f"{weight.shape}; expected square patches."
        )
    freq, time = names.get("pos_embed_freq", (None, dim)), names.get("pos_embed_time", (None, dim))
    parts.weights.update(
        kernel=weight.T.reshape(side, side, dim),
        kernel_bias=names.get("patch_embed.bias", (dim,)),
        freq=freq,
        time=time,
        pooling=_read_attention(names, "pool", dim),
        pooling_query=names.get("pool_query", (dim,)),
    )
    if mel_bins is None:
        mel_bins = checkpoint.setting("mel_bins", default=len(freq) * side)
    parts.options.update(
        pooling="attention",
        grid=(len(freq), len(time)),
        base_patch=(side, side),
        mel_bins=mel_bins,
        position="physical",
        attention_scale=checkpoint.setting("attention_scale", default=1.0),  # their code has none
        head_norm_epsilon=checkpoint.setting("layernorm_epsilon", default=1e-6),
    )


def _read_ast(parts, names, *, mel_bins, frames, stride):
    """Add the kernel, prefix tokens and joint position table of any other family."""
    origin, family, dim = names.checkpoint.origin, names.family, parts.options["dim"]
    weight = names.get("patch_embed.weight", (dim, None, None, None))
    channels = 3 if family in IMAGE_FAMILIES else 1
    if weight.shape[1] != channels:
        raise ValueError(
            f"{origin}: {names.theirs('patch_embed.weight')} has {weight.shape[1]} input "
            f"channels; family {family!r} has {channels}."
        )
    base_patch = weight.shape[2:]
    tokens = [
        names.get(name, (1, 1, dim))[0, 0]
        for name in ("cls_token", "dist_token")
        if name == "cls_token" or names.has(name)
    ]
    table, prefix = names.get("pos_embed", (1, None, dim))[0], len(tokens)
    cells = len(table) - prefix
    if cells < 1:
        raise ValueError(
            f"{origin}: {names.theirs('pos_embed')} has {len(table)} positions for {prefix} prefix "
            f"tokens; expected more, for patches."
        )
    if family in IMAGE_FAMILIES:
        layout = image_layout(names, cells, base_patch)
    else:
        layout = sound_layout(
            names, cells, base_patch=base_patch, mel_bins=mel_bins, frames=frames, stride=stride
        )
    parts.weights.update(
        kernel=np.moveaxis(weight.sum(1), 0, 2),  # (frequency, time, dim)
        kernel_bias=names.get("patch_embed.bias", (dim,)),
        prefix=np.stack(tokens) + table[:prefix],
        joint=table[prefix:].reshape(*layout.grid, dim),
    )
    parts.options.update(
        pooling="mean" if family == "ssast" else ("cls", "cls_distillation")[prefix - 1],
        prefix_tokens=prefix,
        grid=layout.grid,
        base_patch=base_patch,
        stride=layout.stride,
        mel_bins=layout.mel_bins,
        position="grid",
    )
    parts.frames = layout.frames


def _check_config(parts, names, hidden):
    """Raise where a configuration contradicts the weights."""
    config, origin, options = names.checkpoint.config, names.checkpoint.origin, parts.options
    found = {
        ("hidden_size", "dim"): options["dim"],
        ("num_hidden_layers", "depth"): options["depth"],
        ("intermediate_size",): hidden,
        ("patch_size", "base_patch"): options["base_patch"][0],
        ("prefix_tokens",): options.get("prefix_tokens", 0),
    }
    if parts.classes is not None:
        found["num_labels", "classes"] = parts.classes
        if "id2label" in config:
            config = {"num_labels": len(config["id2label"]), **config}
    for keys, value in found.items():
        for key in keys:
            if key in config and config[key] != value:
                raise ValueError(
                    f"{origin}: the configuration says {key}={config[key]}, the weights say "
                    f"{value}. They belong to different models."
                )
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"{origin}: hidden_act={config['hidden_act']!r} is not supported; expected 'gelu'."
        )
    if names.family in IMAGE_FAMILIES:
        return
    features = names.checkpoint.features
    for key, value in (("num_mel_bins", options["mel_bins"]), ("max_length", parts.frames)):
        if key in features and features[key] != value:
            raise ValueError(
                f"{origin}: preprocessor_config.json says {key}={features[key]}, config.json says "
                f"{value}."
            )
