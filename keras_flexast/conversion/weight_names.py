"""Published models under our names: what each family calls its weights, and their shapes.

A family says what its weights are called; everything else is read from shapes and
configuration. Each source name is used, or listed as ignored with the reason, or an error.
"""

import math
import re

import numpy as np

from tf_data_pipelines.settings import check_positive, patch_pair

IMAGES = ("vit", "deit")
HEAD_WIDTH = 64  # of every published ViT, DeiT and AST but the largest

# What a weight of ours is called there: the first pattern that fits, replaced.
_IMAGE_HEAD = (r"(v\.)?(head(_dist)?|pre_logits(\.fc)?)\.", "ImageNet's classifier")
_AST_HEAD = ((r"head_norm\.", "mlp_head.0."), (r"head\.", "mlp_head.1."))
_NAMES = {
    "ast": ((r"patch_embed\.", "v.patch_embed.proj."), *_AST_HEAD, (r"", "v.")),
    "flexiast": (
        (r"patch_embed\.", "patch_embed.proj."),
        (r"pos_embed$", "pos_embed.pos_embed"),
        *_AST_HEAD,
        (r"", "v."),
    ),
    "elasticast": (
        (r"patch_embed\.", "patch_embed.0."),
        (r"blocks\.", "blocks.modules_list."),
        (r"pool\.", "attn_pool."),
        (r"pool_query$", "attn_pool_queries"),
        (r"head_norm\.", "mlp_norm."),
    ),
    "vit": ((r"patch_embed\.", "patch_embed.proj."),),
    "hugging_face": (
        (r"patch_embed\.", "BODY.embeddings.patch_embeddings.projection."),
        (r"pos_embed$", "BODY.embeddings.position_embeddings"),
        (r"cls_token$", "BODY.embeddings.cls_token"),
        (r"dist_token$", "BODY.embeddings.distillation_token"),
        (r"blocks\.(\d+)\.norm1\.", r"BODY.encoder.layer.\1.layernorm_before."),
        (r"blocks\.(\d+)\.norm2\.", r"BODY.encoder.layer.\1.layernorm_after."),
        (r"blocks\.(\d+)\.attn\.q\.", r"BODY.encoder.layer.\1.attention.attention.query."),
        (r"blocks\.(\d+)\.attn\.k\.", r"BODY.encoder.layer.\1.attention.attention.key."),
        (r"blocks\.(\d+)\.attn\.v\.", r"BODY.encoder.layer.\1.attention.attention.value."),
        (r"blocks\.(\d+)\.attn\.proj\.", r"BODY.encoder.layer.\1.attention.output.dense."),
        (r"blocks\.(\d+)\.mlp\.fc1\.", r"BODY.encoder.layer.\1.intermediate.dense."),
        (r"blocks\.(\d+)\.mlp\.fc2\.", r"BODY.encoder.layer.\1.output.dense."),
        (r"norm\.", "BODY.layernorm."),
        (r"head_norm\.", "classifier.layernorm."),
        (r"head\.", "classifier.dense."),
    ),
}
_IGNORED = {
    "ast": (
        _IMAGE_HEAD,
        (r"[cg]predlayer\.", "head of the pretraining"),
        (r"mask_embed$", "mask token of the pretraining"),
    ),
    "flexiast": (
        _IMAGE_HEAD,
        (r"v\.(patch_embed\.|pos_embed$)", "stale copy beside FlexiAST's own"),
    ),
    "elasticast": (),
    "vit": (_IMAGE_HEAD,),
    "hugging_face": (
        (r"((cls_|distillation_)?classifier|.*pooler\.dense)\.", "ImageNet's classifier"),
        (r".*embeddings\.mask_token$", "mask token of the pretraining"),
    ),
}
_ALIKE = {"ssast": "ast", "deit": "vit"}
FAMILIES = ("ast", "ssast", "flexiast", "elasticast", *IMAGES)


# === Names ===


