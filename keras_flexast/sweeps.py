"""One set of weights at many patch sizes, clip lengths, frame shifts or factors of pooling."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_flexast.evaluation import evaluate_packed
from keras_flexast.inference.artifacts import is_artifact
from keras_flexast.inference.scoring import PackedPredictor
from keras_flexast.runs import Run, as_run, is_cut, name_of, warn_of_cuts
from keras_flexast.settings import BETWEEN_SIZES, SWEEPS
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.settings import (
    MAX_POOL_FRAMES,
    PATCH_SIZES,
    check_between,
    check_choice,
    check_positive,
    patch_pair,
)

if TYPE_CHECKING:
    import tf_data_pipelines

SHIFTS = (1, 1.5, 2, 2.5, 3, 3.5, 4)  # of the run's frame shift, as ElasticAST
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the longest clip
SHORTEST = 0.1  # seconds
RESOLUTIONS = {"frame-shift": "frame_shift_ms", "pooling": "pool_frames"}  # see Run.patches_at
POOLED = tuple(range(1, MAX_POOL_FRAMES + 1))  # frames


def evaluate_sweep(
    run: Run | PathLike,
    data: "PathLike | tf_data_pipelines.ScannedSource",
    sweep: str,
    *,
    points: Sequence[Any] | None = None,
    patch_size: PatchSize | None = None,
    split: str = "test",
    name: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Accuracy (mAP where clips have several labels) of one set of weights along one axis.

    Args:
        run: Run of any kind, or its folder. One that hears clips of one fixed length (see
            FbankSettings.clip_ms) cuts and fills up what it hears here, too.
        data: folder or manifest as for training, or a ScannedSource.
        sweep: "patch-size"; "length": every clip is cut after so many seconds; "frame-shift":
            milliseconds; or "pooling": so many neighboring frames are pooled to one, see
            PatchSettings.
        points: values along the axis; None for usual ones.
        patch_size: patch size of all sweeps but that of patch sizes, an int or (frequency, time);
            None for the base patch of the run.
        split: "train", "validation", "test", or "all" for all clips.
        name: name in a report, where runs of one name and other seeds are one row; None for that
            of the folder.
        progress: show progress bars.

    Returns:
        dictionary for JSON, as `flexast report` reads it: `name`, `data`, `seed` of
        the training (None where no one knows it), and `sweeps`: {sweep: list of dictionaries,
        one for each point}. Each has its `point`, and what `evaluate_run` gives.

    Raises:
        FileNotFoundError, ValueError: as `evaluate_run`; no such sweep or point.

    Example:
        evaluate_sweep("run", "sounds", "length", points=(0.5, 1, 2))
    """
    from tf_data_pipelines.patches import check_patches
    from tf_data_pipelines.shards import damage_named
    from tf_data_pipelines.sources import read_data

    check_choice("sweep", sweep, SWEEPS)
    if not isinstance(run, Run) and is_artifact(run):
        raise ValueError(
            f"{run} is an exported artifact, and a sweep is evaluated with a run. Give the one "
            f"that it was exported from."
        )
    names = {"name": name or name_of(run), "data": name_of(data)}
    run = as_run(run)
    if sweep == "patch-size" and patch_size is not None:
        raise ValueError(f"patch_size={patch_size!r} belongs to other sweeps; give points.")
    size = run.patches.base_patch if patch_size is None else patch_size
    points = _usual_points(run, sweep) if points is None else _checked(sweep, points)
    data = read_data(
        data, run.fbank, classes=run.classes, split=split, shares=run.shares, progress=progress
    )
    if points is None:  # of lengths
        points = [round(float(share * max(data.durations)), 2) for share in SHARES]
        points = [one for one in points if one >= SHORTEST]
        if not points:
            raise ValueError(f"no clip is {SHORTEST} s long; choose another sweep, or give points.")
    if sweep != "length":
        warn_of_cuts(run, sum(is_cut(run.fbank, s) for s in data.durations), len(data.durations))
    resolution = RESOLUTIONS.get(sweep)
    places = [
        (point if sweep == "patch-size" else size, {resolution: point} if resolution else {})
        for point in points
    ]
    for one, how in places:  # before anything is computed
        check_patches(run.patches_at([one], **how), run.fbank.mel_bins)
    found, predictor = [], PackedPredictor(run.model)
    for point, (one, how) in zip(points, places, strict=True):
        clips = data.shortened(point) if sweep == "length" else data
        with damage_named(clips):
            (result,) = evaluate_packed(
                run, clips, [one], progress=progress, predictor=predictor, **how,
                about="" if sweep == "patch-size" else f", {sweep} {point:g}",
            )  # fmt: skip
        found.append({"point": result["name"] if sweep == "patch-size" else point, **result})
    return {**names, "seed": run.seed, "sweeps": {sweep: found}}


def _usual_points(run, sweep):
    """Points of a sweep that nobody chose; None for lengths, which depend on the clips."""
    if sweep == "patch-size":
        return sorted({*PATCH_SIZES, *BETWEEN_SIZES})
    if sweep == "frame-shift":
        return [float(np.round(one * run.fbank.frame_shift_ms, 3)) for one in SHIFTS]
    return [*POOLED] if sweep == "pooling" else None


def _checked(sweep, points):
    """The points of a sweep as a list, without any twice; a ValueError unless they can be."""
    points = [one.item() if isinstance(one, np.generic) else one for one in points]
    if sweep == "pooling":
        points = [int(one) if one in POOLED else one for one in points]  # 2.0 is 2
    for one in points:
        if sweep == "length":
            check_between("points", one, SHORTEST, np.inf)
        elif sweep == "pooling":
            check_between("points", one, 1, MAX_POOL_FRAMES, kind=int)
        elif sweep == "frame-shift":
            check_positive("points", one)
    values = [patch_pair(one) if sweep == "patch-size" else one for one in points]
    if not points or len(set(values)) < len(values):
        raise ValueError(f"points={points} must be one or more different values.")
    return points
