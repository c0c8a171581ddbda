"""From a normalised spectrogram to tokens of one width, whatever the patch size."""

import functools

import numpy as np
import tensorflow as tf

from tf_data_pipelines.resize import (
    axis_grid,
    kernel_matrix,
    patch_centre,
    patch_count,
    patch_start,
    patch_step,
)


def patch_tokens(spectrogram, settings, choice=0, frame_shift_scale=1.0, max_tokens=None):
    """Cut a clip into patches and map every patch to the base patch size.

    A patch x of p_f x p_t becomes `R_f^T x R_t`, with R the matrices that would resize the
    base kernel to p_f x p_t; so the one base kernel serves every size. Frequency is one
    matrix product over the mel axis, cut and resize together; then time.

    Args:
        spectrogram: float32 (frames, mel_bins), normalised, mel_bins static. A clip
            shorter than one patch is padded with zeros to one.
        settings: PatchSettings.
        choice: int32 scalar, which of settings.patch_sizes.
        frame_shift_scale: this clip's frame shift over the filterbank's own; "physical"
            positions use it.
        max_tokens: int; a clip with more loses its last patches. None keeps all.

    Returns:
        tokens float32 (tokens, 256), the area of the base patch, frequency-major inside a
        patch, and positions
        float32 (tokens, 4): frequency centre, time centre, frequency extent, time extent
        in base-grid cells. Tokens run through time inside each band. Prefix tokens come
        first, all zeros, with positions (k, 0, 0, 0): extent 0 marks them.
    """
    mel_bins = spectrogram.shape[1]
    plan = _plan(settings, mel_bins)
    (base_f, base_t), axis_t = settings.base_patch, settings.axes[1]
    patch_t = tf.gather(plan["patch_t"], choice)
    step_t = tf.gather(plan["step_t"], choice)
    count_f = tf.gather(plan["count_f"], choice)
    spectrogram = tf.pad(
        spectrogram, [[0, tf.maximum(0, patch_t - tf.shape(spectrogram)[0])], [0, 0]]
    )
    if max_tokens is not None:
        room = (max_tokens - settings.prefix_tokens) // count_f
        spectrogram = spectrogram[: tf.maximum(0, room - 1) * step_t + patch_t]
    frames = tf.shape(spectrogram)[0]
    count_t = patch_count(frames, patch_t, step_t, settings.remainder)
    index_t = tf.range(count_t)
    start_t = patch_start(index_t, count_t, frames, patch_t, step_t, settings.remainder)
    if settings.remainder == "pad":
        spectrogram = tf.pad(spectrogram, [[0, start_t[-1] + patch_t - frames], [0, 0]])

    cut_f = tf.gather(plan["cut_f"], choice)[:, : count_f * base_f]
    resize_t = tf.gather(plan["resize_t"], choice)[:, :patch_t]
    bands = tf.matmul(spectrogram, cut_f)  # (frames, count_f * base_f)
    windows = tf.gather(bands, start_t[:, None] + tf.range(patch_t))  # (count_t, p_t, ...)
    tokens = tf.matmul(resize_t[None], windows)  # (count_t, base_t, ...)
    tokens = tf.reshape(tokens, [count_t, base_t, count_f, base_f])
    tokens = tf.transpose(tokens, [2, 0, 3, 1])
    tokens = tf.reshape(tokens, [count_f * count_t, base_f * base_t])

    centre_t, extent_t = patch_centre(
        tf.cast(index_t, tf.float32),
        tf.cast(count_t, tf.float32),
        tf.cast(start_t, tf.float32),
        tf.cast(patch_t, tf.float32),
        settings.position,
        axis_t,
        frame_shift_scale,
    )
    along_f = tf.gather(plan["position_f"], choice)[:count_f]
    along_t = tf.stack([centre_t, extent_t], -1)
    along_f = tf.repeat(along_f, count_t, axis=0)
    along_t = tf.tile(along_t, [count_f, 1])
    positions = tf.stack([along_f[:, 0], along_t[:, 0], along_f[:, 1], along_t[:, 1]], -1)

    prefix = np.zeros((settings.prefix_tokens, 4), "float32")
    prefix[:, 0] = np.arange(settings.prefix_tokens)
    tokens = tf.pad(tokens, [[settings.prefix_tokens, 0], [0, 0]])
    return tokens, tf.concat([prefix, positions], 0)


@functools.cache
def _plan(settings, mel_bins):
    """Constants for every patch size, padded to one shape so that a draw is a gather."""
    sizes, (base_f, base_t), (axis_f, axis_t) = (
        settings.patch_sizes, settings.base_patch, settings.axes,
    )  # fmt: skip
    policies = settings.remainder, settings.position
    grids = [axis_grid(mel_bins, size[0], axis_f, *policies, "frequency") for size in sizes]
    most = max(len(starts) for starts, _, _ in grids)
    longest = max(patch_t for _, patch_t in sizes)
    cut_f = np.zeros((len(sizes), mel_bins, most * base_f), "float32")
    position_f = np.zeros((len(sizes), most, 2), "float32")
    resize_t = np.zeros((len(sizes), base_t, longest), "float32")
    for k, ((patch_f, patch_t), (starts, centres, extents)) in enumerate(
        zip(sizes, grids, strict=True)
    ):
        resize_f = kernel_matrix(patch_f, base_f, settings.resize)
        for j, start in enumerate(starts):
            inside = min(patch_f, mel_bins - start)  # "pad": the bins beyond are zeros
            cut_f[k, start : start + inside, j * base_f : (j + 1) * base_f] = resize_f[:inside]
        position_f[k, : len(starts)] = np.stack([centres, extents], -1)
        resize_t[k, :, :patch_t] = kernel_matrix(patch_t, base_t, settings.resize).T
    return {
        "patch_t": np.array([patch_t for _, patch_t in sizes], "int32"),
        "step_t": np.array([patch_step(patch_t, axis_t) for _, patch_t in sizes], "int32"),
        "count_f": np.array([len(starts) for starts, _, _ in grids], "int32"),
        "cut_f": cut_f,
        "position_f": position_f,
        "resize_t": resize_t,
    }