def family_of(checkpoint, wanted):
    """The family that the names tell, checked against the one that was asked for."""
    names, config = checkpoint.weights, checkpoint.config

    def any_starts(*starts):
        return any(name.startswith(starts) for name in names)

    distilled = any(name.endswith(("dist_token", "distillation_token")) for name in names)
    one_channel = any(array.ndim == 4 and array.shape[1] == 1 for array in names.values())
    if any_starts("blocks.modules_list.", "attn_pool"):
        told = "elasticast"
    elif "pos_embed.pos_embed" in names or (any_starts("patch_embed.") and any_starts("v.")):
        told = "flexiast"
    elif any_starts("v."):
        told = "ssast" if any_starts("p_input_", "cpredlayer.", "gpredlayer.") else "ast"
    elif (
        one_channel
        or any_starts("audio_spectrogram_transformer.")
        or config.get("model_type") == "audio-spectrogram-transformer"
    ):
        told = "ast"
    elif any_starts("blocks.", "vit.", "deit.", "encoder.layer."):
        told = "deit" if distilled else "vit"
    else:
        some = ", ".join(list(names)[:4])
        raise ValueError(
            f"{checkpoint.origin} is of no known family ({', '.join(FAMILIES)}): its names are "
            f"{some}, ..."
        )
    if wanted is None or wanted == told or {wanted, told} == {"ast", "ssast"}:
        return wanted or told
    raise ValueError(
        f"{checkpoint.origin} is of family {told!r} by the names of its weights, not {wanted!r}. "
        f"Leave family out, or give another file."
    )


class Names:
    """The weights of a checkpoint under our names, and the account of theirs."""

    def __init__(self, checkpoint, family):
        self.checkpoint = checkpoint
        self.weights = checkpoint.weights
        bodies = ("audio_spectrogram_transformer", "vit", "deit")
        hugging_face = any("encoder.layer." in name for name in self.weights)
        key = "hugging_face" if hugging_face else _ALIKE.get(family, family)
        if key == "elasticast":
            self.projections = (("to_q", 1), ("to_kv", 2))
        elif hugging_face or "blocks.0.attn.q.weight" in self.weights:  # or KerasHub
            self.projections = (("q", 1), ("k", 1), ("v", 1))
        else:
            self.projections = (("qkv", 3),)
        # Some ViTs are made without these biases: then none of the blocks has one.
        self.biased = any(
            re.search(r"(qkv|query|to_q|attn\.q)\.bias$", name) for name in self.weights
        )
        body = next(
            (one for one in bodies if any(n.startswith(one + ".") for n in self.weights)), ""
        )
        body = body and f"{body}."
        self.rules = [(ours, theirs.replace("BODY.", body)) for ours, theirs in _NAMES[key]]
        self.ignored = _IGNORED[key]
        self.used = set()
        self.notes = []  # what was assumed where the source does not say

    def theirs(self, name):
        """Source name of a weight of ours."""
        for pattern, replacement in self.rules:
            if re.match(pattern, name):
                return re.sub(f"^{pattern}", replacement, name, count=1)
        return name

    def has(self, name):
        return self.theirs(name) in self.weights

    def get(self, name, *shape):
        """float32 array of a weight of ours; None in `shape` is any size.

        Raises:
            ValueError: it is missing, of another shape, or not finite.
        """
        theirs = self.theirs(name)
        if theirs not in self.weights:
            raise ValueError(
                f"{self.checkpoint.origin} has no {theirs}, which a model of this family needs."
            )
        array = self.weights[theirs]
        fits = len(shape) == array.ndim and all(
            wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if one is None else str(one) for one in shape)
            raise ValueError(
                f"{self.checkpoint.origin}: {theirs} has shape {array.shape}, expected ({wanted})."
            )
        array = np.asarray(array, "float32")
        if not np.isfinite(array).all():
            raise ValueError(f"{self.checkpoint.origin}: {theirs} holds NaN or infinity.")
        self.used.add(theirs)
        return array

    def pair(self, name, *shape):
        """(weight, bias) with a PyTorch weight transposed to a Keras kernel."""
        weight = self.get(f"{name}.weight", *shape)
        return [weight.T, self.get(f"{name}.bias", shape[0])]

    def leftover(self, ignore):
        """{name: reason} of everything that was not used."""
        ignored, unknown = {}, []
        try:
            asked = [(re.compile(pattern), "as asked for") for pattern in ignore]
        except re.error as error:
            raise ValueError(f"ignore={ignore!r} is no regular expression: {error}.") from error
        patterns = (*self.ignored, *asked)
        for name in self.weights:
            if name in self.used:
                continue
            reasons = [reason for pattern, reason in patterns if re.match(pattern, name)]
            if reasons:
                ignored[name] = reasons[0]
            else:
                unknown.append(name)
        if unknown:
            raise ValueError(
                f"{self.checkpoint.origin} has weights without a place in the model: "
                f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''} "
                f"({len(unknown)} in all). Leaving them out may change the results; ignore= "
                f"(--ignore) does so."
            )
        return ignored


