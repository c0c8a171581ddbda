"""Another model, started from the parts of a published one as the papers do it."""

import numpy as np

from keras_flexast.conversion.model_parts import ModelParts
from keras_flexast.settings import POOLINGS
from tf_data_pipelines.resize import bilinear_matrix, resize_kernel


def initialize(parts, names, *, to, base_patch, mel_bins, frames, table, resize):
    """The parts of a FlexiAST or ElasticAST that starts from another model.

    Patches lie side by side. The kernel is resized to the base patch, the position table to
    the new grid. An ElasticAST's pooling is the mean of the encoder's attention layers, and
    its two tables are the additive part of the joint one.

    Args:
        parts: ModelParts of the published model.
        names: WeightNames of the published model; prefix tokens that find no place are listed
            there as ignored.
        to: "flexiast" or "elasticast".
        base_patch: (frequency, time): bins and frames of the new kernel.
        mel_bins, frames: size of the new model's spectrograms.
        table: "ast" or "resize": rule for the position table, see `convert_run`.
        resize: "pi" or "bilinear": how the kernel is resized.

    Returns:
        ModelParts.

    Raises:
        ValueError: the spectrogram is smaller than a patch, or a FlexiAST is to start from an
            ElasticAST.
    """
    grid = mel_bins // base_patch[0], frames // base_patch[1]
    if min(grid) < 1:
        raise ValueError(
            f"a spectrogram of {mel_bins} mel bins and {frames} frames holds no patch of "
            f"{base_patch[0]}x{base_patch[1]}."
        )
    weights = {**parts.weights, **_resized_tables(parts.weights, grid, table)}
    kernel = resize_kernel(weights["kernel"], base_patch, resize=resize)
    weights["kernel"] = kernel.astype("float32")
    options = {
        **parts.options, "grid": grid, "base_patch": base_patch, "stride": None,
        "mel_bins": mel_bins,
    }  # fmt: skip
    if to == "flexiast":
        if "prefix" not in weights:
            raise ValueError(
                f"{names.checkpoint.origin} is an ElasticAST, without the [CLS] token that a "
                f"FlexiAST starts from. Use to='elasticast' (--to elasticast)."
            )
        pooling = {POOLINGS[name]: name for name in ("cls", "cls_distillation")}
        options.update(pooling=pooling[len(weights["prefix"])], position="grid")
        return ModelParts(options, weights)
    options.update(pooling="attention", prefix_tokens=0, position="physical")
    if "joint" in weights:
        weights["freq"], weights["time"] = _additive_tables(weights.pop("joint"))
        del weights["prefix"]
        for name in ("cls_token", "dist_token"):
            names.ignore(name, "an ElasticAST has no prefix tokens")
    if "pooling" not in weights:
        weights["pooling"] = _mean_attention(weights["blocks"])
    return ModelParts(options, weights)


def _resized_tables(weights, grid, rule):
    """The position tables among the weights, brought to another grid."""
    if "joint" in weights:
        over_f, over_t = (
            _table_matrix(before, after, rule)
            for before, after in zip(weights["joint"].shape, grid, strict=False)
        )
        return {"joint": np.einsum("if,jt,ftd->ijd", over_f, over_t, weights["joint"])}
    return {
        name: _table_matrix(len(weights[name]), cells, rule) @ weights[name]
        for name, cells in zip(("freq", "time"), grid, strict=True)
    }


def _table_matrix(before, after, rule):
    """Matrix (after, before) that brings one axis of a position table to another size."""
    if rule == "resize":
        return bilinear_matrix(before, after, antialias=True)
    if after > before:
        return bilinear_matrix(before, after)
    start = before // 2 - after // 2
    return np.eye(before)[start : start + after]


def _additive_tables(joint):
    """Tables (frequency, dim) and (time, dim) whose sum is closest to a joint one."""
    mean = joint.mean((0, 1))  # both averages hold it: each table gives up half
    return joint.mean(1) - mean / 2, joint.mean(0) - mean / 2


def _mean_attention(blocks):
    """Mean over blocks of each projection's [kernel, bias]."""
    layers = [block["self_attention"] for block in blocks]
    return [
        [np.mean(arrays, 0) for arrays in zip(*projections, strict=True)]
        for projections in zip(*layers, strict=True)
    ]
