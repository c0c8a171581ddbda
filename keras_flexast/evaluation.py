"""Accuracy of runs and of exported artifacts on labeled clips, at any patch sizes."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

import tf_data_pipelines
from keras_flexast.inference.artifacts import (
    check_settled,
    file_scores,
    is_artifact,
    scoring_artifacts,
)
from keras_flexast.inference.cascade import (
    best_stages,
    best_threshold,
    cascade_costs,
    checked_stages,
    clip_operations,
    ended,
    means_so_far,
)
from keras_flexast.inference.scoring import PackedPredictor, packed_outputs
from keras_flexast.metrics import (
    accuracy,
    classification_report,
    log_softmax,
    mean_average_precision,
    standard_error,
)
from keras_flexast.runs import Run, configured_run, is_cut, warn_of_cuts
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.settings import (
    MAX_ROW_LENGTH,
    PATCH_SIZES,
    DataWarning,
    FbankSettings,
    patch_name,
)


def evaluate_run(
    run: Run | PathLike,
    data: "PathLike | tf_data_pipelines.ScannedSource",
    *,
    patch_sizes: Sequence[PatchSize] | None = None,
    split: str = "test",
    frame_shift_ms: float | None = None,
    resize: str | None = None,
    full_length: bool = False,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Accuracy (mAP where clips have several labels) of one set of weights at several patch sizes.

    An exported artifact is run by its own runtime: the number is what the exported file scores.

    Args:
        run: Run, folder of a run, or path of an exported artifact.
        data: folder or manifest as for training, or a ScannedSource. A clip that is too long for
            any row at one of the patch sizes loses its end there, with a warning.
        patch_sizes: ints or (frequency, time) pairs; None for PATCH_SIZES, or for all that an
            artifact has.
        split: "train", "validation", "test", or "all" for all clips.
        frame_shift_ms: frame shift in milliseconds, of a run; None for the filterbank's own.
        resize: "pi" or "bilinear", of a run; None for that of training.
        full_length: hear each clip at its full length, where a converted AST cuts or fills up.
        progress: show progress bars.

    Returns:
        list of dictionaries, one per patch size: `name` ("16", "16x24"), `metric` ("accuracy"
        or "mAP"), `value`, `standard_error` (None for mAP), `clips`, and what
        `metrics.classification_report` gives: `top1`, `top5`, `mAP`, `auc`, `d_prime`,
        `per_class` and `confusion`. Of a run also `patch_size` (frequency, time), `rows`, `tokens`,
        `fill` and `operations` of a clip on average; of an artifact `signature`.

    Raises:
        FileNotFoundError, ValueError: no run or artifact, no such data, split or patch size, or
            other classes than the model's.
    """
    from tf_data_pipelines.patches import check_patches
    from tf_data_pipelines.shards import damage_named
    from tf_data_pipelines.sources import read_data

    if not isinstance(run, Run) and is_artifact(run):
        check_settled(run, frame_shift_ms=frame_shift_ms, resize=resize, full_length=full_length)
        artifacts = scoring_artifacts(run, patch_sizes)
        first = artifacts[0]
        fbank = first.fbank or FbankSettings(sample_rate=first.sample_rate)
        data = read_data(
            data, fbank, classes=first.classes, split=split, shares=first.shares, progress=progress
        )
        return [_evaluate_artifact(artifact, data, progress) for artifact in artifacts]
    run = configured_run(run, resize=resize, full_length=full_length)
    sizes = PATCH_SIZES if patch_sizes is None else patch_sizes
    check_patches(
        run.patches_at(sizes, frame_shift_ms), run.fbank.mel_bins
    )  # before any file is read
    data = read_data(
        data, run.fbank, classes=run.classes, split=split, shares=run.shares, progress=progress
    )
    warn_of_cuts(run, sum(is_cut(run.fbank, one) for one in data.durations), len(data.durations))
    with damage_named(data):
        return evaluate_packed(run, data, sizes, frame_shift_ms=frame_shift_ms, progress=progress)