# === Shapes ===


def read_model(names, family, num_heads, mel_bins, frames, stride):
    """(weights of our layers, arguments of PackedAST and `frames`) of the model as published."""
    config, origin = names.checkpoint.config, names.checkpoint.origin
    (dim,) = names.get("norm.weight", None).shape
    blocks = names.theirs("blocks.0.norm1.weight").split("0")[0]
    numbers = [
        re.match(r"\d+", one[len(blocks) :]) for one in names.weights if one.startswith(blocks)
    ]
    depth = 1 + max((int(number[0]) for number in numbers if number), default=0)
    hidden = names.get("blocks.0.mlp.fc1.bias", None).shape[0]
    parts = {"norm": names.pair("norm", dim)}
    parts["blocks"] = [
        {
            "attention_norm": names.pair(f"blocks.{index}.norm1", dim),
            "attention": _attention(names, f"blocks.{index}.attn", dim),
            "mlp_norm": names.pair(f"blocks.{index}.norm2", dim),
            "mlp_hidden": names.pair(f"blocks.{index}.mlp.fc1", hidden, dim),
            "mlp_output": names.pair(f"blocks.{index}.mlp.fc2", dim, hidden),
        }
        for index in range(depth)
    ]
    options = {
        "dim": dim,
        "depth": depth,
        "num_heads": _heads(config, origin, dim, num_heads),
        "mlp_ratio": hidden / dim,
        "attention_scale": None,
        "norm_epsilon": config.get(
            "layer_norm_eps",
            config.get("layernorm_epsilon_encoder", config.get("layernorm_epsilon", 1e-6)),
        ),
    }
    options["head_norm_epsilon"] = config.get(
        "layer_norm_eps", config.get("layernorm_epsilon_head", 1e-5)
    )
    if family == "elasticast":
        _read_elasticast(names, parts, options, dim, mel_bins)
    else:
        _read_table(names, parts, options, family, dim, mel_bins, frames, stride)
    head = ("head.weight", "head.bias", "head_norm.weight", "head_norm.bias")
    if family not in IMAGES and any(map(names.has, head)):
        parts["head_norm"] = names.pair("head_norm", dim)
        parts["head"] = names.pair("head", None, dim)
    _check_config(names, family, options, hidden, parts)
    return parts, options


def _attention(names, name, dim):
    """query, key, value and output, each [kernel, bias], however they were put together."""
    projections = []
    for part, count in names.projections:
        weight = names.get(f"{name}.{part}.weight", count * dim, dim)
        bias = np.zeros(count * dim)
        if names.biased:
            bias = names.get(f"{name}.{part}.bias", count * dim)
        for kernel, offset in zip(np.split(weight, count), np.split(bias, count), strict=True):
            projections.append([kernel.T, offset])
    return [*projections, names.pair(f"{name}.proj", dim, dim)]


