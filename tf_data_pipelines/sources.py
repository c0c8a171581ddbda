"""Where the clips come from: folders, a CSV manifest, a published data set, arrays in memory.

`load_source` reads names only. `scan_source` opens every file once, drops the unusable ones
and measures the mean and standard deviation of the log-mel values. `WaveformSource` holds
waveforms that are in memory already.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from tf_data_pipelines.audio import MIN_SAMPLES, AudioError
from tf_data_pipelines.clips import (
    Clip,
    LabelColumns,
    ScannedSource,
    Source,
    check_usable,
    measured_splits,
    reasons,
)
from tf_data_pipelines.datasets import layout_of, read_layout
from tf_data_pipelines.hints import PathLike
from tf_data_pipelines.listing import (
    EXPECTED,
    draw_splits,
    read_folder,
    read_manifest,
    some_of,
)
from tf_data_pipelines.settings import (
    MAX_PEAK,
    SHARES,
    DataWarning,
    FbankSettings,
    check_names,
    checked_shares,
)
from tf_data_pipelines.shards import is_prepared, read_prepared

Refuse = Callable[[str, float], str | None]  # a clip's name and seconds to why it is left out


@dataclasses.dataclass(frozen=True)
class WaveformSource:
    """Clips in memory; the pipelines accept it in the place of a ScannedSource.

    clip_id is the position in the list.

    Args:
        waveforms: list of float32 (samples,) arrays of any lengths, in [-1, 1].
        sample_rate: sample rate of the waveforms in Hz.
        labels: integers (clips,), the class of each clip, or floats (clips, classes), its share of
            each class, as mixup needs; None for 0.
        weights: numbers (clips,), the weight of each clip in the loss; None for 1.

    Raises:
        ValueError: there are no waveforms, one of them is not a 1-D array of finite floats, or is
            beyond MAX_PEAK; or there are not as many labels or weights.
    """

    waveforms: Sequence[np.ndarray]
    sample_rate: int = 16000
    _: dataclasses.KW_ONLY
    labels: ArrayLike | None = None
    weights: ArrayLike | None = None

    def __post_init__(self):
        waveforms = tuple(map(np.asarray, self.waveforms))
        if not waveforms:
            raise ValueError("waveforms is empty; give at least one float32 array (samples,).")
        for number, waveform in enumerate(waveforms):
            floats = waveform.ndim == 1 and np.issubdtype(waveform.dtype, np.floating)
            if not floats or not np.isfinite(waveform).all():
                raise ValueError(
                    f"waveforms[{number}] has dtype {waveform.dtype} and shape {waveform.shape}; "
                    f"expected finite floats in [-1, 1] of shape (samples,), one channel."
                )
            if np.abs(waveform).max(initial=0) > MAX_PEAK:
                raise ValueError(
                    f"waveforms[{number}] has samples beyond {MAX_PEAK:g}; expected numbers in "
                    f"[-1, 1]. Divide 16-bit integers by 32768."
                )
        waveforms = tuple(waveform.astype("float32", copy=False) for waveform in waveforms)
        object.__setattr__(self, "waveforms", waveforms)
        labels = np.zeros(len(waveforms), "int32") if self.labels is None else self.labels
        labels = np.asarray(labels)
        if labels.ndim == 1 and not (labels == np.floor(labels)).all():
            raise ValueError(f"labels has values such as {labels[0]}; expected integers (clips,).")
        kind = "int32" if labels.ndim == 1 else "float32"
        object.__setattr__(self, "labels", labels.astype(kind))
        if self.weights is not None:
            weights = np.asarray(self.weights, "float32")
            object.__setattr__(self, "weights", weights)
            if not (np.isfinite(weights) & (weights >= 0)).all():
                raise ValueError(
                    "weights has negative values, NaN or infinity; expected 0 or more."
                )
        for name, ranks in (("labels", (1, 2)), ("weights", (1,))):
            shape = np.shape(getattr(self, name))
            if getattr(self, name) is None:
                continue
            if len(shape) not in ranks or shape[0] != len(waveforms):
                raise ValueError(
                    f"{name} has shape {shape} for {len(waveforms)} waveforms; expected one of "
                    f"each clip."
                )

    @property
    def durations(self) -> np.ndarray:
        """float64 (clips,), length of each clip in seconds."""
        return np.array([len(waveform) for waveform in self.waveforms]) / self.sample_rate

    @property
    def label_width(self) -> int:
        """Number of classes that soft labels need."""
        labels = np.asarray(self.labels)  # no longer None
        return labels.shape[1] if labels.ndim == 2 else 1 + int(labels.max())

    @property
    def label_columns(self) -> LabelColumns:
        """The labels of all clips, those of which they have a share, and their weights."""
        labels = np.asarray(self.labels)
        hot = labels[:, None] == np.arange(self.label_width) if labels.ndim == 1 else labels > 0
        weights = np.ones(len(labels)) if self.weights is None else np.asarray(self.weights)
        return LabelColumns(np.nonzero(hot)[1], np.cumsum(hot.sum(1)), weights)

    def clip_name(self, clip_id: int) -> str:
        """Name of a clip in messages: its place in the list."""
        return f"waveforms[{clip_id}]"


def read_data(
    data: PathLike | ScannedSource,
    settings: FbankSettings,
    *,
    classes: Sequence[str] | None = None,
    layout: str | None = None,
    split: str | None = None,
    shares: tuple[float, float] = SHARES,
    refuse: Refuse | None = None,
    progress: bool = False,
) -> ScannedSource:
    """The usable clips of a folder or manifest, measured; a warning names those left out.

    Args:
        data: folder or file, see `load_source`; or a prepared folder, of which no sound is read;
            or a ScannedSource. Of the last two only the split is taken.
        settings: FbankSettings, see `scan_source`.
        classes: class names in the order of a trained model; None for those of `load_source`.
        layout: name of a published layout, see `load_source`; None tells it from data.
        split: name of the only split to read; None or "all" reads all clips.
        shares: shares of validation and test clips, see `load_source`; those of a model's
            training, so that its test clips are met again.
        refuse: why a file is left out unread, see `scan_source`.
        progress: whether to show a progress bar.

    Returns:
        ScannedSource.

    Raises:
        FileNotFoundError, ValueError: as in `load_source` and `scan_source`.
    """
    part = None if split == "all" else split
    if isinstance(data, ScannedSource):
        if classes is not None and tuple(classes) != data.source.classes:
            raise ValueError(
                f"data has the classes {some_of(data.source.classes)}, expected "
                f"{some_of(classes)} in this order. Load it with classes= of the model."
            )
        return data if part is None else data.split(part)
    if is_prepared(data):
        scanned = read_prepared(data, settings, classes)
        return _accepted(scanned if part is None else scanned.split(part), refuse)
    validation, test = shares
    source = load_source(data, classes, layout=layout, validation=validation, test=test)
    if part is not None:
        source = source.split(part)
    scanned = scan_source(source, settings, progress, refuse=refuse)
    message = scanned.warning()
    if message:
        warnings.warn(message, DataWarning, stacklevel=2)
    return scanned


def _accepted(scanned, refuse):
    """The clips of prepared data that `refuse` accepts; a warning names the others."""
    if refuse is None:
        return scanned
    names = map(scanned.clip_name, range(len(scanned.source)))
    found = [(name, refuse(name, s)) for name, s in zip(names, scanned.durations, strict=True)]
    refused = tuple(pair for pair in found if pair[1])
    if not refused:
        return scanned
    keep = np.array([not reason for _, reason in found])
    source, durations = scanned.source.select(keep), scanned.durations[keep]
    rest = dataclasses.replace(scanned, source=source, durations=durations, rejected=refused)
    if not keep.any():
        raise ValueError(f"no clip can be used:\n{reasons(refused)}")
    warnings.warn(rest.warning(), DataWarning, stacklevel=3)
    return rest


def load_source(
    data: PathLike,
    classes: Sequence[str] | None = None,
    *,
    layout: str | None = None,
    validation: float = SHARES[0],
    test: float = SHARES[1],
    seed: int = 1337,
) -> Source:
    """Clips, labels and splits of a folder or of a manifest; it opens no sound file.

    A folder holds one folder per class, or first split folders (train, validation, test; val,
    valid, dev and eval are known too) that hold these. Names that start with "." or "_" are
    skipped. A .csv manifest has a header with `path` and `label`, and may have `split`;
    several labels are separated by ";", and paths are relative to the manifest.

    Where there are no splits, they are drawn for each class: every class keeps a training
    clip, and a class with three or more clips gives at least one to each fraction above 0
    (as far as possible where clips have several labels). The draw depends only on the seed
    and the names.

    A published data set is read as it was published, with its own classes, splits and lists:
    see settings.LAYOUT_NAMES; "ast" are the JSON manifests of AST. The package `datasets`
    describes each, and what it does where a split is not published; `validation`, `test` and
    `seed` play no part.

    Args:
        data: folder, .csv file or .json manifest of AST.
        classes: class names in the order of a trained model; None takes the published order, or
            sorts the names in data.
        layout: name of the published layout; None tells it from the lists that are there. A
            folder with class folders is never taken for a published data set.
        validation: share of the clips of each class for validation, where data has no splits.
        test: share of the clips of each class for the test, where data has no splits.
        seed: random seed of the draw of the splits.

    Returns:
        Source.

    Raises:
        FileNotFoundError: data, or a file that the manifest names, does not exist; or a list or
            every clip of a published data set is missing.
        ValueError: the layout of data is wrong or unknown; the message names the folder or line.
    """
    checked_shares((validation, test))
    data = pathlib.Path(data).expanduser()
    if not data.exists():
        raise FileNotFoundError(f"data={str(data)!r} does not exist. {EXPECTED}")
    layout = layout_of(data) if layout is None else layout
    if layout is not None:
        source = read_layout(data, layout)
    else:
        source = _own_source(data, validation=validation, test=test, seed=seed)
    present = sorted({label for clip in source.clips for label in clip.labels})
    present = [source.classes[label] for label in present]
    if classes is None and len(source.classes) < 2:
        raise ValueError(
            f"{data} has one class, {present[0]!r}; a classifier needs at least 2. {EXPECTED}"
        )
    check_names(data, source.classes)
    return source if classes is None else _in_order(data, source, tuple(classes), present)


def _own_source(data, *, validation, test, seed):
    """The Source of a user's own folder or manifest, with sorted classes."""
    if data.is_dir():
        rows, multi_label = read_folder(data), False
    elif data.suffix.lower() == ".csv":
        rows, multi_label = read_manifest(data)
    else:
        raise ValueError(f"data={str(data)!r} is neither a folder nor a .csv file. {EXPECTED}")
    classes = sorted({name for _, names, _ in rows for name in names})
    check_names(data, classes)
    if rows[0][2] is None:
        names = {
            os.path.relpath(path, data.parent).replace(os.sep, "/"): labels
            for path, labels, _ in rows
        }
        splits = draw_splits(names, validation, test, seed)
        rows = [(p, n, s) for (p, n, _), s in zip(rows, splits, strict=True)]
    index = {name: label for label, name in enumerate(classes)}
    clips = (
        Clip(path, tuple(sorted(index[name] for name in names)), split)
        for path, names, split in rows
    )
    return Source(tuple(clips), tuple(classes), multi_label)