def evaluate_cascade(
    run: Run | PathLike,
    data: "PathLike | tf_data_pipelines.ScannedSource",
    patch_sizes: Sequence[PatchSize] | None = None,
    *,
    split: str = "test",
    frame_shift_ms: float | None = None,
    resize: str | None = None,
    full_length: bool = False,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Accuracy and cost of a cascade over patch sizes, beside its stages and their mean.

    The threshold is set on the validation clips: the cheapest at which the cascade is as accurate
    there as its best stage, see `inference.cascade.best_threshold`.

    Args:
        run: Run of clips of one label, or its folder.
        patch_sizes: ints or (frequency, time) pairs, each smaller than the one before; None finds
            two or three of the run's own, see `inference.cascade.best_stages`.
        split: "test" or "train".
        data, frame_shift_ms, resize, full_length, progress: as in `evaluate_run`. A clip that is
            too long for a stage is cut in that stage's own row; cascade and mean leave the stage
            out for it, unless it is the first.

    Returns:
        list of dictionaries like those of `evaluate_run`: one for each patch size, then one named
        "cascade", with its `threshold` and `reached`, the share of the clips that each
        stage hears, then one named "mean". Each has `operations`, those of a clip on average.

    Raises:
        FileNotFoundError, ValueError: as `evaluate_run`; several labels in a clip, or patch
            sizes that are no cascade.

    Example:
        *stages, cascade, mean = evaluate_cascade("run", "sounds", (48, 24, 8))
        classifier = load_cascade("run", (48, 24, 8), threshold=cascade["threshold"])
        *stages, cascade, mean = evaluate_cascade("run", "sounds")  # finds the sizes
    """
    from tf_data_pipelines.patches import check_patches
    from tf_data_pipelines.sources import read_data

    pairs = () if patch_sizes is None else checked_stages(patch_sizes)
    if split in ("validation", "all"):
        raise ValueError(
            f"split={split!r} has the validation clips, on which a cascade's threshold is set. "
            f"Choose 'test' or 'train'."
        )
    if not isinstance(run, Run) and is_artifact(run):
        raise ValueError(
            f"{run} is an exported artifact, and a cascade is evaluated with a run. Give the one "
            f"that it was exported from; its threshold holds for the artifact, too."
        )
    run = configured_run(run, resize=resize, full_length=full_length)
    if run.multi_label:
        raise ValueError(
            "a cascade needs clips of one label each, and this run has several. Evaluate each "
            "patch size alone (evaluate_run, or without --cascade); `flexast predict --cascade "
            "48,24,8 --mean` takes the mean of several."
        )
    pairs = pairs or _falling_sizes(run)
    check_patches(run.patches_at(pairs, frame_shift_ms), run.fbank.mel_bins)
    how: dict[str, Any] = {"frame_shift_ms": frame_shift_ms, "progress": progress}
    named: dict[str, Any] = {"classes": run.classes, "shares": run.shares, "progress": progress}
    data, held_out = (
        read_data(data, run.fbank, split=part, **named) for part in (split, "validation")
    )
    warn_of_cuts(run, sum(is_cut(run.fbank, one) for one in data.durations), len(data.durations))
    logs, heard, costs = _stage_scores(run, held_out, pairs, **how)
    scores = np.exp(logs)
    some: dict[str, Any] = {"targets": held_out.source.targets(), "costs": costs}
    if patch_sizes is None:
        areas = [math.prod(pair) for pair in pairs]
        stages = best_stages(scores, heard, **some, areas=areas, progress=progress)
        pairs = tuple(pairs[stage] for stage in stages)
        scores, heard, some["costs"] = scores[stages], heard[stages], costs[stages]
        heard[0] = True
    threshold = best_threshold(scores, heard, **some)
    for part, what in ((held_out, "validation clips"), (data, "clips")):
        tokens = _clip_tokens(run, part, pairs, frame_shift_ms=frame_shift_ms)
        _warn_of_stages(tokens, pairs, what)
    logs, heard, costs = _stage_scores(run, data, pairs, **how)
    scores = np.exp(logs)
    ends, stage, reached = ended(scores, heard, threshold)
    results = [
        {"name": patch_name(pair), **report_clips(data.source, one), "operations": cost.mean()}
        for pair, one, cost in zip(pairs, logs, costs, strict=True)
    ]
    cascade = {
        "operations": cascade_costs(costs, heard, stage).mean(),
        "threshold": threshold,
        "reached": reached,
    }
    mean = {"operations": (costs * heard).sum(0).mean()}
    results.append({"name": "cascade", **report_clips(data.source, ends), **cascade})
    means = means_so_far(scores, heard)[-1]
    return [*results, {"name": "mean", **report_clips(data.source, means), **mean}]


def _falling_sizes(run):
    """The patch sizes of a run's training, from large to small."""
    pairs = sorted(run.patches.patch_sizes, key=lambda pair: (-math.prod(pair), pair))
    if math.prod(pairs[0]) == math.prod(pairs[-1]):
        raise ValueError(
            f"no cascade can be found: the run was trained at patches of one area, "
            f"{', '.join(map(patch_name, pairs))}. Name others, such as 48,24,8."
        )
    return tuple(pairs)


def _stage_scores(run, data, pairs, *, frame_shift_ms, progress):
    """Log scores (stages, clips, classes), whom each stage hears (stages, clips), its operations.

    A clip that is too long for a stage is cut in its scores, but no cascade asks for them: only
    the first stage cuts, as there is no other.
    """
    from tf_data_pipelines.shards import damage_named

    shift = {"frame_shift_ms": frame_shift_ms}
    tokens = _clip_tokens(run, data, pairs, **shift)
    with damage_named(data):
        found = _packed_scores(run, data, pairs, tokens, progress=progress, **shift)
    heard = tokens <= MAX_ROW_LENGTH
    heard[0] = True
    costs = clip_operations(run.model, np.minimum(tokens, MAX_ROW_LENGTH))
    return np.array([found[pair][0] for pair in pairs]), heard, costs


def measure(artifact, data, description=None):
    """What an artifact itself scores on clips, decoded from their files.

    Args:
        artifact: Artifact.
        data: ScannedSource of the clips; its classes are the artifact's.
        description: text beside a progress bar; None shows no bar.

    Returns:
        {`metric`: "accuracy" or "mAP", `value`, `standard_error` (None for mAP), `clips`}.

    Raises:
        ValueError: other classes, or a clip that the artifact refuses.
    """
    return score_clips(data.source, artifact_scores(artifact, data, description))


def artifact_scores(artifact, data, description=None):
    """Scores of the clips by an artifact, float32 (clips, classes); see `measure`."""
    source = data.source
    if data.most_seconds is not None:
        raise ValueError("an artifact hears whole files; shortened clips are for runs.")
    if source.classes != artifact.classes:
        raise ValueError(
            f"the data has the classes {', '.join(source.classes)}, {artifact.path} the labels "
            f"{', '.join(artifact.classes)}. Load the data with classes=artifact.classes."
        )
    found = file_scores(artifact, source.clips, description)
    if found.rejected:
        raise ValueError(
            f"{artifact.path} ({artifact.signature}) cannot score {len(found.rejected)} of "
            f"{len(source)} clips: {found.rejected[0][1]}"
        )
    return found.scores


def score_clips(source, outputs):
    """Accuracy, or mAP, of the outputs of clips.

    Args:
        source: Source of the clips.
        outputs: float (clips, classes), logits or scores.

    Returns:
        {`metric`: "accuracy", or "mAP" for multi-label clips, `value` in [0, 1],
        `standard_error` (None for mAP), `clips`}.
    """
    clips = len(source)
    if source.multi_label:
        value = mean_average_precision(source.targets(), outputs)
        return {"metric": "mAP", "value": value, "standard_error": None, "clips": clips}
    value = accuracy(source.targets(), outputs)
    error = standard_error(value, clips)
    return {"metric": "accuracy", "value": value, "standard_error": error, "clips": clips}


def report_clips(source, scores):
    """`score_clips` and, beside it, every metric and those of each class.

    Args:
        source: Source of the clips.
        scores: float (clips, classes), which rank as scores do, see `classification_report`.

    Returns:
        dictionary for JSON, with the keys of `score_clips` and of `classification_report`.
    """
    report = classification_report(source.classes, source.targets(), scores)
    return {**score_clips(source, scores), **report}


def spread(data, count):
    """The ScannedSource of at most `count` of its clips, spread over all of them."""
    every = max(1, -(-len(data.source) // count))
    source = dataclasses.replace(data.source, clips=data.source.clips[::every])
    return dataclasses.replace(data, source=source, durations=data.durations[::every])


def share_text(result):
    """ "97.0 ± 0.7": the value of a result in percent, with its standard error if it has one."""
    error = result.get("standard_error")
    return f"{100 * result['value']:.1f}" + (f" ± {100 * error:.1f}" if error else "")


def _evaluate_artifact(artifact, data, progress):
    name = artifact.patch_size or artifact.signature
    scores = artifact_scores(artifact, data, f"Evaluating {name}" if progress else None)
    return {"name": name, "signature": artifact.signature, **report_clips(data.source, scores)}


def evaluate_packed(
    run, data, patch_sizes, *, progress=False, predictor=None, about="", **resolution
):
    """Results of a run at each patch size, see `evaluate_run`, on a ScannedSource.

    Args:
        run: Run.
        data: ScannedSource of the run's classes.
        patch_sizes: ints or (frequency, time) pairs.
        progress: show progress bars.
        predictor: PackedPredictor of the run's model, which keeps what it compiled; None for a
            new one.
        about: text beside the progress bars, after the patch size.
        **resolution: frame_shift_ms or pool_frames, see `Run.patches_at`.
    """
    how = {"progress": progress, "predictor": predictor, "about": about}
    pairs = run.patches_at(patch_sizes, **resolution).patch_sizes
    tokens = _clip_tokens(run, data, pairs, **resolution)
    _warn_of_overlong(tokens, pairs, "Larger patch_sizes (--patch-sizes) hear all of them.")
    found = _packed_scores(run, data, pairs, tokens, **how, **resolution)
    return [
        {
            "name": patch_name(pair),
            "patch_size": pair,
            **report_clips(data.source, scores),
            **counts,
        }
        for pair, (scores, counts) in found.items()
    ]


def _packed_scores(
    run, data, pairs, tokens, *, progress=False, predictor=None, about="", **resolution
):
    """{patch size: (outputs that rank as scores do, float (clips, classes), counts)} of a run.

    Clips of one label have log softmax, others logits; counts are those of `packed_outputs`.
    However many patch sizes, the batches have at most two shapes, so that the model compiles
    at most twice: rows of the run's own length, and longer rows for the sizes whose clips do
    not all fit them. A clip that no row holds is cut there.
    """
    from tf_data_pipelines.lengths import packing_for
    from tf_data_pipelines.pipeline import evaluation_batches

    fits = dict(zip(pairs, tokens.max(1) <= run.packing.row_length, strict=True))
    predictor, found = predictor or PackedPredictor(run.model), {}
    for group in (True, False):
        chosen = [pair for pair in pairs if fits[pair] == group]
        if not chosen:
            continue
        together = run.patches_at(chosen, **resolution)
        packing = packing_for(data, run.fbank, together, run.packing, crop=True)
        for pair in chosen:
            patches = run.patches_at([pair], **resolution)
            logits, counts = packed_outputs(
                predictor,
                evaluation_batches(data, run.fbank, patches=patches, packing=packing),
                len(data.source),
                f"Evaluating at patch {patch_name(pair)}{about}" if progress else None,
            )
            costs = clip_operations(
                run.model, np.minimum(tokens[pairs.index(pair)], MAX_ROW_LENGTH)
            )
            counts = {**counts, "operations": float(costs.mean())}
            found[pair] = (logits if run.multi_label else log_softmax(logits)), counts
    return {pair: found[pair] for pair in pairs}


def _clip_tokens(run, data, pairs, **resolution):
    """Tokens of each clip, int (patch sizes, clips)."""
    from tf_data_pipelines.lengths import clip_tokens

    return clip_tokens(data, run.fbank, run.patches_at(pairs, **resolution))


def _warn_of_overlong(tokens, pairs, way_out, what="clips"):
    """Warn where clips, int (patch sizes, clips) tokens, are longer than any row."""
    cut = tokens > MAX_ROW_LENGTH
    if cut.any():
        listed = ", ".join(
            f"{count} at patch {patch_name(pair)}"
            for pair, count in zip(pairs, cut.sum(1), strict=True)
            if count
        )
        warnings.warn(
            f"{cut.any(0).sum()} of {tokens.shape[1]} {what} have more than {MAX_ROW_LENGTH:,} "
            f"tokens and lose their end: {listed}. {way_out}",
            DataWarning,
            stacklevel=4,
        )


def _warn_of_stages(tokens, pairs, what):
    """Warn where the first stage of a cascade cuts clips, and where others do not hear them."""
    _warn_of_overlong(tokens[:1], pairs[:1], "A larger first patch size hears all of them.", what)
    for pair, too_long in zip(pairs[1:], tokens[1:] > MAX_ROW_LENGTH, strict=True):
        if too_long.any():
            warnings.warn(
                f"{too_long.sum()} of {too_long.size} {what} are too long for patch "
                f"{patch_name(pair)}: alone it cuts them; cascade and mean leave it out for them, "
                f"and so may cost less.",
                DataWarning,
                stacklevel=3,
            )
