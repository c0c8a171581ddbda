"""Exact evaluation metrics on scores of whole data sets. NumPy only."""

import numpy as np


def average_precision(targets, scores):
    """Average precision of each class: the area under its precision-recall steps.

    Ties are one step, as in scikit-learn.

    Args:
        targets: (clips, classes) of 0 and 1.
        scores: float (clips, classes); larger means more likely.

    Returns:
        float64 (classes,); nan for a class without a positive clip.

    Raises:
        ValueError: shapes differ, or a score is not finite.
    """
    targets, scores = _check(targets, scores)
    return np.array([_average_precision(t, s) for t, s in zip(targets.T, scores.T, strict=True)])


def mean_average_precision(targets, scores):
    """Mean of `average_precision` over the classes that have a positive clip (mAP).

    Args, Raises: as `average_precision`.

    Returns:
        float; nan when no class has a positive clip.
    """
    each = average_precision(targets, scores)
    present = ~np.isnan(each)
    return float(each[present].mean()) if present.any() else float("nan")


def roc_auc(targets, scores):
    """Area under the ROC curve of each class; ties count one half.

    Args, Raises: as `average_precision`.

    Returns:
        float64 (classes,); nan for a class without positive or without negative clips.
    """
    targets, scores = _check(targets, scores)
    return np.array([_roc_auc(t, s) for t, s in zip(targets.T, scores.T, strict=True)])


def accuracy(labels, scores):
    """Share of clips whose largest score is their label's.

    Args:
        labels: class index of each clip, int (clips,).
        scores: float (clips, classes); larger means more likely.

    Raises:
        ValueError: a score is not finite: the largest of NaN would be the first class.
    """
    _check_finite(np.asarray(scores))
    return float(np.mean(np.argmax(scores, -1) == np.asarray(labels)))


def standard_error(share, clips):
    """Standard error of a share of clips, by Agresti and Coull: 100 % has one too.

    Two hits and two misses are added to the clips before the usual formula.

    Args:
        share: share of the clips that are right, 0 to 1.
        clips: number of clips.
    """
    share = (share * clips + 2) / (clips + 4)
    return float(np.sqrt(share * (1 - share) / (clips + 4)))


def _check(targets, scores):
    targets, scores = np.asarray(targets) > 0, np.asarray(scores, "float64")
    if targets.shape != scores.shape or targets.ndim != 2:
        raise ValueError(
            f"targets have shape {targets.shape} and scores {scores.shape}; both must be "
            f"(clips, classes)."
        )
    _check_finite(scores)
    return targets, scores


def _check_finite(scores):
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum():,} scores are not finite.")


def _average_precision(target, score):
    if not target.any():
        return np.nan
    order = np.argsort(-score, kind="stable")
    target, score = target[order], score[order]
    step_ends = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # last of each tie
    hits = np.cumsum(target)[step_ends]
    precision = hits / (step_ends + 1)
    return float(np.sum(np.diff(hits, prepend=0) / hits[-1] * precision))


def _roc_auc(target, score):
    positives = int(target.sum())
    negatives = len(target) - positives
    if not positives or not negatives:
        return np.nan
    _, group, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # mean rank of each tie, from 1
    return float((rank[group][target].sum() / positives - (positives + 1) / 2) / negatives)
