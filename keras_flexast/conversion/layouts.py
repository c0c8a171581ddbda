"""Grids of patches that published models were trained with, found from their position tables."""

import math
from typing import NamedTuple

from tf_data_pipelines.settings import patch_pair

USUAL_FRAMES = 128  # published models are trained on multiples of it


class Layout(NamedTuple):
    """Grid of patches over the spectrograms that a model was trained on.

    Args:
        grid: (frequency, time) numbers of patches, and of cells of the position table.
        stride: (frequency, time) bins and frames from one patch to the next.
        mel_bins: number of mel bins.
        frames: number of frames.
    """

    grid: tuple
    stride: tuple
    mel_bins: int
    frames: int


def image_layout(names, cells, base_patch):
    """Layout of an image model: a square of patches side by side.

    Args:
        names: WeightNames.
        cells: number of cells of the position table, without prefix tokens.
        base_patch: (frequency, time) size of the kernel.

    Raises:
        ValueError: the cells are not a square.
    """
    side = math.isqrt(cells)
    if side**2 != cells:
        raise ValueError(
            f"{names.checkpoint.origin}: {names.theirs('pos_embed')} has {cells} positions for "
            f"patches, which is no square image."
        )
    mel_bins, frames = (side * size for size in base_patch)
    return Layout((side, side), base_patch, mel_bins=mel_bins, frames=frames)


def sound_layout(names, cells, *, base_patch, mel_bins, frames, stride):
    """Layout of a model of sounds.

    The sizes that the user gives come first, then those of the configuration, then the note of
    its input that an SSAST holds; the rest follows from the number of cells.

    Args:
        names: WeightNames.
        cells: number of cells of the position table, without prefix tokens.
        base_patch: (frequency, time) size of the kernel.
        mel_bins, frames, stride: as in `read_parts`.

    Raises:
        ValueError: no grid has that many cells, or several have.
    """
    checkpoint = names.checkpoint
    noted_bins, noted_frames = names.number("p_input_fdim"), names.number("p_input_tdim")
    mel_bins = mel_bins or checkpoint.setting("num_mel_bins", "mel_bins") or noted_bins or 128
    frames = frames or checkpoint.setting("max_length", "frames") or noted_frames
    if stride is None and "frequency_stride" in checkpoint.config:
        stride = checkpoint.config["frequency_stride"], checkpoint.config["time_stride"]
    if stride is None and (names.family == "flexiast" or noted_frames is not None):
        stride = base_patch  # both are trained without overlap
    if stride is not None:
        stride = patch_pair(stride, "stride")
    possible = _possible_layouts(cells, base_patch, mel_bins=mel_bins, frames=frames, stride=stride)
    found = [layout for layout in possible if layout.frames % USUAL_FRAMES == 0] or possible
    if len(found) != 1:
        fits = "fits none" if not found else f"fits {len(found)}"
        raise ValueError(
            f"{checkpoint.origin}: a position table of {cells} cells for patches {fits} of "
            f"the grids of {base_patch[0]}x{base_patch[1]} patches at mel_bins={mel_bins}, "
            f"frames={frames}, stride={stride}. Give the mel_bins, frames and stride that the "
            f"model was trained with (--mel-bins, --frames, --stride)."
        )
    if stride is None or frames is None:
        step_f, step_t = found[0].stride
        names.notes.append(
            f"{mel_bins} mel bins, {found[0].frames} frames and a patch every {step_f}x{step_t} "
            f"follow from a position table of {cells} cells"
        )
    return found[0]


def _possible_layouts(cells, base_patch, *, mel_bins, frames, stride):
    """Layouts whose grid has that many cells.

    Without a stride the published ones are tried: the patch, 10, or a single frame. Without
    frames a layout has a multiple of 128 where its grid allows one, else as few as it needs.
    """
    base_f, base_t = base_patch
    if stride is not None:
        strides = [stride]
    elif base_f == mel_bins:
        strides = [base_patch, (base_f, 1)]  # SSAST's patches of whole frames
    else:
        strides = [base_patch, (10, 10)] if min(base_patch) > 10 else [base_patch]
    layouts = []
    for step in strides:
        step_f, step_t = step
        rows = (mel_bins - base_f) // step_f + 1
        if rows < 1 or cells % rows:
            continue
        columns = cells // rows
        fewest = (columns - 1) * step_t + base_t
        most = fewest + step_t - 1
        likely = max(fewest, most // USUAL_FRAMES * USUAL_FRAMES) if frames is None else frames
        if fewest <= likely <= most:
            layouts.append(Layout((rows, columns), step, mel_bins=mel_bins, frames=likely))
    return layouts
