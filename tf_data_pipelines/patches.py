"""Normalized spectrograms to tokens of one width, whatever the patch size."""

import functools

import numpy as np
import tensorflow as tf

from tf_data_pipelines.resize import (
    axis_grid,
    kernel_matrix,
    patch_center,
    patch_count,
    patch_start,
    patch_step,
)
from tf_data_pipelines.settings import PatchSettings


def patch_tokens(
    spectrogram: tf.Tensor | np.ndarray,
    settings: PatchSettings,
    *,
    choice: int | tf.Tensor = 0,
    frame_shift_scale: float | tf.Tensor = 1.0,
    max_tokens: int | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cut a clip into patches and resize every patch to the base patch size.

    A patch x of p_f x p_t becomes `R_f^T x R_t`; R_f and R_t are the matrices that would
    resize the base kernel to p_f x p_t. So one base kernel serves every patch size.

    Args:
        spectrogram: float32 (frames, mel_bins), normalized, mel_bins static. A clip
            shorter than one patch is padded with zeros to one.
        settings: PatchSettings.
        choice: int32 scalar, index of the patch size in settings.patch_sizes.
        frame_shift_scale: frame shift of this clip over the filterbank's own, which
            "physical" positions need.
        max_tokens: largest number of tokens; a clip with more loses its last patches. None
            keeps all.

    Returns:
        tokens float32 (tokens, 256), as many numbers as the base patch has, frequency-major
        inside a patch; and positions float32 (tokens, 4): frequency center, time center,
        frequency extent, time extent in base-grid cells. Tokens run through time inside each
        band. Prefix tokens come first: zeros, with positions (k, 0, 0, 0); extent 0 marks them.
    """
    mel_bins = spectrogram.shape[1]
    plan = _plan(settings, mel_bins)
    (base_f, base_t), axis_t = settings.base_patch, settings.axes[1]
    patch_f, patch_t, step_t, count_f = tf.unstack(tf.gather(plan["numbers"], choice))
    spectrogram = tf.pad(
        spectrogram, [[0, tf.maximum(0, patch_t - tf.shape(spectrogram)[0])], [0, 0]]
    )
    if max_tokens is not None:
        last = _last_frame(max_tokens, settings, patch_t=patch_t, step_t=step_t, count_f=count_f)
        spectrogram = spectrogram[:last]
    frames = tf.shape(spectrogram)[0]
    count_t = patch_count(frames, patch_t, step_t, settings.remainder)
    index_t = tf.range(count_t)
    start_t = patch_start(
        index_t, count_t, size=frames, patch=patch_t, step=step_t, remainder=settings.remainder
    )
    if settings.remainder == "pad":
        missing = [start_t[-1] + patch_t - frames, plan["missing_f"]]
        spectrogram = tf.pad(spectrogram, [[0, size] for size in missing])

    start_f = tf.gather(plan["start_f"], choice)[:count_f]
    resize_f = tf.gather(plan["resize_f"], choice)[:, :patch_f]
    resize_t = tf.gather(plan["resize_t"], choice)[:patch_t]
    windows = tf.gather(spectrogram, start_t[:, None] + tf.range(patch_t))
    # (count_t, p_t, mel_bins) -> (count_f, p_f, count_t * p_t): whole rows move.
    windows = tf.transpose(tf.reshape(windows, [count_t * patch_t, -1]))
    windows = tf.gather(windows, start_f[:, None] + tf.range(patch_f))
    if settings.patch_sizes != (settings.base_patch,):  # a base patch is its own token
        windows = tf.matmul(resize_f, windows)  # (count_f, base_f, count_t * p_t)
        windows = tf.matmul(tf.reshape(windows, [-1, patch_t]), resize_t)
    tokens = tf.reshape(windows, [count_f, base_f, count_t, base_t])
    tokens = tf.transpose(tokens, [0, 2, 1, 3])
    tokens = tf.reshape(tokens, [-1, base_f * base_t])

    center_t, extent_t = patch_center(
        tf.cast(index_t, tf.float32),
        tf.cast(count_t, tf.float32),
        start=tf.cast(start_t, tf.float32),
        patch=tf.cast(patch_t, tf.float32),
        position=settings.position,
        axis=axis_t,
        scale=frame_shift_scale,
    )
    along_f = tf.gather(plan["position_f"], choice)[:count_f, None]
    along_t = tf.stack([0 * center_t, center_t, 0 * center_t, extent_t], -1)
    positions = tf.reshape(along_f + along_t, [-1, 4])  # (count_f, count_t, 4) before
    if settings.prefix_tokens:
        prefix = np.zeros((settings.prefix_tokens, 4), "float32")
        prefix[:, 0] = np.arange(settings.prefix_tokens)
        tokens = tf.pad(tokens, [[settings.prefix_tokens, 0], [0, 0]])
        positions = tf.concat([prefix, positions], 0)
    return tokens, positions


def check_patches(settings, mel_bins):
    """Raise a ValueError where a patch size does not fit a spectrogram of so many mel bins."""
    _plan(settings, mel_bins)


def token_counts(frames, mel_bins, settings, max_tokens=None):
    """Number of tokens that `patch_tokens` gives a clip at each patch size, int32 (sizes,).

    Args:
        frames: int32 (), number of frames of its spectrogram.
        mel_bins: number of mel bins.
        settings: PatchSettings.
        max_tokens: as in `patch_tokens`.
    """
    _, patch_t, step_t, count_f = _plan(settings, mel_bins)["numbers"].T
    step = {"patch_t": patch_t, "step_t": step_t, "count_f": count_f}
    frames = tf.maximum(frames, patch_t)
    if max_tokens is not None:
        frames = tf.minimum(frames, _last_frame(max_tokens, settings, **step))
    count_t = patch_count(frames, patch_t, step_t, settings.remainder)
    return count_f * count_t + settings.prefix_tokens


def _last_frame(max_tokens, settings, *, patch_t, step_t, count_f):
    """Frames of a clip that loses all its patches beyond `max_tokens`."""
    room = (max_tokens - settings.prefix_tokens) // count_f
    return tf.maximum(0, room - 1) * step_t + patch_t


def padded_patches(spectrogram, frames, settings, *, frame_shift_scale=1.0):
    """The patches of clips in spectrograms of one length, as if each clip were alone.

    Counts, first frames and positions follow from the frames of the clip as in `patch_tokens`,
    and all shapes are static, as exported models need them.

    Args:
        spectrogram: float32 (batch, all frames, mel_bins), normalized, sizes static, at least
            as long as a patch, and zeros after the frames of the clip.
        frames: int32 (batch,), number of frames of each clip.
        settings: PatchSettings of one patch size.
        frame_shift_scale: as in `patch_tokens`.

    Returns:
        patches float32 (batch, tokens, p_f, p_t), as many as a clip of all frames has;
        positions float32 (batch, tokens, 4); and segment_ids int32 (batch, tokens), 1 for a
        patch of the clip, 0 for one that a clip of its length does not have. Tokens run through
        time inside each band; prefix tokens are not among them.
    """
    _, longest, mel_bins = spectrogram.shape
    plan = _plan(settings, mel_bins)
    patch_f, patch_t, step, count_f = plan["numbers"][0].tolist()
    most = int(patch_count(longest, patch_t, step, settings.remainder))
    size, index = tf.maximum(frames, patch_t)[:, None], tf.range(most)[None]
    count = patch_count(size, patch_t, step, settings.remainder)
    start = patch_start(
        index, count, size=size, patch=patch_t, step=step, remainder=settings.remainder
    )
    start = tf.where(index < count, start, 0)  # (batch, most)
    missing = [max(0, (most - 1) * step + patch_t - longest), max(0, plan["missing_f"])]
    x = tf.pad(spectrogram, [[0, 0], *([0, one] for one in missing)])
    x = tf.gather(x, start[..., None] + np.arange(patch_t), axis=1, batch_dims=1)
    start_f = plan["start_f"][0, :count_f, None] + np.arange(patch_f)
    x = tf.gather(x, start_f, axis=3)  # (batch, most, p_t, count_f, p_f)
    patches = tf.reshape(tf.transpose(x, [0, 3, 1, 4, 2]), [-1, count_f * most, patch_f, patch_t])

    center, extent = patch_center(
        tf.cast(index, tf.float32),
        tf.cast(count, tf.float32),
        start=tf.cast(start, tf.float32),
        patch=float(patch_t),
        position=settings.position,
        axis=settings.axes[1],
        scale=frame_shift_scale,
    )
    center, extent = center + 0 * extent, extent + 0 * center  # (batch, most) both
    along_t = tf.stack([0 * center, center, 0 * center, extent], -1)[:, None]
    along_f = plan["position_f"][0, :count_f, None]
    positions = tf.reshape(along_f + along_t, [-1, count_f * most, 4])
    exists = tf.repeat(tf.cast(index < count, tf.int32)[:, None], count_f, 1)
    return patches, positions, tf.reshape(exists, [-1, count_f * most])


@functools.cache
def _plan(settings, mel_bins):
    """Constants of every patch size, padded to one shape so that tf.gather picks a size."""
    sizes, (base_f, base_t), (axis_f, axis_t) = (
        settings.patch_sizes, settings.base_patch, settings.axes,
    )  # fmt: skip
    policy = {"remainder": settings.remainder, "position": settings.position}
    grids = [
        axis_grid(mel_bins, size[0], axis=axis_f, name="frequency", **policy) for size in sizes
    ]
    most = max(len(starts) for starts, _, _ in grids)
    longest_f, longest_t = np.max(sizes, axis=0)
    plan = {
        "numbers": np.zeros((len(sizes), 4), "int32"),
        "start_f": np.zeros((len(sizes), most), "int32"),
        "position_f": np.zeros((len(sizes), most, 4), "float32"),
        "resize_f": np.zeros((len(sizes), base_f, longest_f), "float32"),
        "resize_t": np.zeros((len(sizes), longest_t, base_t), "float32"),
        "missing_f": 0,
    }
    for k, ((patch_f, patch_t), (starts, centers, extents)) in enumerate(
        zip(sizes, grids, strict=True)
    ):
        plan["numbers"][k] = patch_f, patch_t, patch_step(patch_t, axis_t), len(starts)
        plan["start_f"][k, : len(starts)] = starts
        plan["position_f"][k, : len(starts), ::2] = np.stack([centers, extents], -1)
        plan["resize_f"][k, :, :patch_f] = kernel_matrix(patch_f, base_f, settings.resize).T
        plan["resize_t"][k, :patch_t] = kernel_matrix(patch_t, base_t, settings.resize)
        plan["missing_f"] = max(plan["missing_f"], starts[-1] + patch_f - mel_bins)
    return plan
