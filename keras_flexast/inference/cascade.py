"""A cascade over patch sizes: the cheap one for all clips, finer ones for those in doubt."""

import itertools
import pathlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from keras_flexast.files import RUN
from keras_flexast.inference.artifacts import (
    FileEmbeddings,
    FileScores,
    check_settled,
    is_artifact,
    scoring_artifacts,
)
from keras_flexast.inference.classifier import (
    ArtifactClassifier,
    Classifier,
    checked_waveforms,
    load_classifier,
)
from keras_flexast.inference.timeline import Timeline
from keras_flexast.runs import Run, configured_run
from keras_flexast.settings import DEFAULT_THRESHOLD
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.settings import DataWarning, check_between, patch_name, patch_pair

THRESHOLDS = np.arange(201) / 200  # that `best_threshold` compares
MOST_STAGES = 8
BUDGET = 0.5  # of what the best size alone costs, see `best_stages`


def load_cascade(
    path: Run | PathLike,
    patch_sizes: Sequence[PatchSize],
    *,
    threshold: float | None = DEFAULT_THRESHOLD,
    frame_shift_ms: float | None = None,
    resize: str | None = None,
    full_length: bool = False,
    threads: int = 2,
) -> "CascadeClassifier":
    """A run, or an exported artifact of several patch sizes, as a cascade.

    Args:
        path, frame_shift_ms, resize, full_length, threads: as in `load_classifier`.
        patch_sizes: ints or (frequency, time) pairs, each smaller than the one before, such as
            (48, 24, 8).
        threshold: score in [0, 1]. A clip's scores are the mean of those at the patch sizes so
            far; where the best of them is below the threshold, the next patch size is asked.
            `evaluate_cascade` finds one on validation clips. None asks all of them for every clip.

    Returns:
        CascadeClassifier.

    Raises:
        FileNotFoundError, ValueError: as `load_classifier`; fewer than two patch sizes, or not
            from large to small; or a threshold for clips of several labels.

    Example:
        classifier = load_cascade("run", (48, 24, 8), threshold=0.8)
        found = classifier.predict_files(["a.ogg", "b.mp3"])
    """
    pairs = checked_stages(patch_sizes)
    if threshold is not None:
        check_between("threshold", threshold, 0, 1)
    settled: dict[str, Any] = {
        "frame_shift_ms": frame_shift_ms, "resize": resize, "full_length": full_length,
    }  # fmt: skip
    if not isinstance(path, Run) and is_artifact(path):
        check_settled(path, **settled)
        artifacts = scoring_artifacts(path, pairs, threads)
        return CascadeClassifier([*map(ArtifactClassifier, artifacts)], threshold)
    if not isinstance(path, Run) and RUN.is_whole(pathlib.Path(path)):
        path = configured_run(path)  # read once
    classifiers = [load_classifier(path, pair, threads=threads, **settled) for pair in pairs]
    return CascadeClassifier(classifiers, threshold)


