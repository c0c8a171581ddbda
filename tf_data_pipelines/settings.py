"""Frozen settings of every pipeline stage, written as JSON beside each saved model.

A model without its mean, frame shift and patch policy is half a model, so everything
that turns a waveform into tokens is named here and nowhere else. This module needs NumPy and
the standard library only.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from tf_data_pipelines.checks import (
    Settings,
    check_between,
    check_choice,
    check_flag,
    check_positive,
    checked_range,
)
from tf_data_pipelines.hints import PatchSize

REMAINDERS = ("crop", "pad", "cover")
POSITIONS = ("grid", "physical")
RESIZES = ("pi", "bilinear")
OVERLONGS = ("error", "crop")
POOLINGS = ("average", "max")  # of neighboring frames
AXES = ("both", "time", "frequency")  # along which patches have other sizes
PATCH_SIZES = (8, 10, 12, 16, 20, 24, 30, 32, 40, 48)  # FlexiAST's sampling set
LAYOUT_NAMES = (  # of published data sets; those of ESC-50 say which fold is for the test
    "esc50", "esc50-fold1", "esc50-fold2", "esc50-fold3", "esc50-fold4", "esc50-fold5",
    "speech-commands", "audioset", "vggsound", "voxceleb1", "epic-sounds", "ast",
)  # fmt: skip
NOISE_FLOORS = (-120, 0)  # decibels over full scale
MAX_ROW_LENGTH = 8192  # tokens; dense attention over more needs over 3 GB a layer
TRAINING_ROW_LENGTHS = (256, 4096)  # tokens of the shortest and the longest training rows
SHARES = (0.1, 0.1)  # of each class for validation and test, where the data has no splits
MAX_FRAME_MS = 10_000  # of a frame and of the time to the next
MAX_CLIP_MS = 24 * 3_600_000
MAX_MEL_BINS = 1024
MAX_GAIN_DB = 100
SAMPLE_RATES = (1000, 384_000)  # Hz, lowest and highest
MAX_LOG_MEL = 1000  # of a mean and a standard deviation; log-mel lies between -16 and 90
BASE_PATCH = 16  # bins and frames of the papers' kernel
MAX_CELLS = 100_000  # of a position table, 4 hours at 160 ms
MAX_PATCH = 4096  # frames, 41 s; the matrix of a longer patch would only fill memory
MAX_POOL_FRAMES = 4  # the papers' most
MAX_DROPOUT = 0.95  # share of a clip's tokens, rows or columns
MAX_ALPHA = 1000  # of mixup; two clips are then mixed in equal parts
MAX_CLIPS_PER_DRAW = 10_000
MAX_PEAK = 16.0  # of a waveform whose full scale is 1; more are integers, not divided


class DataWarning(UserWarning):
    """Something about the user's sounds: files that are left out, clips that are cut."""


