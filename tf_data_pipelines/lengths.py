"""How many tokens clips have, and the rows and batches that hold them; from their lengths alone."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from tf_data_pipelines.dropout import kept_counts
from tf_data_pipelines.ordering import balanced_weights
from tf_data_pipelines.resize import band_count, token_count
from tf_data_pipelines.settings import (
    MAX_ROW_LENGTH,
    TRAINING_ROW_LENGTHS,
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
    patch_name,
    round_row_length,
    training_row_length,
)
from tf_data_pipelines.sources import ScannedSource, WaveformSource

LEAST_FILL = 0.3  # of a row, below which a warning is due
RANGE_PARTS = 8  # frame shifts that stand for a range of them


def sample_counts(data, fbank):
    """Number of samples of every clip, int64 (clips,)."""
    return np.rint(np.asarray(data.durations) * fbank.sample_rate).astype("int64")


def longest_training(data, fbank, augment):
    """Number of samples up to which silence may fill a training clip."""
    return int(_cropped(sample_counts(data, fbank), fbank, augment).max())


def _cropped(samples, fbank, augment):
    """Lengths of clips in training, where silence does not fill them."""
    most = round(augment.crop_ms * fbank.sample_rate / 1000)
    return np.minimum(samples, most) if most else samples


def clip_tokens(data, fbank, patches, augment=None):
    """Number of tokens of every clip at every patch size, at the finest time resolution.

    Args:
        data: ScannedSource or WaveformSource.
        fbank: FbankSettings.
        patches: PatchSettings.
        augment: AugmentSettings of the training, for the frame shifts and the crop; None for
            clips as they are. Tokens that it leaves out are counted.

    Returns:
        int (patch sizes, clips).
    """
    samples = _cropped(sample_counts(data, fbank), fbank, augment or AugmentSettings())
    finest = _finest(fbank, patches, augment)
    return _tokens_of(samples, finest, patches, min(patches.pool_frames))


def _tokens_of(samples, fbank, patches, pool_frames):
    """Tokens of clips of these lengths at every patch size, int (patch sizes, clips)."""
    frames = fbank.frames(samples) // pool_frames
    return np.stack(
        [token_count(frames, fbank.mel_bins, size, patches) for size in patches.patch_sizes]
    )


def _finest(fbank, patches, augment=None):
    """The FbankSettings at the finest frame shift that clips draw."""
    shifts = augment.frame_shift_range_ms if augment is not None else ()
    shifts = shifts or patches.frame_shifts_ms
    return fbank.with_frame_shift(min(shifts)) if shifts else fbank


def drawn_sizes(tokens, packing):
    """Which patch sizes each clip draws from: those at which it fits a row, else all of them.

    Args:
        tokens: int (patch sizes, clips), see `clip_tokens`.
        packing: PackSettings.

    Returns:
        bool (patch sizes, clips).
    """
    fits = tokens <= packing.row_length
    return fits | ~fits.any(0)


def check_lengths(data, fbank, patches, packing, *, augment=None):
    """Raise a ValueError that names the clip if it fits into a row at no patch size."""
    tokens = clip_tokens(data, fbank, patches, augment)
    clip = np.argmax(tokens.min(0))
    size = np.argmin(tokens[:, clip])
    if tokens[size, clip] > packing.row_length and packing.overlong == "error":
        patch_f, patch_t = patches.patch_sizes[size]
        raise ValueError(
            f"clip {data.clip_name(clip)!r} ({data.durations[clip]:.1f} s) has "
            f"{tokens[size, clip]:,} tokens at patch {patch_f}x{patch_t}, more than the row "
            f"length {packing.row_length:,}. Raise row_length (--row-length), pass larger "
            f'patch_sizes (--patch-sizes), or pass overlong="crop" (--overlong crop).'
        )
    for patch_f, patch_t in patches.patch_sizes:
        column = token_count(patch_t, fbank.mel_bins, (patch_f, patch_t), patches)
        if column > packing.row_length:  # cropping shortens a clip to one column at best
            raise ValueError(
                f"the {fbank.mel_bins} mel bins give {column:,} tokens at patch "
                f"{patch_f}x{patch_t} in a single column, more than the row length "
                f"{packing.row_length:,}. Raise row_length (--row-length), or leave this patch "
                f"size out (--patch-sizes)."
            )


def mean_tokens(data, fbank, *, patches, packing, augment=None):
    """Mean number of tokens that every clip has in training, over all that it draws.

    Args:
        data, fbank, patches, packing, augment: as in `training_batches`.

    Returns:
        float64 (clips,).
    """
    augment = augment or AugmentSettings()
    samples = _cropped(sample_counts(data, fbank), fbank, augment)
    lengths = [samples]
    if augment.fill_ms:  # every other clip, by half of it on average
        most = round(augment.fill_ms * fbank.sample_rate / 1000)
        lengths.append(samples + np.minimum(samples.max() - samples, most) // 2)
    shifts = patches.frame_shifts_ms or (None,)
    if augment.frame_shift_range_ms:
        low, high = augment.frame_shift_range_ms
        shifts = low + (high - low) * (np.arange(RANGE_PARTS) + 0.5) / RANGE_PARTS
    bands = [band_count(fbank.mel_bins, size, patches) for size in patches.patch_sizes]
    bands, shares, means = np.array(bands)[:, None], patches.patch_shares[:, None], []
    for size, shift, factor in itertools.product(lengths, shifts, patches.pool_frames):
        tokens = _tokens_of(size, fbank.with_frame_shift(shift), patches, factor)
        drawn = shares * drawn_sizes(tokens, packing)
        columns = (np.minimum(tokens, packing.row_length) - patches.prefix_tokens) // bands
        *_, kept = kept_counts(bands, columns, augment)
        means.append((drawn * (kept + patches.prefix_tokens)).sum(0) / drawn.sum(0))
    return np.mean(means, 0)


def _drawn_tokens(data, fbank, *, patches, packing, augment):
    """Mean number of tokens of the clips that a training draws, float."""
    tokens = mean_tokens(data, fbank, patches=patches, packing=packing, augment=augment)
    return np.average(tokens, weights=balanced_weights(data, augment or AugmentSettings()))


def batches_per_epoch(data, fbank, *, patches, packing, augment=None, teacher=None):
    """Number of training batches that hold as many clips as the data, on average.

    Args:
        data, fbank, patches, packing, augment, teacher: as in `training_batches`.
    """
    tokens = _drawn_tokens(data, fbank, patches=patches, packing=packing, augment=augment)
    by_tokens = len(data.durations) * tokens / (packing.rows * packing.row_length)
    by_slots = len(data.durations) / (packing.rows * packing.segments)
    by_teacher = 0.0
    if teacher is not None:
        heard = dataclasses.replace(teacher.patches, frame_shifts_ms=patches.frame_shifts_ms)
        beside = np.minimum(clip_tokens(data, fbank, heard, augment), teacher.row_length)
        by_teacher = beside.sum() / (packing.rows * teacher.row_length)
    return max(1, math.ceil(max(by_tokens, by_slots, by_teacher)))


def lengths_warning(splits, fbank, *, patches, packing, augment=None):
    """A message that counts the clips that cannot have every patch size, and those that are cut.

    It also tells where so few clips go into a row that most of it stays empty.

    Args:
        splits: list of ScannedSource or WaveformSource: the training clips, then others, such as
            those for validation.
        fbank: FbankSettings.
        patches: PatchSettings.
        packing: PackSettings.
        augment: AugmentSettings of the training; None for clips as they are.

    Returns:
        str, or None where every clip fits a row at every patch size and rows get full.
    """
    train, *others = splits
    tokens = [clip_tokens(train, fbank, patches, augment)]
    tokens = np.concatenate([*tokens, *(clip_tokens(one, fbank, patches) for one in others)], 1)
    drawn, length = drawn_sizes(tokens, packing), f"a row of {packing.row_length:,} tokens"
    parts, limited = [], ~drawn.all(0)
    cut = (tokens.min(0) > packing.row_length) & (packing.overlong == "crop")
    if limited.any():
        sizes = zip(patches.patch_sizes, (~drawn).sum(1), strict=True)
        listed = ", ".join(f"{count} not from {patch_name(size)}" for size, count in sizes if count)
        parts.append(
            f"{limited.sum()} of {len(limited)} clips are too long for {length} at some patch "
            f"sizes, so they draw only from the others ({listed})."
        )
    if cut.any():
        parts.append(
            f"{cut.sum()} of {len(cut)} clips are too long for {length} at every patch size, so "
            f"they lose their end."
        )
    if parts:
        parts.append("A larger row_length (--row-length) holds more.")
    mean = _drawn_tokens(train, fbank, patches=patches, packing=packing, augment=augment)
    fill = packing.segments * mean / packing.row_length
    shortest, _ = TRAINING_ROW_LENGTHS
    if fill < LEAST_FILL and packing.row_length > shortest:
        parts.append(
            f"{length.capitalize()} has room for {packing.segments} clips, of {mean:.0f} tokens on "
            f"average: about {fill:.0%} of it are used. A smaller row_length (--row-length) or "
            f"more segments (--segments) take less time."
        )
    return " ".join(parts) or None


def training_packing(
    splits: Sequence[ScannedSource | WaveformSource],
    fbank: FbankSettings,
    *,
    patches: PatchSettings,
    batch_tokens: int | None = None,
    batch_clips: int | None = None,
    row_length: int | None = None,
    segments: int = PackSettings.segments,
    overlong: str = PackSettings.overlong,
    augment: AugmentSettings | None = None,
) -> PackSettings:
    """Pack settings for training on these clips, with rows that the other splits fit as well.

    Args:
        splits: list of ScannedSource: the training clips, then others, such as those for
            validation and test.
        fbank: FbankSettings.
        patches: PatchSettings.
        batch_tokens: number of tokens in a batch; a batch has at least one row. None for what
            batch_clips needs.
        batch_clips: number of training clips in a batch, on average and rounded to whole rows,
            in place of batch_tokens.
        row_length: number of tokens in a row. None makes rows long enough for the longest
            clip of any split, see `training_row_length`; a longer clip draws only from the
            patch sizes at which it fits.
        segments: number of clip slots in a row.
        overlong: rule for a clip with more tokens than a row at every patch size, see
            PackSettings.
        augment: AugmentSettings of the training, which batch_clips and row_length=None need; None
            for clips as they are.

    Returns:
        PackSettings.

    Raises:
        ValueError: both or none of batch_tokens and batch_clips are given, or no positive number.
    """
    if (batch_tokens is None) == (batch_clips is None):
        raise ValueError(
            f"batch_tokens={batch_tokens} and batch_clips={batch_clips}: give one of the two."
        )
    given = {"batch_tokens": batch_tokens, "batch_clips": batch_clips}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be a positive number.")
    train, *others = splits
    if row_length is None:
        counts = [clip_tokens(train, fbank, patches, augment)]
        counts += [clip_tokens(split, fbank, patches) for split in others]
        row_length = training_row_length(max(int(tokens.max()) for tokens in counts))
    packing = PackSettings(1, row_length, segments, overlong=overlong)
    if batch_tokens is not None:
        rows = batch_tokens // row_length
    elif batch_clips is not None:  # one of the two is given
        tokens = _drawn_tokens(train, fbank, patches=patches, packing=packing, augment=augment)
        rows = max(round(batch_clips * tokens / row_length), math.ceil(batch_clips / segments))
    return dataclasses.replace(packing, rows=max(1, rows))


def packing_for(
    data: ScannedSource | WaveformSource,
    fbank: FbankSettings,
    patches: PatchSettings,
    packing: PackSettings,
    crop: bool = False,
) -> PackSettings:
    """Pack settings for evaluation, with rows long enough for every clip at every patch size.

    The given rows are kept if every clip fits, so that the model compiles once. A few clips
    that together need less than one such row get one row. Other row lengths are multiples from
    `round_row_length`, so that a compiled model in a cache serves the next clips too.

    Args:
        data: ScannedSource or WaveformSource.
        fbank: FbankSettings.
        patches: PatchSettings.
        packing: PackSettings of the training.
        crop: whether clips that need more than MAX_ROW_LENGTH tokens lose their end.

    Returns:
        PackSettings.

    Raises:
        ValueError: a clip needs more than MAX_ROW_LENGTH tokens, without `crop`; the message
            names it.
    """
    tokens = clip_tokens(data, fbank, patches).max(0)
    most, total = int(tokens.max()), int(tokens.sum())
    if total <= packing.row_length and len(tokens) <= packing.segments:
        row_length = min(packing.row_length, round_row_length(total))
        return dataclasses.replace(packing, rows=1, row_length=row_length)
    if most <= packing.row_length:
        return packing
    if most > MAX_ROW_LENGTH and not crop:
        clip = int(tokens.argmax())
        name, seconds = data.clip_name(clip), data.durations[clip]
        raise ValueError(overlong_reason(name, seconds, fbank=fbank, patches=patches))
    row_length = min(MAX_ROW_LENGTH, round_row_length(most))
    rows = max(1, packing.rows * packing.row_length // row_length)
    overlong = "crop" if most > MAX_ROW_LENGTH else packing.overlong
    return dataclasses.replace(packing, row_length=row_length, rows=rows, overlong=overlong)


def overlong_reason(name, seconds, *, fbank, patches):
    """Why a clip is too long for any row; None if it is not.

    Args:
        name: name of the clip for the message.
        seconds: length of the clip.
        fbank: FbankSettings.
        patches: PatchSettings.
    """
    samples = np.array([round(seconds * fbank.sample_rate)])
    finest = _finest(fbank, patches)
    tokens = int(_tokens_of(samples, finest, patches, min(patches.pool_frames)).max())
    if tokens <= MAX_ROW_LENGTH:
        return None
    return (
        f"{name} ({seconds:.1f} s) has {tokens:,} tokens, more than {MAX_ROW_LENGTH:,}. Use a "
        f"larger patch size, a timeline (--timeline), or cut the recording into shorter files."
    )
