"""Exact evaluation metrics on scores of whole data sets. NumPy only."""

import statistics

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
    return _mean(average_precision(targets, scores))


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


def top_k_accuracy(labels, scores, k):
    """Share of clips with a label among the `k` classes of the largest scores.

    Ties go to the first class, as in argmax: top-1 is `accuracy`.

    Args:
        labels: class index of each clip, int (clips,), or (clips, classes) of 0 and 1 where
            clips have several labels: any of them counts.
        scores: float (clips, classes); larger means more likely.
        k: number of classes.

    Raises:
        ValueError: a score is not finite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    _check_finite(scores)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    hits = np.take_along_axis(labels > 0, best, 1) if labels.ndim == 2 else best == labels[:, None]
    return float(np.mean(hits.any(1)))


def d_prime(auc):
    """How many standard deviations apart positive and negative scores are, if both are normal.

    It is sqrt(2) times the inverse normal distribution function of the area under the ROC curve.
    AST reports it of the mean area of the classes.

    Args:
        auc: area under the ROC curve, see `roc_auc`.

    Returns:
        float; infinite where the area is 0 or 1, nan where it is nan.
    """
    if not 0 < auc < 1:
        return {0: -np.inf, 1: np.inf}.get(auc, np.nan)
    return float(np.sqrt(2) * statistics.NormalDist().inv_cdf(auc))


def confusion_matrix(labels, scores):
    """How many clips of each class, a row, were taken for each class, a column.

    Args:
        labels: class index of each clip, int (clips,).
        scores: float (clips, classes); larger means more likely.

    Returns:
        int64 (classes, classes); the sum is the number of clips, that of the diagonal the number
        of right ones.

    Raises:
        ValueError: a score is not finite.
    """
    scores = np.asarray(scores)
    _check_finite(scores)
    counts = np.zeros((scores.shape[1],) * 2, "int64")
    np.add.at(counts, (np.asarray(labels), scores.argmax(1)), 1)
    return counts


def log_softmax(logits):
    """Logarithms of softmax scores, which rank clips as the scores do, without their rounding.

    Args:
        logits: float (clips, classes).

    Returns:
        float64 (clips, classes).
    """
    logits = np.asarray(logits, "float64")
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def standard_error(share, clips):
    """Standard error of a share of clips, by Agresti and Coull: 100 % has one too.

    Two hits and two misses are added to the clips before the usual formula.

    Args:
        share: share of the clips that are right, 0 to 1.
        clips: number of clips.
    """
    share = (share * clips + 2) / (clips + 4)
    return float(np.sqrt(share * (1 - share) / (clips + 4)))


def classification_report(classes, targets, scores):
    """Every metric of a data set, as numbers for JSON: None stands for nan and infinity.

    Args:
        classes: names of the classes.
        targets: class index of each clip, int (clips,), or (clips, classes) of 0 and 1 where
            clips have several labels.
        scores: float (clips, classes); larger means more likely, also between clips: scores, or
            what ranks as they do (`log_softmax`; logits where each label is scored on its own).

    Returns:
        {`top1`, `top5` (None for five classes or fewer), `mAP`, `auc` (the mean area under the
        ROC curve), `d_prime` (of that mean), `per_class`, `confusion`}: `per_class` a list of
        {`class`, `clips`, `accuracy`, `average_precision`, `roc_auc`}; `confusion` a list of
        rows, see `confusion_matrix`. Both accuracy and confusion are None where clips have
        several labels.
    """
    targets, count = np.asarray(targets), len(classes)
    each = targets if targets.ndim == 2 else np.eye(count, dtype=bool)[targets]
    precision, areas = average_precision(each, scores), roc_auc(each, scores)
    confusion, recall = None, [None] * count
    if targets.ndim == 1:
        confusion = confusion_matrix(targets, scores)
        with np.errstate(invalid="ignore"):
            recall = confusion.diagonal() / confusion.sum(1)
    columns = zip(classes, np.sum(each > 0, 0).tolist(), recall, precision, areas, strict=True)
    auc = _mean(areas)
    return {
        "top1": top_k_accuracy(targets, scores, 1),
        "top5": top_k_accuracy(targets, scores, 5) if count > 5 else None,
        "mAP": _number(_mean(precision)),
        "auc": _number(auc),
        "d_prime": _number(d_prime(auc)),
        "per_class": [
            {
                "class": name,
                "clips": clips,
                "accuracy": _number(right),
                "average_precision": _number(area),
                "roc_auc": _number(roc),
            }
            for name, clips, right, area, roc in columns
        ],
        "confusion": None if confusion is None else confusion.tolist(),
    }


def _mean(values):
    """Mean of the values that are not nan; nan where all are."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _number(value):
    """A float for JSON, which knows neither nan nor infinity."""
    return float(value) if value is not None and np.isfinite(value) else None


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