def _heads(config, origin, dim, num_heads):
    told = config.get("num_attention_heads", config.get("heads"))
    if num_heads is None:
        num_heads = told
    if num_heads is None and dim % HEAD_WIDTH == 0:
        num_heads = 16 if dim == 1280 else dim // HEAD_WIDTH
    if num_heads is None:
        raise ValueError(
            f"{origin} does not say how many attention heads its width of {dim} has. Give "
            f"num_heads= (--num-heads)."
        )
    check_positive("num_heads", num_heads, int)
    if dim % num_heads:
        raise ValueError(f"{origin}: width {dim} is not a multiple of num_heads={num_heads}.")
    return num_heads


def _read_elasticast(names, parts, options, dim, mel_bins):
    weight = names.get("patch_embed.weight", dim, None)
    side = math.isqrt(weight.shape[1])
    if side**2 != weight.shape[1]:
        raise ValueError(
            f"{names.checkpoint.origin}: {names.theirs('patch_embed.weight')} has shape "
            f"{weight.shape}; expected patches as long as high."
        )
    parts["kernel"] = weight.T.reshape(side, side, dim)
    parts["kernel_bias"] = names.get("patch_embed.bias", dim)
    parts["freq"] = names.get("pos_embed_freq", None, dim)
    parts["time"] = names.get("pos_embed_time", None, dim)
    parts["pool"] = _attention(names, "pool", dim)
    parts["query"] = names.get("pool_query", dim)
    cells = len(parts["freq"])
    options.update(
        pooling="attention",
        grid=(cells, len(parts["time"])),
        base_patch=(side, side),
        mel_bins=mel_bins or names.checkpoint.config.get("mel_bins", cells * side),
        position="physical",
        attention_scale=names.checkpoint.config.get("attention_scale", 1.0),  # theirs has none
        head_norm_epsilon=names.checkpoint.config.get("layernorm_epsilon", 1e-6),
        frames=None,
    )


def _read_table(names, parts, options, family, dim, mel_bins, frames, stride):
    """Kernel, prefix tokens and joint table; the grid follows from their sizes."""
    config, origin = names.checkpoint.config, names.checkpoint.origin
    weight = names.get("patch_embed.weight", dim, None, None, None)
    channels = 3 if family in IMAGES else 1
    if weight.shape[1] != channels:
        raise ValueError(
            f"{origin}: {names.theirs('patch_embed.weight')} has {weight.shape[1]} input channels; "
            f"a {family} has {channels}."
        )
    parts["kernel"] = np.moveaxis(weight.sum(1), 0, 2)  # (frequency, time, dim)
    parts["kernel_bias"] = names.get("patch_embed.bias", dim)
    base = parts["kernel"].shape[:2]
    tokens = [names.get("cls_token", 1, 1, dim)]
    if names.has("dist_token"):
        tokens.append(names.get("dist_token", 1, 1, dim))
    prefix = len(tokens)
    table = names.get("pos_embed", 1, None, dim)[0]
    parts["prefix"] = np.concatenate(tokens)[:, 0] + table[:prefix]
    count = len(table) - prefix
    if family in IMAGES:
        side = math.isqrt(count)
        if side**2 != count:
            raise ValueError(
                f"{origin}: {names.theirs('pos_embed')} has {prefix} + {count} positions, which is "
                f"no square image."
            )
        grid, stride, frames, mel_bins = (side, side), base, side * base[1], side * base[0]
    else:
        for name in ("p_input_fdim", "p_input_tdim"):
            if name in names.weights:  # SSAST's own note of the spectrogram it was trained on
                names.used.add(name)
        mel_bins = (
            mel_bins
            or config.get("num_mel_bins", config.get("mel_bins"))
            or int(names.weights.get("p_input_fdim", 128))
        )
        frames = (
            frames
            or config.get("max_length", config.get("frames"))
            or (int(names.weights["p_input_tdim"]) if "p_input_tdim" in names.weights else None)
        )
        if stride is None and "frequency_stride" in config:
            stride = config["frequency_stride"], config["time_stride"]
        if stride is None and (family == "flexiast" or "p_input_tdim" in names.weights):
            stride = base  # both are trained without overlap
        guessed = stride is None or frames is None
        grid, stride, frames = _grid(origin, count, prefix, base, mel_bins, frames, stride)
        if guessed:
            names.notes.append(
                f"{mel_bins} mel bins, {frames} frames, patches every {stride[0]}x{stride[1]}: "
                f"told from {count} positions"
            )
    parts["joint"] = table[prefix:].reshape(*grid, dim)
    options.update(
        pooling="mean" if family == "ssast" else ("cls", "cls_distillation")[prefix - 1],
        prefix_tokens=prefix,
        grid=grid,
        base_patch=base,
        stride=stride,
        mel_bins=mel_bins,
        position="grid",
        frames=frames,
    )


