"""Frozen settings of every pipeline stage; written as JSON beside each saved model.

A model without its mean, frame shift and patch policy is half a model, so everything
that turns a waveform into tokens is named here and nowhere else. NumPy and the
standard library only.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

REMAINDERS = ("crop", "pad", "cover")
POSITIONS = ("grid", "physical")
RESIZES = ("pi", "bilinear")
OVERLONGS = ("error", "crop")
PATCH_SIZES = (8, 10, 12, 16, 20, 24, 30, 32, 40, 48)  # FlexiAST's sampling set
BASE_PATCH = 16  # bins and frames of the papers' kernel


def check_choice(name, value, choices):
    """Raise a ValueError that lists the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(
            f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, choices))}."
        )


def check_positive(name, value, kind=(int, float)):
    """Raise unless `value` is a finite number above zero."""
    if (
        isinstance(value, bool)
        or not isinstance(value, kind)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise ValueError(f"{name}={value!r} must be a positive number.")


def patch_pair(patch_size, name="patch_size"):
    """`24` -> (24, 24); `(16, 24)` -> (16, 24): frequency first, then time.

    Raises:
        ValueError: not one or two positive whole numbers.
    """
    pair = tuple(patch_size) if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
    if len(pair) != 2 or any(isinstance(p, bool) or int(p) != p or p < 1 for p in pair):
        raise ValueError(
            f"{name}={patch_size!r} must be one positive whole number, or two: (frequency, time)."
        )
    return int(pair[0]), int(pair[1])


def patch_name(pair):
    """(16, 16) -> "16"; (16, 24) -> "16x24"."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def base_and_stride(base_patch, stride):
    """Both as (frequency, time) pairs; a stride of None is the base patch.

    Raises:
        ValueError: not whole numbers, or a stride beyond the base patch, which would leave
            bins or frames out.
    """
    base = patch_pair(base_patch, "base_patch")
    stride = base if stride is None else patch_pair(stride, "stride")
    if stride[0] > base[0] or stride[1] > base[1]:
        raise ValueError(f"stride={stride} is larger than base_patch={base}; choose at most that.")
    return base, stride


class Axis(NamedTuple):
    """One axis of the grid that a model's kernel and position table belong to.

    Args:
        base: bins or frames of the base patch.
        stride: bins or frames from one base patch, and one cell, to the next.
        cells: cells of the position table.
    """

    base: int
    stride: int
    cells: int


def base_axes(base_patch, stride, grid):
    """(frequency, time) Axis from pairs."""
    return tuple(Axis(*axis) for axis in zip(base_patch, stride, grid, strict=True))


class Settings:
    """Shared by the frozen dataclasses below: plain dictionaries in and out."""

    def to_dict(self):
        """A dictionary that `json.dump` takes and `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The settings with these values; an unknown name raises, naming the known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(known)}."
            )
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class FbankSettings(Settings):
    """Kaldi log-mel filterbank, and the normalization (x - mean) / (2 std) after it.

    Args:
        frame_shift_ms: milliseconds from one frame to the next.
        window_ms: milliseconds in one frame.
        mel_bins: number of mel bands between `low_freq` and half the sample rate.
        sample_rate: Hz.
        low_freq: lower edge of the first band, Hz.
        preemphasis: Kaldi's pre-emphasis coefficient.
        remove_clip_mean: subtract the waveform's mean first, as AST does (and Hugging Face's
            extractor does not).
        clip_ms: the length that every spectrogram is brought to, in milliseconds (frames
            times frame shift): cut, or filled up with zeros before normalization, as AST
            does. None leaves clips as long as they are.
        mean, std: of the log-mel values over the training data; FbankSettings'
            defaults are AudioSet's (AST). `flexast stats` measures them.
    """

    frame_shift_ms: float = 10.0
    window_ms: float = 25.0
    mel_bins: int = 128
    sample_rate: int = 16000
    low_freq: float = 20.0
    preemphasis: float = 0.97
    remove_clip_mean: bool = True
    clip_ms: float | None = None
    mean: float = -4.2677393
    std: float = 4.5689974

    def __post_init__(self):
        for name in ("frame_shift_ms", "window_ms", "sample_rate", "std"):
            check_positive(name, getattr(self, name))
        check_positive("mel_bins", self.mel_bins, int)
        if self.clip_ms is not None:
            check_positive("clip_ms", self.clip_ms)
        if not 0 <= self.low_freq < self.sample_rate / 2:
            raise ValueError(
                f"low_freq={self.low_freq} must lie between 0 and half of "
                f"sample_rate={self.sample_rate}."
            )
        if self.shift < 1:
            raise ValueError(f"frame_shift_ms={self.frame_shift_ms} is under one sample.")

    @property
    def window(self):
        """Samples in one frame."""
        return round(self.sample_rate * self.window_ms / 1000)

    @property
    def shift(self):
        """Samples from one frame to the next."""
        return round(self.sample_rate * self.frame_shift_ms / 1000)

    @property
    def fft_length(self):
        """Window rounded up to a power of two, as Kaldi does."""
        return 1 << (self.window - 1).bit_length()

    @property
    def clip_frames(self):
        """Frames that every spectrogram is brought to; None if it stays as it is."""
        return None if self.clip_ms is None else max(1, round(self.clip_ms / self.frame_shift_ms))

    def frames(self, samples):
        """Frames of a clip of `samples` samples, a number or an array of them.

        Without `clip_ms` there are none for a clip under one window.
        """
        whole = np.maximum(0, 1 + (np.asarray(samples) - self.window) // self.shift)
        return whole if self.clip_ms is None else np.full_like(whole, self.clip_frames)


@dataclasses.dataclass(frozen=True)
class PatchSettings(Settings):
    """How a spectrogram becomes tokens.

    Args:
        patch_sizes: sizes to draw from, one per clip; ints or (frequency, time) pairs.
        frame_shifts_ms: frame shifts to draw from, one per clip; empty for the
            filterbank's own.
        remainder: what happens to bins and frames that no whole patch covers. "crop"
            drops them (the papers), "pad" adds normalized zeros, "cover" spreads
            ceil(size / patch) patches evenly so that they overlap a little.
        position: "grid" stretches the position table over the clip's own grid (the
            papers); "physical" uses the true mel bin and the true time.
        resize: "pi" (FlexiAST) or "bilinear" (the papers' ablation).
        prefix_tokens: [CLS]-like tokens put before each clip: 0, 1 or 2.
        grid: (frequency, time) cells of the model's position table.
        base_patch: int or (frequency, time), the size of the model's own kernel.
        stride: int or (frequency, time), bins and frames from one base patch, and one cell
            of the table, to the next; None for base_patch, without overlap. Patches of
            other sizes overlap by the same share.
    """

    patch_sizes: tuple = (BASE_PATCH,)
    frame_shifts_ms: tuple = ()
    remainder: str = "cover"
    position: str = "physical"
    resize: str = "pi"
    prefix_tokens: int = 0
    grid: tuple = (8, 64)
    base_patch: tuple = (BASE_PATCH, BASE_PATCH)
    stride: tuple | None = None

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
        object.__setattr__(self, "grid", tuple(self.grid))
        for shift in self.frame_shifts_ms:
            check_positive("frame_shifts_ms", shift)
        check_choice("remainder", self.remainder, REMAINDERS)
        check_choice("position", self.position, POSITIONS)
        check_choice("resize", self.resize, RESIZES)
        check_choice("prefix_tokens", self.prefix_tokens, (0, 1, 2))

    @property
    def axes(self):
        """The base grid's (frequency, time) Axis."""
        return base_axes(self.base_patch, self.stride, self.grid)


@dataclasses.dataclass(frozen=True)
class PackSettings(Settings):
    """The static shape of a packed batch.

    Args:
        rows: rows in a batch.
        row_length: tokens in a row.
        segments: clip slots in a row; a row with that many clips is full.
        buffer_size: clips that the packer chooses from, never fewer than `segments`; more give
            a higher fill, later.
        overlong: a clip with more tokens than a row raises ("error") or loses its
            last frames ("crop").
    """

    rows: int = 16
    row_length: int = 256
    segments: int = 16
    buffer_size: int = 32
    overlong: str = "error"

    def __post_init__(self):
        for name in ("rows", "row_length", "segments", "buffer_size"):
            check_positive(name, getattr(self, name), int)
        check_choice("overlong", self.overlong, OVERLONGS)
