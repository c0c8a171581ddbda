"""One face for a run and for everything exported from it: files in, labels and scores out."""

import abc
import concurrent.futures
import functools
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from rich.progress import Progress

from keras_flexast.inference.artifacts import (
    FileEmbeddings,
    FileScores,
    check_settled,
    file_embeddings,
    file_scores,
    is_artifact,
    load_artifact,
    scoring_artifacts,
    warn_of_unheard,
)
from keras_flexast.inference.scoring import ClipPredictor, PackedPredictor
from keras_flexast.inference.timeline import Timeline, artifact_timeline, run_timeline
from keras_flexast.models import embedding_model
from keras_flexast.runs import Run, configured_run, is_cut, warn_of_cuts
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.settings import MAX_PEAK, patch_name, patch_pair

GROUP_SECONDS = 1800.0  # of sound that a run holds in memory at once, 115 MB at 16 kHz


class Classifier(abc.ABC):
    """A trained classifier of sounds, however it is stored. `load_classifier` opens one.

    Attributes:
        classes: tuple of class names in the order of the scores.
        sample_rate: sample rate in Hz of the waveforms that `predict` takes.
        multi_label: whether scores are independent (sigmoid); None where an artifact does not
            say.
        patch_size: name of the patch size, "16" or "16x24"; None where an artifact does not
            say.
        min_samples: number of samples of the shortest clip, one window of the filterbank.
    """

    classes: tuple[str, ...]
    sample_rate: int
    min_samples: int
    multi_label: bool | None
    patch_size: str | None

    @abc.abstractmethod
    def predict(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Scores of clips in memory.

        Args:
            waveforms: list of float32 (samples,) in [-1, 1], of any lengths, at
                `sample_rate` Hz.

        Returns:
            float32 (clips, classes), in [0, 1].

        Raises:
            ValueError: a clip cannot be used; the message says which and why.
        """

    def predict_fitting(self, waveforms: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the clips that are short enough for this patch size.

        Args:
            waveforms: as in `predict`.

        Returns:
            which of the clips these are, bool (clips,); and their scores, float32 (n, classes).
        """
        return np.ones(len(waveforms), bool), self.predict(waveforms)

    @abc.abstractmethod
    def predict_files(
        self, paths: PathLike | Iterable[PathLike], progress: bool = False
    ) -> FileScores:
        """Scores of sound files of any format, rate and length.

        Args:
            paths: list of paths, or one path; of a folder all sound files in it and below.
            progress: show a progress bar.

        Returns:
            FileScores: `scores` float32 (usable files, classes), their `paths`, and
            `rejected`, (path, reason) of each file that is left out.
        """

    @abc.abstractmethod
    def embed_files(
        self, paths: PathLike | Iterable[PathLike], progress: bool = False
    ) -> FileEmbeddings:
        """One vector per sound file: what pooling gives the classifier's head.

        Args:
            paths, progress: as in `predict_files`.

        Returns:
            FileEmbeddings: `embeddings` float32 (usable files, width), `paths` and `rejected`.

        Raises:
            ValueError: an artifact without embeddings.
        """

    @abc.abstractmethod
    def timeline(
        self,
        path: PathLike,
        *,
        window: float | None = None,
        hop: float | None = None,
        progress: bool = False,
    ) -> Timeline:
        """What is heard when in one recording of any length.

        Args:
            path: sound file; it is decoded in blocks.
            window: length of a window in seconds; None for 1, or for the only length that an
                artifact takes.
            hop: seconds from the start of one window to the next; None for half a window.
            progress: show a progress bar.

        Returns:
            Timeline.
        """


def load_classifier(
    path: Run | PathLike,
    patch_size: PatchSize | None = None,
    *,
    frame_shift_ms: float | None = None,
    resize: str | None = None,
    full_length: bool = False,
    threads: int = 2,
) -> Classifier:
    """A run or an exported artifact as a classifier.

    Args:
        path: folder of a run, SavedModel folder (of one version, or TF Serving's folder of
            versions), `.tflite` or `.onnx` file; or a Run.
        patch_size: int or (frequency, time); larger is faster. None for the model's own, or
            for what an artifact does by default.
        frame_shift_ms: frame shift in milliseconds, of a run; None for the filterbank's own.
            Longer is faster.
        resize: "pi" or "bilinear", of a run; None for that of training.
        full_length: hear each clip at its full length, where a converted AST cuts or fills up.
        threads: number of threads of LiteRT or onnxruntime.

    Returns:
        Classifier.

    Raises:
        FileNotFoundError, ValueError: no run or artifact, a damaged one, no such patch size,
            or an option that an artifact has settled.

    Example:
        classifier = load_classifier("run", patch_size=24)
        found = classifier.predict_files(["a.ogg", "b.mp3"])
        labels = [classifier.classes[k] for k in found.scores.argmax(1)]
    """
    if not isinstance(path, Run) and is_artifact(path):
        check_settled(path, frame_shift_ms=frame_shift_ms, resize=resize, full_length=full_length)
        if patch_size is None:
            return ArtifactClassifier(load_artifact(path, threads=threads))
        return ArtifactClassifier(*scoring_artifacts(path, [patch_size], threads))
    if not isinstance(path, Run) and pathlib.Path(path, "serving").is_dir():
        raise ValueError(
            f"{path} is a folder of several exported artifacts; give one of them, such as "
            f"{pathlib.Path(path, 'serving')}, or the folder of a run."
        )
    from tf_data_pipelines.patches import check_patches

    run = configured_run(path, resize=resize, full_length=full_length)
    pair = run.model.backbone.base_patch if patch_size is None else patch_pair(patch_size)
    check_patches(run.patches_at([pair]), run.fbank.mel_bins)
    return RunClassifier(run, pair, frame_shift_ms)


class RunClassifier(Classifier):
    """A run at one patch size and frame shift; clips of any length are packed together.

    Args:
        run: Run.
        patch_size: (frequency, time).
        frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.
    """

    def __init__(self, run, patch_size, frame_shift_ms=None):
        self.run = run
        self.pair = patch_size
        self.frame_shift_ms = frame_shift_ms
        self.classes = run.classes
        self.sample_rate = run.fbank.sample_rate
        self.min_samples = run.fbank.window
        self.multi_label = run.multi_label
        self.patch_size = patch_name(patch_size)
        patches = run.patches_at([patch_size], frame_shift_ms)
        self._outputs = ClipPredictor(run.fbank, patches, run.packing)

    @functools.cached_property
    def _logits(self):
        return PackedPredictor(self.run.model)

    @functools.cached_property
    def _embedding(self):
        return PackedPredictor(embedding_model(self.run.model))

    def predict(self, waveforms):
        waveforms = checked_waveforms(waveforms, self.sample_rate, self.min_samples)
        fbank, seconds = self.run.fbank, [len(one) / self.sample_rate for one in waveforms]
        warn_of_cuts(self.run, sum(is_cut(fbank, one) for one in seconds), len(waveforms))
        return self.run.scores(self._outputs(self._logits, waveforms))

    def predict_fitting(self, waveforms):
        from tf_data_pipelines.lengths import overlong_reason

        patches = self.run.patches_at([self.pair], self.frame_shift_ms)
        seconds = (len(waveform) / self.sample_rate for waveform in waveforms)
        limits = {"fbank": self.run.fbank, "patches": patches}
        heard = np.array([overlong_reason("", one, **limits) is None for one in seconds], bool)
        chosen = [one for one, is_heard in zip(waveforms, heard, strict=True) if is_heard]
        none = np.zeros((0, len(self.classes)), "float32")
        return heard, self.predict(chosen) if chosen else none

    def predict_files(self, paths, progress=False):
        logits, usable, rejected = self._file_outputs(
            self._logits, paths, "Classifying" if progress else None
        )
        return FileScores(self.run.scores(logits), usable, rejected)

    def embed_files(self, paths, progress=False):
        text = "Embedding" if progress else None
        return FileEmbeddings(*self._file_outputs(self._embedding, paths, text))

    def timeline(self, path, *, window=None, hop=None, progress=False):
        return run_timeline(
            self.run, path, patch_size=self.pair, window=window, hop=hop,
            frame_shift_ms=self.frame_shift_ms, progress=progress,
        )  # fmt: skip

    def _file_outputs(self, predictor, paths, description):
        """(outputs float32 (usable files, width), paths of the usable files, rejected)."""
        outputs, usable, rejected, held, cut = [], [], [], [], 0

        def flush():
            if held:
                outputs.append(self._outputs(predictor, held))
                held.clear()

        paths = path_list(paths)
        with Progress(disable=description is None) as bar:
            for path, (waveform, reason) in bar.track(
                zip(paths, self._decoded(paths), strict=True),
                len(paths),
                description=description or "",
            ):
                if reason:
                    rejected.append((path, reason))
                    continue
                usable.append(path)
                held.append(waveform)
                cut += is_cut(self.run.fbank, len(waveform) / self.sample_rate)
                if sum(map(len, held)) > GROUP_SECONDS * self.sample_rate:
                    flush()
            flush()
        warn_of_cuts(self.run, cut, len(usable))
        outputs = np.concatenate([np.zeros((0, predictor.width), "float32"), *outputs])
        return outputs, usable, tuple(rejected)

    def _decoded(self, paths):
        """(waveform, None) or (None, reason) of each file, decoded a few files ahead."""
        from tf_data_pipelines.audio import AudioError, announced_seconds, read_audio
        from tf_data_pipelines.lengths import overlong_reason

        run, patches = self.run, self.run.patches_at([self.pair], self.frame_shift_ms)

        def decode(path):
            limits = {"fbank": run.fbank, "patches": patches}
            try:  # an hour of sound is refused before it is decoded
                reason = overlong_reason(path, announced_seconds(path), **limits)
                if reason:
                    return None, reason
                waveform = read_audio(path, self.sample_rate, min_samples=self.min_samples)
            except AudioError as error:
                return None, str(error)
            reason = overlong_reason(path, len(waveform) / self.sample_rate, **limits)
            return (None, reason) if reason else (waveform, None)

        workers = os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            ahead = []
            for path in paths:
                ahead.append(pool.submit(decode, path))
                if len(ahead) > 2 * workers:
                    yield ahead.pop(0).result()
            for future in ahead:
                yield future.result()


class ArtifactClassifier(Classifier):
    """One signature of an exported artifact, run by its own runtime.

    Args:
        artifact: Artifact.
    """

    def __init__(self, artifact):
        self.artifact = artifact
        self.classes = artifact.classes
        self.sample_rate = artifact.sample_rate
        self.min_samples = artifact.min_samples
        self.multi_label = artifact.multi_label
        self.patch_size = artifact.patch_size

    def predict(self, waveforms):
        waveforms = checked_waveforms(waveforms, self.sample_rate, self.min_samples)
        scores = self.artifact.scores(waveforms)
        warn_of_unheard(self.artifact, map(len, waveforms))
        return scores

    def predict_fitting(self, waveforms):
        scores, refused = self.artifact.answer(waveforms)
        heard = np.array([not reason for reason in refused], bool)
        return heard, scores[heard]

    def predict_files(self, paths, progress=False):
        text = "Classifying" if progress else None
        return file_scores(self.artifact, path_list(paths), text)

    def embed_files(self, paths, progress=False):
        text = "Embedding" if progress else None
        return file_embeddings(self.artifact, path_list(paths), text)

    def timeline(self, path, *, window=None, hop=None, progress=False):
        return artifact_timeline(self.artifact, path, window=window, hop=hop, progress=progress)


def checked_waveforms(waveforms, sample_rate, min_samples):
    """The waveforms as a list of float32 arrays, as every kind of classifier asks for them.

    Raises:
        ValueError: one of them is no 1-D array of floats, too short, silent, not finite or far
            beyond full scale; the message says which and why.
    """
    if isinstance(waveforms, np.ndarray) and waveforms.ndim == 1:
        raise ValueError("waveforms is one array; give a list of arrays, such as [waveform].")
    if not len(waveforms):
        raise ValueError("waveforms is empty; give at least one float32 array (samples,).")
    checked = []
    for number, waveform in enumerate(map(np.asarray, waveforms)):
        problem = None
        if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
            problem = (
                f"has dtype {waveform.dtype} and shape {waveform.shape}; expected floats in "
                f"[-1, 1] of shape (samples,). Divide 16-bit integers by 32768."
            )
        elif len(waveform) < min_samples:
            problem = (
                f"has {len(waveform)} samples; at least {min_samples} are needed, "
                f"{1000 * min_samples / sample_rate:g} ms. Pad it with background sound."
            )
        elif not np.isfinite(waveform).all():
            problem = "has NaN or infinite samples; expected numbers in [-1, 1]."
        elif np.abs(waveform).max() > MAX_PEAK:
            problem = f"has samples beyond {MAX_PEAK:g}; expected numbers in [-1, 1]."
        elif waveform.min() == waveform.max():
            problem = "is silent: all its samples are equal; expected sound."
        if problem:
            raise ValueError(f"waveforms[{number}] {problem}")
        checked.append(waveform.astype("float32", copy=False))
    return checked


def path_list(paths):
    """A list of sound files as str; one path is a list of one, a folder stands for its files."""
    from tf_data_pipelines.listing import sound_files

    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    return [os.fspath(path) for path in sound_files(paths)]