def _grid(origin, count, prefix, base, mel_bins, frames, stride):
    """((frequency, time) cells, stride, frames) of a table with `count` cells.

    Where a file does not say, the published strides (the patch, 10, or a single frame) are
    tried, and multiples of 128 frames preferred.
    """
    if stride is not None:
        strides = [patch_pair(stride, "stride")]
    elif base[0] == mel_bins:
        strides = [base, (base[0], 1)]  # SSAST's whole frames
    else:
        strides = [base, (10, 10)] if min(base) > 10 else [base]
    found = []
    for step_f, step_t in strides:
        rows = (mel_bins - base[0]) // step_f + 1
        if rows < 1 or count % rows:
            continue
        columns = count // rows
        fewest = (columns - 1) * step_t + base[1]
        if frames is None:
            likely = (fewest + step_t - 1) // 128 * 128
            found.append(((rows, columns), (step_f, step_t), max(fewest, likely), likely >= fewest))
        elif (frames - base[1]) // step_t + 1 == columns:
            found.append(((rows, columns), (step_f, step_t), frames, True))
    found = [one for one in found if one[3]] or found
    if len(found) != 1:
        given = f"mel_bins={mel_bins}, frames={frames}, stride={stride}"
        fits = "fits none" if not found else f"fits {len(found)}"
        raise ValueError(
            f"{origin}: a table of {prefix} + {count} positions {fits} of the grids of patches of "
            f"{base[0]}x{base[1]} at {given}. Give the mel_bins, frames and stride that it was "
            f"trained with (--mel-bins, --frames, --stride)."
        )
    return found[0][:3]


def _check_config(names, family, options, hidden, parts):
    """Raise where a configuration says something else than the weights."""
    config = names.checkpoint.config
    told = {
        ("hidden_size", "dim"): options["dim"],
        ("num_hidden_layers", "depth"): options["depth"],
        ("intermediate_size",): hidden,
        ("patch_size", "base_patch"): options["base_patch"][0],
        ("prefix_tokens",): options.get("prefix_tokens", 0),
    }
    if "head" in parts:
        told[("num_labels", "classes")] = parts["head"][0].shape[1]
    if "id2label" in config and "head" in parts:
        config = {"num_labels": len(config["id2label"]), **config}
    for keys, found in told.items():
        for key in keys:
            if key in config and config[key] != found:
                raise ValueError(
                    f"{names.checkpoint.origin}: the configuration says {key}={config[key]}, the "
                    f"weights {found}. They belong to different models."
                )
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(
            f"{names.checkpoint.origin}: hidden_act={config['hidden_act']!r} is not supported; "
            f"expected 'gelu'."
        )
    features = names.checkpoint.features
    for key, ours in (("num_mel_bins", "mel_bins"), ("max_length", "frames")):
        if key in features and family not in IMAGES and features[key] != options[ours]:
            raise ValueError(
                f"{names.checkpoint.origin}: preprocessor_config.json says {key}={features[key]}, "
                f"config.json {options[ours]}."
            )
