"""Resize matrices and patch grids: constants that both packages share. NumPy only.

Every resize here is separable, so a matrix is always for one axis; the other axis has
its own, and the two-dimensional resize is their Kronecker product.
"""

import functools

import numpy as np

from tf_data_pipelines.settings import BASE_PATCH, check_choice, patch_pair


@functools.cache
def bilinear_matrix(source, target, antialias=False):
    """Matrix that resizes a vector of `source` numbers to `target` bilinearly.

    Half-pixel centers; cell i of the target looks at `(i + 1/2) source / target - 1/2`.
    With `antialias` the triangle widens with the step when shrinking.

    Args:
        source: length before.
        target: length after.
        antialias: False as FlexiViT's patch resize, True as torch's
            `interpolate(antialias=True)`.

    Returns:
        float64 (target, source), read-only; each row sums to 1.

    Source: FlexiViT, Beyer et al. 2023, section 3.4.
    """
    step = source / target
    centers = (np.arange(target) + 0.5) * step - 0.5
    weights = table_weights(centers, step if antialias else 1.0, source)
    weights.flags.writeable = False
    return weights


def table_weights(centers, extents, cells):
    """Rows of triangular weights that look up a table of `cells` entries.

    `tri((c - j) / max(1, s)) / sum_j tri(...)` with `tri(u) = max(0, 1 - |u|)`. A center
    outside the table is moved to its nearest end, so no row is ever empty.

    Args:
        centers: float (...), in cells, 0 at the middle of the first cell.
        extents: float broadcast to centers: how many cells one entry spans.
        cells: number of cells in the table.

    Returns:
        float64 (..., cells); each row sums to 1.
    """
    centers = np.clip(np.asarray(centers, "float64"), 0, cells - 1)[..., None]
    width = np.maximum(1.0, np.asarray(extents, "float64"))[..., None]
    weights = np.maximum(0.0, 1.0 - np.abs(centers - np.arange(cells)) / width)
    return weights / weights.sum(-1, keepdims=True)


@functools.cache
def kernel_matrix(patch, base=BASE_PATCH, resize="pi"):
    """Matrix that takes one axis of the base kernel to `patch`.

    `kernel_p = R kernel_base` on each axis. "pi" is the pseudo-inverse resize,
    `pinv(B^T)` with B the bilinear matrix without antialias; "bilinear" is the ablation,
    with antialias. Its transpose takes a patch of data to the base size: the inner
    product of data and kernel is the same either way.

    Returns:
        float64 (patch, base), read-only.

    Source: FlexiAST, Feng et al. 2023, equation 1; FlexiViT, section 3.4.
    """
    check_choice("resize", resize, ("pi", "bilinear"))
    if patch == base:
        matrix = np.eye(base)
    elif resize == "pi":
        matrix = np.linalg.pinv(bilinear_matrix(base, patch)).T
    else:
        matrix = bilinear_matrix(base, patch, antialias=True).copy()
    matrix.flags.writeable = False
    return matrix


def resize_kernel(kernel, patch_size, resize="pi"):
    """Resize a patch-embedding kernel to another patch size.

    Args:
        kernel: (base_f, base_t, ...), frequency first; any trailing axes.
        patch_size: int or (frequency, time).
        resize: "pi" or "bilinear".

    Returns:
        float64 (p_f, p_t, ...).
    """
    patch_f, patch_t = patch_pair(patch_size)
    over_f = kernel_matrix(patch_f, kernel.shape[0], resize)
    over_t = kernel_matrix(patch_t, kernel.shape[1], resize)
    return np.einsum("pf,qt,ft...->pq...", over_f, over_t, kernel)


def patch_step(patch, axis):
    """Bins or frames from one patch to the next: overlap by the base patch's share."""
    return max(1, (2 * patch * axis.stride + axis.base) // (2 * axis.base))


def patch_count(size, patch, step, remainder):
    """Patches along an axis of `size >= patch` cells. Python ints or integer tensors."""
    beyond = 0 if remainder == "crop" else step - 1
    return (size - patch + beyond) // step + 1


def patch_start(index, count, size, patch, step, remainder):
    """First cell of patch `index` of `count`. NumPy or TensorFlow integers alike.

    "cover" rounds `index (size - patch) / (count - 1)` half up, in whole numbers, so that
    every backend agrees to the cell.
    """
    if remainder != "cover":
        return index * step
    gaps = count - 1 + (1 // count)  # 1 for a single patch, count - 1 for more
    return (2 * index * (size - patch) + gaps) // (2 * gaps)


def patch_center(index, count, start, patch, position, axis, scale=1.0):
    """Center and extent of each patch on the base grid, in cells of the position table.

    Args:
        index, start: (count,) floats: the patch's number and its first bin or frame.
        count: number of patches on the axis.
        patch: bins or frames per patch.
        position: "grid" or "physical".
        axis: Axis.
        scale: size of this clip's bins or frames over those of the base grid.

    Returns:
        (center, extent), each (count,): a cell's middle has center 0, 1, 2, ...
    """
    if position == "grid":
        extent = axis.cells / count
        return (index + 0.5) * extent - 0.5, extent + 0.0 * index
    middle = (start + patch / 2) * scale
    return (middle - axis.base / 2) / axis.stride, patch * scale / axis.base + 0.0 * index


def token_count(frames, mel_bins, patch_size, settings):
    """Tokens of a clip, prefix tokens included; a clip shorter than one patch has one.

    Args:
        frames: int or int array (clips,), frames of each clip.
        mel_bins: bins of its spectrogram.
        patch_size: (frequency, time).
        settings: PatchSettings.
    """
    sizes = (mel_bins, np.maximum(frames, patch_size[1]))
    along_freq, along_time = (
        patch_count(size, patch, patch_step(patch, axis), settings.remainder)
        for size, patch, axis in zip(sizes, patch_size, settings.axes, strict=True)
    )
    return along_freq * along_time + settings.prefix_tokens


def axis_grid(size, patch, axis, remainder, position, name="axis", scale=1.0):
    """One axis of a patch grid, for a size known in advance.

    Args:
        size: bins or frames of the spectrogram.
        patch: bins or frames of a patch.
        axis: Axis.
        remainder, position: as PatchSettings.
        name: of the axis, for the error.
        scale: as `patch_center`.

    Returns:
        starts int64 (count,), centers float64 (count,), extents float64 (count,).

    Raises:
        ValueError: the patch is larger than the axis.
    """
    if patch > size:
        raise ValueError(
            f"patch_size is {patch} along {name}, larger than the spectrogram's {size}. "
            f"Choose at most {size}."
        )
    step = patch_step(patch, axis)
    count = patch_count(size, patch, step, remainder)
    index = np.arange(count)
    starts = patch_start(index, count, size, patch, step, remainder)
    centers, extents = patch_center(index, count, starts, patch, position, axis, scale)
    return starts, centers, extents