def _in_order(data, source, classes, present):
    """The Source with other classes, or another order of them; `present` must be among them."""
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise ValueError(
            f"{data} has the class(es) {some_of(unknown)}, which are not among "
            f"{', '.join(classes)}. Rename them, or train a model with them."
        )
    index = {name: label for label, name in enumerate(classes)}
    clips = (
        dataclasses.replace(
            clip, labels=tuple(sorted(index[source.classes[label]] for label in clip.labels))
        )
        for clip in source.clips
    )
    return dataclasses.replace(source, clips=tuple(clips), classes=classes)


def scan_source(
    source: Source,
    settings: FbankSettings,
    progress: bool = False,
    max_rejected: float = 0.5,
    *,
    refuse: Refuse | None = None,
) -> ScannedSource:
    """Open every clip once, drop the unusable ones and measure durations and log-mel values.

    Args:
        source: Source.
        settings: FbankSettings; its mean and std are not used.
        progress: whether to show a progress bar.
        max_rejected: largest share of unusable clips; with more of them the scan raises.
        refuse: function of a clip's name and the seconds that its file announces, before it is
            decoded, that gives the reason why it is unusable, or None; None refuses nothing.

    Returns:
        ScannedSource.

    Raises:
        ValueError: no clip is usable, more than `max_rejected` of them are unusable, or a
            class loses all its training clips; the message names files and reasons.
    """
    import rich.progress
    import tensorflow as tf

    from tf_data_pipelines.fbank import log_mel_sums, mean_and_std
    from tf_data_pipelines.wav import decode_wav

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
    def is_plain(path):
        return tf.size(decode_wav(path, settings.sample_rate)) >= min_samples

    sums = log_mel_sums(settings)
    min_samples = max(settings.window, MIN_SAMPLES)  # decode_audio refuses under MIN_SAMPLES
    measured = measured_splits(source)

    def measure(clip):
        try:
            reason = refuse and refuse(clip.name, clip.announced_seconds())
            if reason:
                return _Measured(reason=reason)
            waveform = clip.read(settings.sample_rate, min_samples=min_samples)
        except AudioError as error:
            return _Measured(reason=str(error))
        seconds = waveform.size / settings.sample_rate
        plain = clip.whole and bool(is_plain(tf.constant(os.fsencode(clip.path))))
        if clip.split not in measured:
            return _Measured(None, seconds, plain)
        return _Measured(None, seconds, plain, sums(waveform))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        measuring: Iterable[_Measured] = pool.map(measure, source.clips)
        if progress:
            measuring = rich.progress.track(measuring, "Reading clips", len(source))
        results = list(measuring)

    pairs = list(zip(source.clips, results, strict=True))
    rejected = tuple((clip.name, one.reason) for clip, one in pairs if one.reason is not None)
    kept = dataclasses.replace(
        source, clips=tuple(clip for clip, one in pairs if one.reason is None)
    )
    check_usable(source, kept, rejected, max_rejected)
    emptied = sorted(source.label_counts().keys() - kept.label_counts().keys())
    mean, std = mean_and_std(one.sums for one in results)
    return ScannedSource(
        kept,
        np.array([one.seconds for one in results if one.reason is None]),
        rejected=rejected,
        emptied=tuple((source.classes[label], split) for label, split in emptied),
        mean=mean,
        std=std,
        graph_only=all(one.plain for one in results),
    )


class _Measured(NamedTuple):
    """What `scan_source` measures in one clip.

    Args:
        reason: text that says why the clip is unusable; None for a usable clip.
        seconds: length of the clip.
        plain: whether `decode_wav` decodes the clip; True for an unusable one.
        sums: number, sum and sum of squares of the log-mel values that count.
    """

    reason: str | None
    seconds: float = 0.0
    plain: bool = True
    sums: Sequence[float] = (0.0, 0.0, 0.0)
