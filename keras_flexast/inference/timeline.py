"""What is heard when, in recordings of any length: scores of windows that overlap."""

import csv
import dataclasses
import hashlib
import io
import pathlib
from typing import Any

import numpy as np
from rich.progress import Progress

from keras_flexast.figures import timeline_figure
from keras_flexast.files import PICTURE, FileKind, refuse_overwrite
from keras_flexast.inference.scoring import fixed_scorer
from keras_flexast.settings import DEFAULT_WINDOW
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.hints import PathLike
from tf_data_pipelines.resize import token_count
from tf_data_pipelines.settings import check_positive, patch_name

MIN_HOP = 0.01  # seconds, a frame
BATCH_TOKENS = 8192  # tokens of the windows that a run scores at once


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Scores of the windows of one recording.

    Args:
        classes: class names in the order of the scores.
        starts, ends: first and last moment of each window, float64 (windows,), seconds.
        scores: float32 (windows, classes).
        multi_label: whether scores are independent (sigmoid).
    """

    classes: tuple
    starts: np.ndarray
    ends: np.ndarray
    scores: np.ndarray
    multi_label: bool = dataclasses.field(kw_only=True)

    def overall(self) -> np.ndarray:
        """Scores of the recording (classes,): the windows' mean; the largest if multi-label."""
        return self.scores.max(0) if self.multi_label else self.scores.mean(0)

    def write(self, prefix: PathLike, title: str) -> dict[str, Any]:
        """Write the table PREFIX.csv and the picture PREFIX.png.

        Args:
            prefix: path of both files, without their endings.
            title: text above the picture.

        Returns:
            dictionary of `csv` and `png`, the paths, and `windows`, their number.

        Raises:
            FileExistsError: a file is there that is no timeline, or one that was edited.
        """
        refuse_timeline(prefix)
        table = self.to_csv()
        timeline_figure(self, f"{prefix}.png", title, note=_digest(table.encode()))
        atomic_write(f"{prefix}.csv", table)
        return {"csv": f"{prefix}.csv", "png": f"{prefix}.png", "windows": len(self.starts)}

    def to_csv(self) -> str:
        """Text with a line for each window: `start`, `end` in seconds, a column a class."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["start", "end", *self.classes])
        for start, end, scores in zip(self.starts, self.ends, self.scores, strict=True):
            writer.writerow([f"{start:.3f}", f"{end:.3f}", *(f"{score:.6f}" for score in scores)])
        return text.getvalue()


def refuse_timeline(prefix):
    """Raise where the files of a timeline would replace anything but an earlier timeline.

    The picture carries the digest of its table, so that a table that was edited stays.

    Args, Raises: as for `Timeline.write`.
    """
    if pathlib.Path(prefix).is_dir():
        raise FileExistsError(
            f"{prefix} is a folder. Give a name in it, such as {pathlib.Path(prefix, 'timeline')}."
        )
    picture = pathlib.Path(f"{prefix}.png")

    def is_ours(table):
        return picture.exists() and _digest(table.read_bytes()).encode() in picture.read_bytes()

    refuse_overwrite(picture, True, kind=PICTURE)
    refuse_overwrite(f"{prefix}.csv", True, kind=FileKind("timeline", ".csv", is_ours))


def _digest(content):
    return hashlib.sha256(content).hexdigest()


def run_timeline(
    run, path, *, patch_size, window=None, hop=None, frame_shift_ms=None, progress=False
):
    """Timeline of a recording by a run.

    Windows have one length, so the fixed face scores them in full batches; the numbers are
    the packed model's.

    Args:
        run: Run.
        path: sound file of any format, rate and length; it is decoded in blocks.
        patch_size: int or (frequency, time).
        window: length of a window in seconds; None for 1. A recording that is shorter than a
            window is one window, scored as a file of its own; the last window ends where the
            recording does.
        hop: seconds from the start of one window to the next; None for half a window.
        frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.
        progress: show a progress bar.

    Returns:
        Timeline.

    Raises:
        AudioError: the file cannot be used.
        ValueError: a window is shorter than one patch or one frame, or not a positive number.
    """
    scorers, rate = {}, run.fbank.sample_rate

    def score(waveforms):
        count, samples = waveforms.shape
        if samples not in scorers:
            scorers[samples] = count, fixed_scorer(run, patch_size, samples, frame_shift_ms)
        full, scorer = scorers[samples]  # a last batch of another size would be compiled again
        return scorer(np.pad(waveforms, [(0, full - count), (0, 0)]))[:count]

    window = DEFAULT_WINDOW if window is None else window
    check_positive("window", window)
    patches = run.patches_at([patch_size], frame_shift_ms)
    fbank, _ = run.front_end(frame_shift_ms)
    frames = int(fbank.frames(round(window * rate)))
    if frames < patches.patch_sizes[0][1]:
        raise ValueError(
            f"patch_size={patch_name(patches.patch_sizes[0])} is larger than a window of "
            f"{window:g} s, {frames} frames. Choose a smaller patch (--patch-size), or a longer "
            f"window (--window)."
        )
    tokens = int(token_count(frames, fbank.mel_bins, patches.patch_sizes[0], patches))
    heard = _hear(
        path, rate, window=window, hop=hop, score=score, batch=max(1, BATCH_TOKENS // tokens),
        least=fbank.window, progress=progress,
    )  # fmt: skip
    return Timeline(run.classes, *heard, multi_label=run.multi_label)


def artifact_timeline(artifact, path, *, window=None, hop=None, progress=False):
    """Timeline of a recording by an exported artifact.

    Args:
        artifact: Artifact.
        window: length of a window in seconds; None for the artifact's own length, which no
            other can replace, or for 1 where it takes any length.
        path, hop, progress: as in `run_timeline`.

    Returns, Raises: as `run_timeline`; ValueError also for another window than the artifact's.
    """
    rate, own = artifact.sample_rate, artifact.samples and artifact.samples / artifact.sample_rate
    if window is not None and own and round(window * rate) != artifact.samples:
        raise ValueError(
            f"window={window:g} s: {artifact.path} takes {own:g} s, no other length. Leave it out."
        )
    window = own or (DEFAULT_WINDOW if window is None else window)

    reasons = []

    def score(waveforms):  # a window that is refused, such as a silent one, scores 0
        scores, refused = artifact.answer(list(waveforms))
        reasons.extend(refused)
        return scores

    heard = _hear(
        path, rate, window=window, hop=hop, score=score, batch=64,
        least=artifact.min_samples, progress=progress,
    )  # fmt: skip
    if all(reasons):
        raise ValueError(f"{artifact.path} refused {path}: {reasons[0]}")
    multi_label = artifact.multi_label
    if multi_label is None:  # an artifact that does not say: softmax sums to 1
        scored = heard[-1][[not reason for reason in reasons]]
        multi_label = not np.allclose(scored.sum(1), 1, atol=0.01)
    return Timeline(artifact.classes, *heard, multi_label=multi_label)


def cut_windows(blocks, window, hop):
    """Cut a stream into windows of one length.

    Args:
        blocks: iterable of float32 (samples,).
        window: samples of a window.
        hop: samples from the start of one window to the next.

    Yields:
        (first sample, float32 (window,)); the last window ends with the stream. A stream that
        is shorter than a window is one, as long as it is.
    """
    held, start, at = np.zeros(0, "float32"), 0, 0  # `held` begins at sample `start`
    for block in blocks:
        held = np.concatenate([held, block])
        while at + window <= start + len(held):
            yield at, held[at - start : at - start + window]
            at += hop
        past = max(0, min(at - start, len(held) - window))  # the last window may be needed
        held, start = held[past:], start + past
    total = start + len(held)
    if at == 0:
        yield 0, held
    elif at - hop + window < total:
        yield total - window, held[-window:]


def _hear(path, rate, *, window, hop, score, batch, least, progress):
    """(starts, ends, scores) of the windows of a recording, `batch` of them scored at a time.

    A recording of under `least` samples raises an AudioError.
    """
    from tf_data_pipelines.audio import AudioError, stream_audio

    check_positive("window", window)
    hop = window / 2 if hop is None else hop
    check_positive("hop", hop)
    if not MIN_HOP <= hop <= window:
        raise ValueError(
            f"hop={hop:g} must be from {MIN_HOP} s to the window of {window:g} s, or sound between "
            f"two windows is not heard."
        )
    window, hop = round(window * rate), max(1, round(hop * rate))
    seconds, blocks = stream_audio(path, rate)
    starts, ends, scores, unscored = [], [], [], []

    def flush():
        scores.append(score(np.stack(unscored)))
        unscored.clear()
        bar.update(task, completed=ends[-1])

    with Progress(disable=not progress) as bar:
        task = bar.add_task("Listening", total=seconds)
        for start, waveform in cut_windows(blocks, window, hop):
            if waveform.size < least:
                raise AudioError(
                    f"{path} lasts {waveform.size / rate:.4f} s; at least {1000 * least / rate:g} "
                    f"ms are needed. Pad it with background sound, or remove it."
                )
            unscored.append(waveform)
            starts.append(start / rate)
            ends.append((start + len(waveform)) / rate)
            if len(unscored) == batch:
                flush()
        if unscored:
            flush()
    return np.array(starts), np.array(ends), np.concatenate(scores)