class CascadeClassifier(Classifier):
    """Classifiers of the same classes, of which each hears what those before it doubt.

    A clip's scores are the mean of those of all classifiers that heard it.

    Args:
        classifiers: list of Classifier, from the cheapest to the finest.
        threshold: score in [0, 1] at which a clip's best class is believed; None for never.
    """

    def __init__(
        self, classifiers: Sequence[Classifier], threshold: float | None = DEFAULT_THRESHOLD
    ) -> None:
        first = classifiers[0]
        if first.multi_label and threshold is not None:
            raise ValueError(
                "threshold needs one label for each clip, and this model gives several; "
                "threshold=None (--mean) takes the mean of all patch sizes for every clip."
            )
        self.classifiers = classifiers
        self.threshold = threshold
        self.classes = first.classes
        self.sample_rate = first.sample_rate
        self.min_samples = first.min_samples
        self.multi_label = first.multi_label
        self.patch_size = ",".join(str(one.patch_size) for one in classifiers)

    def predict(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        waveforms = checked_waveforms(waveforms, self.sample_rate, self.min_samples)

        def ask(classifier, places):
            chosen = [waveforms[place] for place in places]
            if classifier is self.classifiers[0]:  # it says what is wrong with a clip
                return np.ones(len(places), bool), classifier.predict(chosen)
            return classifier.predict_fitting(chosen)

        return self._gathered(len(waveforms), ask)

    def predict_files(
        self, paths: PathLike | Iterable[PathLike], progress: bool = False
    ) -> FileScores:
        first = self.classifiers[0].predict_files(paths, progress)

        def ask(classifier, places):
            if classifier is self.classifiers[0]:
                return np.ones(len(places), bool), first.scores
            chosen = [first.paths[place] for place in places]
            found = classifier.predict_files(chosen, progress)
            return np.isin(chosen, found.paths), found.scores

        return FileScores(self._gathered(len(first.paths), ask), first.paths, first.rejected)

    def embed_files(
        self, paths: PathLike | Iterable[PathLike], progress: bool = False
    ) -> FileEmbeddings:
        raise ValueError(_ONE_SIZE.format("embeddings"))

    def timeline(
        self,
        path: PathLike,
        *,
        window: float | None = None,
        hop: float | None = None,
        progress: bool = False,
    ) -> Timeline:
        raise ValueError(_ONE_SIZE.format("timeline"))

    def _gathered(self, clips, ask):
        """Scores of clips, float32 (clips, classes).

        Args:
            clips: number of clips.
            ask: function of a classifier and the places of clips, int (n,), to bool (n,), which of
                them are short enough for it, and their scores. The others keep what they have, and
                a warning counts them.
        """
        sums, counts = np.zeros((clips, len(self.classes)), "float32"), np.zeros((clips, 1))
        doubted = np.arange(clips)
        for classifier in self.classifiers:
            if not doubted.size:
                break
            heard, scores = ask(classifier, doubted)
            if not heard.all():
                warnings.warn(
                    f"{np.sum(~heard)} of {clips} clips are too long for patch "
                    f"{classifier.patch_size}; their scores are those of larger patches.",
                    DataWarning,
                    stacklevel=4,
                )
            sums[doubted[heard]] += scores
            counts[doubted[heard]] += 1
            if self.threshold is not None:
                best = sums[doubted].max(1) / counts[doubted, 0]
                doubted = doubted[best < self.threshold]
        return np.float32(sums / counts)


_ONE_SIZE = (
    "a cascade has no {}: each of its patch sizes would have its own. Choose one patch size."
)


def checked_stages(patch_sizes):
    """Patch sizes of a cascade as pairs.

    Raises:
        ValueError: fewer than two, more than MOST_STAGES, or not from large to small.
    """
    if isinstance(patch_sizes, str):
        raise ValueError(f"cascade={patch_sizes!r} must be patch sizes, such as (48, 24, 8).")
    pairs = tuple(patch_pair(size) for size in patch_sizes)
    areas = [frequency * time for frequency, time in pairs]
    falling = all(after < before for before, after in itertools.pairwise(areas))
    if not 2 <= len(pairs) <= MOST_STAGES or not falling:
        names = ",".join(map(patch_name, pairs))
        raise ValueError(
            f"cascade={names} must be 2 to {MOST_STAGES} patch sizes, each smaller than the one "
            f"before, such as 48,24,8."
        )
    return pairs


def best_threshold(scores, heard, *, targets, costs):
    """The threshold at which a cascade costs least while it is as accurate as its best stage alone.

    Args:
        scores: float (stages, clips, classes) of validation clips at each stage, in [0, 1].
        heard: bool (stages, clips): which clips are short enough for each stage.
        targets: int (clips,).
        costs: float (stages, clips), what each stage costs for each clip.

    Returns:
        float, one of THRESHOLDS. Where none is as accurate as the best stage, the most accurate
        one; of equals the cheapest.
    """
    least, means = (scores.argmax(-1) == targets).mean(1).max(), means_so_far(scores, heard)
    sure = means.max(-1) >= THRESHOLDS[:, None, None]
    sure[:, -1] = True
    stage, clips = sure.argmax(1), np.arange(len(targets))
    accuracy = (means.argmax(-1) == targets)[stage, clips].mean(1)
    cost = np.cumsum(costs * heard, 0)[stage, clips].mean(1)
    order = np.lexsort((-THRESHOLDS, cost, -np.minimum(accuracy, least)))
    return float(THRESHOLDS[order[0]])


def best_stages(scores, heard, *, targets, costs, areas, progress=False):
    """The two or three patch sizes that make the best cascade on validation clips.

    Of the cascades that are as accurate as the best size alone: the most accurate of those that
    cost at most half of that size, or else the cheapest. Where none is as accurate, the most
    accurate one. Each has its `best_threshold`.

    Args:
        scores, heard, targets, costs: as in `best_threshold`, of all sizes that are tried, from
            large to small.
        areas: int (sizes,), bins times frames of a patch.
        progress: show a progress bar.

    Returns:
        list of int, places among the sizes.
    """
    right = (scores.argmax(-1) == targets).mean(1)
    least = right.max()
    limit = BUDGET * costs[right == least].mean(1).min()
    tried = [
        [*stages]
        for count in (2, 3)
        for stages in itertools.combinations(range(len(areas)), count)
        if all(areas[after] < areas[before] for before, after in itertools.pairwise(stages))
    ]
    found = []
    with Progress(disable=not progress) as bar:
        for stages in bar.track(tried, description="Choosing patch sizes"):
            some, hears = {"targets": targets, "costs": costs[stages]}, heard[stages]
            hears[0] = True  # the first stage cuts what is too long
            threshold = best_threshold(scores[stages], hears, **some)
            ends, stage, _ = ended(scores[stages], hears, threshold)
            accuracy = (ends.argmax(-1) == targets).mean()
            cost = cascade_costs(costs[stages], hears, stage).mean()
            most = accuracy if cost <= limit else least
            key = min(accuracy, least), cost <= limit, most, -cost, -len(stages)
            found.append((key, stages))
    return max(found)[-1]


def means_so_far(scores, heard):
    """The scores of a cascade that ends at each stage, float (stages, clips, classes)."""
    counts = np.cumsum(heard, 0)[..., None]
    return np.cumsum(np.where(heard[..., None], scores, 0), 0) / counts


def ended(scores, heard, threshold):
    """Where a cascade ends for each clip, and what it says then.

    Args:
        scores, heard: as in `best_threshold`.
        threshold: score at which a clip's best class is believed.

    Returns:
        (scores of the clips, float (clips, classes); stage of each, int (clips,); list with the
        share of the clips that each stage hears).
    """
    means = means_so_far(scores, heard)
    stage = stages_of(means, threshold)
    reached = [float(((stage >= place) & one).mean()) for place, one in enumerate(heard)]
    return means[stage, np.arange(stage.size)], stage, reached


def stages_of(means, threshold):
    """The stage at which each clip ends, int (clips,), from the `means_so_far`."""
    sure = means.max(-1) >= threshold
    sure[-1] = True
    return sure.argmax(0)


def cascade_costs(costs, heard, stage):
    """What a cascade that ends at these stages costs for each clip, float (clips,)."""
    return np.cumsum(costs * heard, 0)[stage, np.arange(stage.size)]


def clip_operations(model, tokens):
    """Floating-point operations that a PackedAST takes for clips, float as `tokens`.

    Those of the encoder's matrix products: the patch embedding, the blocks, and attention between
    the tokens of a clip; pooling and head are left out.
    """
    backbone = model.backbone
    tokens = np.asarray(tokens, "float64")
    hidden = backbone.blocks[0].mlp_dim
    area = backbone.base_patch[0] * backbone.base_patch[1]
    block = 8 * backbone.dim**2 + 4 * backbone.dim * hidden
    each = 2 * area * backbone.dim + len(backbone.blocks) * block
    return tokens * each + 4 * len(backbone.blocks) * backbone.dim * tokens**2
