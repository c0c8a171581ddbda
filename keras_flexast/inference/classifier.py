"""One face for a run and for everything exported from it: files in, labels and scores out."""

import abc
import concurrent.futures
import functools
import os

import numpy as np
from rich.progress import Progress

from keras_flexast.inference.artifacts import (
    FileEmbeddings,
    FileScores,
    artifact_of_size,
    check_settled,
    file_embeddings,
    file_scores,
    is_artifact,
    load_artifact,
)
from keras_flexast.inference.scoring import PackedPredictor, packed_outputs
from keras_flexast.inference.timeline import artifact_timeline, run_timeline
from keras_flexast.models import embedding_model
from keras_flexast.runs import Run, configured_run, is_cut, warn_of_cuts
from tf_data_pipelines.settings import patch_name, patch_pair

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
    """

    @abc.abstractmethod
    def predict(self, waveforms):
        """Scores of clips in memory.

        Args:
            waveforms: list of float32 (samples,) in [-1, 1], of any lengths, at
                `sample_rate` Hz.

        Returns:
            float32 (clips, classes), in [0, 1].

        Raises:
            ValueError: a clip cannot be used; the message says which and why.
        """

    @abc.abstractmethod
    def predict_files(self, paths, progress=False):
        """Scores of sound files of any format, rate and length.

        Args:
            paths: paths of the files.
            progress: show a progress bar.

        Returns:
            FileScores: `scores` float32 (usable files, classes), their `paths`, and
            `rejected`, (path, reason) of each file that is left out.
        """

    @abc.abstractmethod
    def embed_files(self, paths, progress=False):
        """One vector per sound file: what pooling gives the classifier's head.

        Args:
            paths, progress: as in `predict_files`.

        Returns:
            FileEmbeddings: `embeddings` float32 (usable files, width), `paths` and `rejected`.

        Raises:
            ValueError: an artifact without embeddings.
        """

    @abc.abstractmethod
    def timeline(self, path, *, window=None, hop=None, progress=False):
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
    path, patch_size=None, *, frame_shift_ms=None, resize=None, full_length=False, threads=2
):
    """A run or an exported artifact as a classifier.

    Args:
        path: folder of a run, SavedModel folder (of one version, or TF Serving's folder of
            versions), `.tflite` or `.onnx` file; or a Run.
        patch_size: int or (frequency, time); larger is faster. None for the model's own, or
            for what an artifact does by default.
        frame_shift_ms: frame shift in milliseconds, of a run; None for that of training.
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
        return ArtifactClassifier(artifact_of_size(path, patch_size, threads))
    run = configured_run(path, resize=resize, full_length=full_length)
    pair = run.model.backbone.base_patch if patch_size is None else patch_pair(patch_size)
    return RunClassifier(run, pair, frame_shift_ms)


class RunClassifier(Classifier):
    """A run at one patch size and frame shift; clips of any length are packed together.

    Args:
        run: Run.
        patch_size: (frequency, time).
        frame_shift_ms: frame shift in milliseconds; None for that of training.
    """

    def __init__(self, run, patch_size, frame_shift_ms=None):
        self.run = run
        self.pair = patch_size
        self.frame_shift_ms = frame_shift_ms
        self.classes = run.classes
        self.sample_rate = run.fbank.sample_rate
        self.multi_label = run.multi_label
        self.patch_size = patch_name(patch_size)

    @functools.cached_property
    def _logits(self):
        return PackedPredictor(self.run.model)

    @functools.cached_property
    def _embedding(self):
        return PackedPredictor(embedding_model(self.run.model))

    def predict(self, waveforms):
        for number, waveform in enumerate(waveforms):
            if len(waveform) < self.run.fbank.window:
                raise ValueError(
                    f"waveforms[{number}] has {len(waveform)} samples; at least one window, "
                    f"{self.run.fbank.window} samples, is needed. Pad it with background sound."
                )
        return self.run.scores(self._outputs(self._logits, waveforms))

    def predict_files(self, paths, progress=False):
        logits, usable, rejected = self._file_outputs(self._logits, paths, progress)
        return FileScores(self.run.scores(logits), usable, rejected)

    def embed_files(self, paths, progress=False):
        return FileEmbeddings(*self._file_outputs(self._embedding, paths, progress))

    def timeline(self, path, *, window=None, hop=None, progress=False):
        return run_timeline(
            self.run, path, patch_size=self.pair, window=window, hop=hop,
            frame_shift_ms=self.frame_shift_ms, progress=progress,
        )  # fmt: skip

    def _outputs(self, predictor, waveforms):
        """Outputs of clips in memory, float32 (clips, width)."""
        from tf_data_pipelines.pipeline import evaluation_batches, packing_for
        from tf_data_pipelines.sources import WaveformSource

        run, data = self.run, WaveformSource(waveforms, self.sample_rate)
        patches = run.patches_at([self.pair], self.frame_shift_ms)
        packing = packing_for(data, run.fbank, patches, run.packing)
        batches = evaluation_batches(data, run.fbank, patches=patches, packing=packing)
        return packed_outputs(predictor, batches, len(data.durations))[0]

    def _file_outputs(self, predictor, paths, progress):
        """(outputs float32 (usable files, width), paths of the usable files, rejected)."""
        outputs, usable, rejected, held, cut = [], [], [], [], 0

        def flush():
            if held:
                outputs.append(self._outputs(predictor, held))
                held.clear()

        paths = [os.fspath(path) for path in paths]
        with Progress(disable=not progress) as bar:
            for path, (waveform, reason) in bar.track(
                zip(paths, self._decoded(paths), strict=True), len(paths), description="Classifying"
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
        return (
            np.concatenate([np.zeros((0, predictor.width), "float32"), *outputs]),
            usable,
            (tuple(rejected)),
        )

    def _decoded(self, paths):
        """(waveform, None) or (None, reason) of each file, decoded a few files ahead."""
        from tf_data_pipelines.audio import AudioError, read_audio
        from tf_data_pipelines.pipeline import overlong_reason

        run, patches = self.run, self.run.patches_at([self.pair], self.frame_shift_ms)

        def decode(path):
            try:
                waveform = read_audio(path, self.sample_rate, run.fbank.window)
            except AudioError as error:
                return None, str(error)
            seconds = len(waveform) / self.sample_rate
            reason = overlong_reason(path, seconds, fbank=run.fbank, patches=patches)
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
        self.multi_label = artifact.multi_label
        self.patch_size = artifact.patch_size

    def predict(self, waveforms):
        return self.artifact.scores(list(waveforms))

    def predict_files(self, paths, progress=False):
        return file_scores(self.artifact, paths, "Classifying" if progress else None)

    def embed_files(self, paths, progress=False):
        return file_embeddings(self.artifact, paths, "Embedding" if progress else None)

    def timeline(self, path, *, window=None, hop=None, progress=False):
        return artifact_timeline(self.artifact, path, window=window, hop=hop, progress=progress)