def checked_shares(shares):
    """(validation, test) as they are; a ValueError unless they leave room for training."""
    validation, test = shares
    numbers = all(type(share) in (int, float) for share in (validation, test))
    if not (numbers and validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(
            f"validation={validation} and test={test} must be 0 or more and leave room for "
            f"training: their sum must be below 1."
        )
    return validation, test


def check_names(where, names):
    """Raise a ValueError unless every class name is one line of text, as lists of labels need it.

    Args:
        where: what has the names, for the message.
        names: class names.
    """
    for name in names:
        if name.splitlines() != [name] or not name.strip() or any(map(_is_surrogate, name)):
            raise ValueError(
                f"{where} has the class name {name!r}; expected one line of UTF-8 text. Rename it."
            )


def _is_surrogate(character):
    """Whether a character stands for a byte that is no UTF-8."""
    return "\ud800" <= character <= "\udfff"


def patch_pair(
    patch_size: PatchSize, name: str = "patch_size", most: int = MAX_PATCH
) -> tuple[int, int]:
    """`24` -> (24, 24); `(16, 24)` -> (16, 24): frequency first, then time.

    Raises:
        ValueError: patch_size is not one or two whole numbers from 1 to `most`.
    """
    pair = tuple(patch_size) if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    if len(pair) != 2 or not all(_is_count(one, most) for one in pair):
        raise ValueError(
            f"{name}={patch_size!r} must be one whole number from 1 to {most}, or two: "
            f"(frequency, time)."
        )
    return int(pair[0]), int(pair[1])


def _is_count(value, most):
    """Whether a value is a whole number of Python or NumPy from 1 to `most`."""
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    return is_number and not isinstance(value, bool) and 1 <= value <= most and int(value) == value


def patch_sizes_along(axis, sizes, base_patch=BASE_PATCH):
    """Patch sizes that differ along both axes or along one, tuple of (frequency, time) pairs.

    Args:
        axis: "both" for square patches, "time" for (16, size), "frequency" for (size, 16).
        sizes: ints.
        base_patch: size along the other axis, an int or (frequency, time).
    """
    check_choice("axis", axis, AXES)
    base_f, base_t = patch_pair(base_patch, "base_patch")
    pairs = [patch_pair(size) for size in sizes]
    if axis == "time":
        return tuple((base_f, size) for _, size in pairs)
    return tuple((size, base_t if axis == "frequency" else other) for size, other in pairs)


def patch_name(pair):
    """(16, 16) -> "16"; (16, 24) -> "16x24"."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def base_and_stride(
    base_patch: PatchSize, stride: PatchSize | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Both as (frequency, time) pairs; a stride of None means the base patch.

    Raises:
        ValueError: a number is not whole, or the stride is larger than the base patch and
            would leave bins or frames out.
    """
    base = patch_pair(base_patch, "base_patch")
    stride = base if stride is None else patch_pair(stride, "stride")
    if stride[0] > base[0] or stride[1] > base[1]:
        raise ValueError(f"stride={stride} is larger than base_patch={base}; choose at most that.")
    return base, stride


class Axis(NamedTuple):
    """One axis of the grid that a model's kernel and position table belong to.

    Args:
        base: number of bins or frames in the base patch.
        stride: number of bins or frames from one base patch to the next, which is one cell.
        cells: number of cells in the position table.
    """

    base: int
    stride: int
    cells: int


def base_axes(base_patch, stride, grid):
    """The (frequency, time) Axis from pairs of base patch, stride and grid."""
    return tuple(Axis(*axis) for axis in zip(base_patch, stride, grid, strict=True))


@dataclasses.dataclass(frozen=True)
class FbankSettings(Settings):
    """Kaldi log-mel filterbank, and the normalization (x - mean) / (2 std) after it.

    Args:
        frame_shift_ms: time from one frame to the next, in milliseconds.
        window_ms: length of one frame, in milliseconds.
        mel_bins: number of mel bands between `low_freq` and half the sample rate.
        sample_rate: sample rate of the waveforms, in Hz.
        low_freq: lower edge of the first band, in Hz.
        preemphasis: pre-emphasis coefficient, as Kaldi defines it.
        remove_clip_mean: whether the mean of the waveform is subtracted first. AST does so;
            Hugging Face's extractor does not.
        clip_ms: length of every spectrogram, in milliseconds (frames times frame shift).
            Longer ones are cut; shorter ones are filled up with zeros before normalization,
            as AST does. None keeps the length of each clip.
        noise_floor_dbfs: level of white noise, in decibels of its power over full scale, whose
            mean power is added in each band before the logarithm. Then silence, and background
            noise below it, look alike. None adds nothing, as in Kaldi.
        mean: mean of the log-mel values of the training clips. The default is AudioSet's
            (AST); `flexast stats` measures it.
        std: standard deviation of the same values.
    """

    frame_shift_ms: float = 10.0
    _: dataclasses.KW_ONLY
    window_ms: float = 25.0
    mel_bins: int = 128
    sample_rate: int = 16000
    low_freq: float = 20.0
    preemphasis: float = 0.97
    remove_clip_mean: bool = True
    clip_ms: float | None = None
    noise_floor_dbfs: float | None = None
    mean: float = -4.2677393
    std: float = 4.5689974

    def __post_init__(self):
        for name in ("frame_shift_ms", "window_ms"):
            check_positive(name, getattr(self, name), most=MAX_FRAME_MS)
        check_between("sample_rate", self.sample_rate, *SAMPLE_RATES, kind=int)
        check_positive("mel_bins", self.mel_bins, int, most=MAX_MEL_BINS)
        check_between("preemphasis", self.preemphasis, 0, 1)
        check_flag("remove_clip_mean", self.remove_clip_mean)
        check_between("mean", self.mean, -MAX_LOG_MEL, MAX_LOG_MEL)
        check_positive("std", self.std, most=MAX_LOG_MEL)
        if self.clip_ms is not None:
            check_positive("clip_ms", self.clip_ms, most=MAX_CLIP_MS)
        if self.noise_floor_dbfs is not None:
            check_between("noise_floor_dbfs", self.noise_floor_dbfs, *NOISE_FLOORS)
        check_between("low_freq", self.low_freq, 0, self.sample_rate)
        if not 0 <= self.low_freq < self.sample_rate / 2:
            raise ValueError(
                f"low_freq={self.low_freq} must lie between 0 and half of "
                f"sample_rate={self.sample_rate}."
            )
        if self.shift < 1:
            raise ValueError(f"frame_shift_ms={self.frame_shift_ms} is under one sample.")
        if self.window < 2:
            raise ValueError(f"window_ms={self.window_ms} is under two samples.")

    def with_frame_shift(self, frame_shift_ms: float | None) -> Self:
        """The same settings at another frame shift in milliseconds; None gives these."""
        if frame_shift_ms is None:
            return self
        return dataclasses.replace(self, frame_shift_ms=frame_shift_ms)

    @property
    def window(self) -> int:
        """Samples in one frame."""
        return round(self.sample_rate * self.window_ms / 1000)

    @property
    def shift(self) -> int:
        """Samples from one frame to the next."""
        return round(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def fft_length(self) -> int:
        """Window rounded up to a power of two, as Kaldi does."""
        return 1 << (self.window - 1).bit_length()

    @property
    def clip_frames(self) -> int | None:
        """Frames that every spectrogram is brought to; None if it stays as it is."""
        return None if self.clip_ms is None else max(1, round(self.clip_ms / self.frame_shift_ms))

    def frames(self, samples: int | np.ndarray) -> np.integer | np.ndarray:
        """Number of frames of clips with `samples` samples, an int or an array of ints.

        Without `clip_ms`, a clip shorter than one window has none.
        """
        whole = np.maximum(0, 1 + (np.asarray(samples) - self.window) // self.shift)
        return whole if self.clip_ms is None else np.full_like(whole, self.clip_frames)


@dataclasses.dataclass(frozen=True)
class PatchSettings(Settings):
    """How a spectrogram becomes tokens.

    Args:
        patch_sizes: patch sizes from which each clip draws one; ints or (frequency, time)
            pairs.
        frame_shifts_ms: frame shifts in milliseconds from which each clip draws one. An
            empty tuple uses the filterbank's own frame shift.
        remainder: rule for the bins and frames that no whole patch covers. "crop" drops them
            (the papers), "pad" adds zeros after normalization, "cover" spreads
            ceil(size / patch) patches evenly so that they overlap a little.
        position: rule for the positions. "grid" stretches the position table over the grid
            of the clip (the papers); "physical" uses the true mel bin and the true time.
        resize: method of the patch resize, "pi" (FlexiAST) or "bilinear" (the papers'
            ablation).
        prefix_tokens: number of [CLS]-like tokens before each clip: 0, 1 or 2.
        grid: number of (frequency, time) cells in the model's position table.
        base_patch: size of the model's kernel, an int or (frequency, time).
        stride: number of bins and frames from one base patch to the next, which is one cell
            of the table; an int or (frequency, time). None means base_patch, without
            overlap. Patches of other sizes overlap by the same share.
        patch_weights: how often each patch size is drawn against the others, one positive
            number for each. An empty tuple draws all equally often.
        clips_per_draw: number of consecutive training clips that share a drawn patch size; one
            that is too long for a row at that size draws its own. 1 draws for each clip.
        pool_frames: numbers of neighboring frames from which each clip draws one; so many are
            pooled to one before patches are cut, and those left over at the end are dropped.
            It is another way to a coarser frame shift; (1,) pools nothing.
        pooling: "average" or "max".
    """

    patch_sizes: tuple = (BASE_PATCH,)
    frame_shifts_ms: tuple = ()
    _: dataclasses.KW_ONLY
    remainder: str = "cover"
    position: str = "physical"
    resize: str = "pi"
    prefix_tokens: int = 0
    grid: tuple = (8, 64)
    base_patch: tuple = (BASE_PATCH, BASE_PATCH)
    stride: tuple | None = None
    patch_weights: tuple = ()
    clips_per_draw: int = 1
    pool_frames: tuple = (1,)
    pooling: str = "average"

    def __post_init__(self):
        base, stride = base_and_stride(self.base_patch, self.stride)
        object.__setattr__(self, "base_patch", base)
        object.__setattr__(self, "stride", stride)
        if not self.patch_sizes:
            raise ValueError("patch_sizes is empty; give at least one size, such as (16,).")
        object.__setattr__(
            self, "patch_sizes", tuple(patch_pair(size) for size in self.patch_sizes)
        )
        object.__setattr__(self, "frame_shifts_ms", tuple(self.frame_shifts_ms))
        object.__setattr__(self, "grid", patch_pair(self.grid, "grid", MAX_CELLS))
        for shift in self.frame_shifts_ms:
            check_positive("frame_shifts_ms", shift, most=MAX_FRAME_MS)
        check_choice("remainder", self.remainder, REMAINDERS)
        check_choice("position", self.position, POSITIONS)
        check_choice("resize", self.resize, RESIZES)
        check_choice("prefix_tokens", self.prefix_tokens, (0, 1, 2))
        self._check_draws()

    def _check_draws(self):
        """Check how patch sizes are drawn and frames pooled."""
        object.__setattr__(self, "patch_weights", tuple(self.patch_weights))
        if self.patch_weights and len(self.patch_weights) != len(self.patch_sizes):
            raise ValueError(
                f"patch_weights={self.patch_weights!r} must be one positive number for each of "
                f"the {len(self.patch_sizes)} patch sizes, or () to draw all equally often."
            )
        for weight in self.patch_weights:
            check_positive("patch_weights", weight)
        check_between("clips_per_draw", self.clips_per_draw, 1, MAX_CLIPS_PER_DRAW, kind=int)
        object.__setattr__(self, "pool_frames", tuple(self.pool_frames))
        if not self.pool_frames:
            raise ValueError("pool_frames=() must be at least one number; (1,) pools nothing.")
        for factor in self.pool_frames:
            check_between("pool_frames", factor, 1, MAX_POOL_FRAMES, kind=int)
        check_choice("pooling", self.pooling, POOLINGS)

    def at(
        self,
        patch_sizes: Sequence[PatchSize],
        frame_shift_ms: float | None = None,
        pool_frames: int = 1,
    ) -> Self:
        """These settings for patch sizes and one time resolution that are not drawn by weight.

        Args:
            patch_sizes: ints or (frequency, time) pairs.
            frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.
            pool_frames: number of neighboring frames that are pooled to one.
        """
        return dataclasses.replace(
            self,
            patch_sizes=tuple(patch_sizes),
            patch_weights=(),
            frame_shifts_ms=() if frame_shift_ms is None else (frame_shift_ms,),
            pool_frames=(pool_frames,),
        )

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """The (frequency, time) Axis of the base grid."""
        return base_axes(self.base_patch, self.stride, self.grid)

    @property
    def patch_shares(self) -> np.ndarray:
        """How often each patch size is drawn, float64 (patch sizes,); they sum to 1."""
        weights = np.array(self.patch_weights or [1.0] * len(self.patch_sizes), "float64")
        return weights / weights.sum()


@dataclasses.dataclass(frozen=True)
class PackSettings(Settings):
    """The static shape of a packed batch.

    Args:
        rows: number of rows in a batch.
        row_length: number of tokens in a row.
        segments: number of clip slots in a row; a row with that many clips is full.
        buffer_size: number of waiting clips that the packer chooses from, at least
            `segments`. With more of them, rows are fuller and clips wait longer.
        overlong: rule for a clip with more tokens than a row: "error" raises, "crop" drops
            its last frames.
    """

    rows: int = 16
    row_length: int = 256
    segments: int = 16
    _: dataclasses.KW_ONLY
    buffer_size: int = 32
    overlong: str = "error"

    def __post_init__(self):
        for name in ("rows", "row_length", "segments", "buffer_size"):
            check_positive(name, getattr(self, name), int)
        check_choice("overlong", self.overlong, OVERLONGS)


def round_row_length(tokens):
    """Tokens rounded up to one of 20 row lengths up to 8,192.

    They are multiples of 128 up to 1,024, then of a quarter of the power of two below.
    """
    step = max(128, 2 ** (int(tokens - 1).bit_length() - 3))
    return int(-(-tokens // step) * step)


def training_row_length(tokens):
    """Number of tokens in a training row for clips of up to so many tokens."""
    shortest, longest = TRAINING_ROW_LENGTHS
    return min(longest, max(shortest, round_row_length(tokens)))


@dataclasses.dataclass(frozen=True)
class AugmentSettings(Settings):
    """Random changes of what is heard in training; zero turns each of them off.

    Every draw follows from the seed, the epoch and the clip. Evaluation changes nothing.

    Args:
        gain_db: largest change of loudness, in decibels. Each clip draws a gain uniformly
            from -gain_db to +gain_db.
        freq_mask: largest width of the band of mel bins that is set to 0 in each clip, as in
            SpecAugment; 0 is the mean after normalization.
        time_mask_ms: largest length of the stretch of time that is set to 0 in each clip, in
            milliseconds.
        fill_ms: largest length of the silence that is put around a clip, in milliseconds, as
            in the buffer of a phone. Every other clip draws a length uniformly, and how much of
            it comes before the clip. No clip gets longer than the longest of the data.
        noise_snr_db: (lowest, highest) level of a clip over white noise, in decibels. Every
            other clip draws one uniformly; the noise is also in the silence around the clip.
            Empty for no noise.
        time_mask_share: as time_mask_ms, as a share of the clip; where both are given, the
            shorter one counts. No mask hides more than half of a clip.
        crop_ms: length to which longer clips are cut, in milliseconds; each epoch draws another
            stretch.
        roll: largest shift of a waveform along itself, as a share of its length; what leaves at
            one end comes in at the other. From 0.5 on, any sample may be the first.
        mixup: share of the clips that are mixed with another clip, any of the training clips or,
            in shards, of those shuffled together. The labels of all clips are then floats.
        mixup_alpha: the clip's share of the mixture is drawn from Beta(alpha, alpha).
        frame_shift_range_ms: (lowest, highest) frame shift in milliseconds, from which each clip
            draws one uniformly, in steps of 8 samples or less; it excludes frame_shifts_ms.
            Empty for the frame shift of the filterbank.
        token_dropout: share of the tokens of each clip that are left out, so that rows hold
            more clips.
        drop_freq: share of the rows of each clip's grid of patches that are left out (PaSST).
        drop_time: share of the columns that are left out.
        balanced: whether clips of rare classes come more often and others less, by AST's weights
            or those that the data carry, see `sampling_weights`. An epoch has as many clips as
            the data; clips that it has twice are augmented differently.
    """

    gain_db: float = 0.0
    freq_mask: int = 0
    time_mask_ms: float = 0.0
    _: dataclasses.KW_ONLY
    fill_ms: float = 0.0
    noise_snr_db: tuple = ()
    time_mask_share: float = 0.0
    crop_ms: float = 0.0
    roll: float = 0.0
    mixup: float = 0.0
    mixup_alpha: float = 10.0
    frame_shift_range_ms: tuple = ()
    token_dropout: float = 0.0
    drop_freq: float = 0.0
    drop_time: float = 0.0
    balanced: bool = False

    def __post_init__(self):
        check_between("gain_db", self.gain_db, 0, MAX_GAIN_DB)
        check_between("freq_mask", self.freq_mask, 0, MAX_MEL_BINS, kind=int)
        for name in ("time_mask_ms", "fill_ms", "crop_ms"):
            check_between(name, getattr(self, name), 0, MAX_CLIP_MS)
        for name in ("time_mask_share", "roll", "mixup"):
            check_between(name, getattr(self, name), 0, 1)
        for name in ("token_dropout", "drop_freq", "drop_time"):
            check_between(name, getattr(self, name), 0, MAX_DROPOUT)
        check_positive("mixup_alpha", self.mixup_alpha, most=MAX_ALPHA)
        check_flag("balanced", self.balanced)
        hint = "in decibels, such as (20, 60); or () for no noise"
        noise = checked_range("noise_snr_db", self.noise_snr_db, hint)
        object.__setattr__(self, "noise_snr_db", noise)
        hint = f"above 0 and up to {MAX_FRAME_MS:,}, such as (10, 40); or () for the filterbank's"
        shifts = checked_range(
            "frame_shift_range_ms", self.frame_shift_range_ms, hint, least=1e-3, most=MAX_FRAME_MS
        )
        object.__setattr__(self, "frame_shift_range_ms", shifts)

    @property
    def changes_waveforms(self) -> bool:
        """Whether any setting acts on waveforms, so that features cannot be cached."""
        changes = self.gain_db or self.fill_ms or self.noise_snr_db or self.roll or self.mixup
        return bool(changes or self.crop_ms)

    @property
    def changes_features(self) -> bool:
        """Whether any mask is set."""
        return bool(self.freq_mask or self.time_mask_ms or self.time_mask_share)

    @property
    def drops_tokens(self) -> bool:
        """Whether any tokens are left out."""
        return bool(self.token_dropout or self.drop_freq or self.drop_time)
