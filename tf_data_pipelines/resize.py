"""Resize matrices and patch grids: constants that both packages share. NumPy only.

Every resize here is separable: each axis has its own matrix, and the two-dimensional resize
is the Kronecker product of the two.
"""

import functools

import numpy as np

from tf_data_pipelines.settings import BASE_PATCH, check_choice, patch_pair


@functools.cache
def bilinear_matrix(source, target, antialias=False):
    """Matrix that resizes a vector of `source` numbers to `target` numbers bilinearly.

    Pixel centers are at halves: cell i of the target reads the source at
    `(i + 1/2) source / target - 1/2`. With `antialias`, the triangle of weights is as wide as
    the step when the vector gets shorter.

    Args:
        source: length of the vector before.
        target: length of the vector after.
        antialias: whether the triangles widen; False as in FlexiViT's patch resize, True as
            in torch's `interpolate(antialias=True)`.

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
        centers: float (...), positions in cells; 0 is the middle of the first cell.
        extents: float, broadcast to centers; number of cells that one entry spans.
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
    """Matrix that resizes one axis of the base kernel to `patch`.

    `kernel_p = R kernel_base` on each axis. "pi" is the pseudo-inverse resize,
    `pinv(B^T)` with B the bilinear matrix without antialias; "bilinear" is the ablation,
    with antialias. The transpose resizes a patch of data to the base size: the inner
    product of data and kernel is the same either way.

    Args:
        patch: size of the patch on this axis.
        base: size of the base kernel on this axis.
        resize: "pi" or "bilinear".

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
        kernel: array (base_f, base_t, ...), frequency first, with any trailing axes.
        patch_size: new size, an int or (frequency, time).
        resize: "pi" or "bilinear".

    Returns:
        float64 (p_f, p_t, ...).
    """
    patch_f, patch_t = patch_pair(patch_size)
    over_f = kernel_matrix(patch_f, kernel.shape[0], resize)
    over_t = kernel_matrix(patch_t, kernel.shape[1], resize)
    return np.einsum("pf,qt,ft...->pq...", over_f, over_t, kernel)


def patch_step(patch, axis):
    """Bins or frames from one patch to the next; the overlap is the base patch's share."""
    return max(1, (2 * patch * axis.stride + axis.base) // (2 * axis.base))


def patch_count(size, patch, step, remainder):
    """Number of patches on an axis of `size >= patch` cells; ints or integer tensors."""
    beyond = 0 if remainder == "crop" else step - 1
    return (size - patch + beyond) // step + 1


def patch_start(index, count, *, size, patch, step, remainder):
    """First cell of patch number `index` of `count`, for NumPy and TensorFlow integers.

    "cover" rounds `index (size - patch) / (count - 1)` half up with whole numbers only, so
    that every backend gives the same cell.
    """
    if remainder != "cover":
        return index * step
    gaps = count - 1 + (1 // count)  # 1 for a single patch, count - 1 for more
    return (2 * index * (size - patch) + gaps) // (2 * gaps)


def patch_center(index, count, *, start, patch, position, axis, scale=1.0):
    """Center and extent of each patch on the base grid, in cells of the position table.

    Args:
        index: float (count,), number of each patch.
        count: number of patches on the axis.
        start: float (count,), first bin or frame of each patch.
        patch: number of bins or frames in a patch.
        position: "grid" or "physical".
        axis: Axis of the base grid.
        scale: size of one bin or frame of this clip over that of the base grid.

    Returns:
        (center, extent), each (count,). The middles of the cells are 0, 1, 2, ...
    """
    if position == "grid":
        extent = axis.cells / count
        return (index + 0.5) * extent - 0.5, extent + 0.0 * index
    middle = (start + patch / 2) * scale
    return (middle - axis.base / 2) / axis.stride, patch * scale / axis.base + 0.0 * index


def token_count(frames, mel_bins, patch_size, settings):
    """Number of tokens of a clip with its prefix tokens; a short clip fills one patch.

    Args:
        frames: int or int array (clips,), number of frames of each clip.
        mel_bins: number of mel bins of its spectrogram.
        patch_size: (frequency, time).
        settings: PatchSettings.
    """
    sizes = (mel_bins, np.maximum(frames, patch_size[1]))
    along_freq, along_time = (
        patch_count(size, patch, patch_step(patch, axis), settings.remainder)
        for size, patch, axis in zip(sizes, patch_size, settings.axes, strict=True)
    )
    return along_freq * along_time + settings.prefix_tokens


def band_count(mel_bins, patch_size, settings):
    """Number of patches along the frequency axis, see `token_count`."""
    return token_count(patch_size[1], mel_bins, patch_size, settings) - settings.prefix_tokens


def axis_grid(size, patch, *, axis, remainder, position, name="axis", scale=1.0):
    """One axis of a patch grid, for a size known in advance.

    Args:
        size: number of bins or frames of the spectrogram.
        patch: number of bins or frames of a patch.
        axis: Axis of the base grid.
        remainder: rule for what no whole patch covers, see PatchSettings.
        position: rule for the positions, see PatchSettings.
        name: word for the axis in the error message.
        scale: size of one bin or frame of this clip over that of the base grid.

    Returns:
        starts int64 (count,), centers float64 (count,), extents float64 (count,).

    Raises:
        ValueError: patch is larger than size.
    """
    if patch > size:
        raise ValueError(
            f"patch_size is {patch} along {name}, larger than the spectrogram's {size}. "
            f"Choose at most {size}."
        )
    step = patch_step(patch, axis)
    count = patch_count(size, patch, step, remainder)
    index = np.arange(count)
    starts = patch_start(index, count, size=size, patch=patch, step=step, remainder=remainder)
    centers, extents = patch_center(
        index, count, start=starts, patch=patch, position=position, axis=axis, scale=scale
    )
    return starts, centers, extents
