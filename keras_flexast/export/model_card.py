"""The model card of exported artifacts, measured on themselves, and the choice within a budget."""

import datetime
import json
import math
import os
import pathlib
import platform
import time

import numpy as np
from rich.progress import Progress

from keras_flexast.evaluation import measure, share_text
from keras_flexast.figures import points_figure
from keras_flexast.files import atomic_write
from keras_flexast.inference.artifacts import load_artifact, scoring_artifacts
from keras_flexast.runs import described

BOUNDS = {"float16": 0.5, "dynamic": 0.5, "int8": 2.0}  # points below float32; more is reported
REASONS = {
    "float16": "the weights have 11 significant bits instead of 24",
    "dynamic": "the weights are rounded to 255 steps",
    "int8": "weights and inputs of dense layers are rounded to 255 steps, which the calibration "
    "clips set",
}
WARM_ROUNDS = 3


def latencies(artifacts, threads=(1, 2), *, rounds=20, seconds=10.0, progress=False):
    """Milliseconds that one clip takes: the median of warm calls, with all artifacts in turns.

    Args:
        artifacts: list of Artifact; each is run on noise.
        threads: list of numbers of threads. TensorFlow fixes its own before it starts, so a
            SavedModel is timed once, with as many threads as there are cores.
        rounds: number of timed calls of each artifact.
        seconds: length of the clip where an artifact takes any length.
        progress: whether to show a progress bar.

    Returns:
        list of {threads: milliseconds}, in the order of the artifacts.
    """
    timed = []
    for place, artifact in enumerate(artifacts):
        samples = artifact.samples or round(seconds * artifact.sample_rate)
        noise = np.random.default_rng(0).normal(0, 0.1, (1, samples)).astype("float32")
        if artifact.path.is_dir():
            timed.append((place, os.cpu_count(), artifact, noise))
            continue
        for count in threads:
            loaded = load_artifact(artifact.path, artifact.signature, count)
            timed.append((place, count, loaded, noise))
    taken = np.zeros((WARM_ROUNDS + rounds, len(timed)))
    with Progress(disable=not progress) as bar:
        for row in bar.track(taken, description="Timing"):
            for column, (_, _, artifact, noise) in enumerate(timed):
                start = time.perf_counter()
                artifact.run(noise, np.array([noise.shape[1]], "int32"))
                row[column] = time.perf_counter() - start
    medians = 1000 * np.median(taken[WARM_ROUNDS:], 0)
    results = [{} for _ in artifacts]
    for (place, count, _, _), median in zip(timed, medians, strict=True):
        results[place][str(count)] = round(float(median), 3)
    return results


def operating_points(paths, data, threads=(1, 2), progress=False):
    """Accuracy, latency and size of every signature of exported artifacts.

    Args:
        paths: list of the artifacts' paths.
        data: ScannedSource of the clips, such as the test split.
        threads: list of numbers of threads to time with.
        progress: whether to show progress bars.

    Returns:
        list of points for `write_card`. An artifact that takes any length is timed at the
        longest fixed length of the others, or at the median length of the clips.
    """
    artifacts = [one for path in paths for one in scoring_artifacts(path).values()]
    lengths = [one.samples / one.sample_rate for one in artifacts if one.samples]
    seconds = max(lengths, default=float(np.median(data.durations)))
    points = []
    for artifact in artifacts:
        result = measure(artifact, data, f"Testing {artifact.name}" if progress else None)
        points.append(
            {
                "name": artifact.name,
                "path": str(artifact.path.resolve()),
                "signature": artifact.signature,
                "format": "saved_model" if artifact.path.is_dir() else artifact.path.suffix[1:],
                "patch_size": artifact.patch_size,
                "precision": artifact.precision,
                **result,
                "seconds": round((artifact.samples or 0) / artifact.sample_rate or seconds, 3),
                "megabytes": round(artifact.size / 1e6, 3),
            }
        )
    times = latencies(artifacts, threads, seconds=seconds, progress=progress)
    return [{**point, "latency_ms": one} for point, one in zip(points, times, strict=True)]


def describe_run(run, name, frame_shift_ms=None):
    """What a card says of the model itself.

    Args:
        run: Run.
        name: name of the model.
        frame_shift_ms: frame shift of the export in milliseconds; None for that of training.

    Returns:
        dictionary for `write_card`.
    """
    return {
        "name": name,
        "classes": list(run.classes),
        "multi_label": run.multi_label,
        "parameters": run.model.count_params(),
        "pooling": run.model.pooling_name,
        "sample_rate": run.fbank.sample_rate,
        "mel_bins": run.fbank.mel_bins,
        "frame_shift_ms": run.front_end(frame_shift_ms)[0].frame_shift_ms,
        "window_ms": run.fbank.window_ms,
        "mean": run.fbank.mean,
        "std": run.fbank.std,
    }


def write_card(folder, points, run_info):
    """Write `card.json`, `points.png` and the model card `README.md`.

    Args:
        folder: folder of the three files; paths below it are written relative to it.
        points: list of points, from `operating_points` or from a card.
        run_info: dictionary of `describe_run`. More keys are kept; `data` (which clips) and
            `command` appear in the README.

    Returns:
        the card as a dictionary, the content of card.json:

        model        run_info
        points       list, one operating point each:
            name, path, signature, format    the artifact; path relative to the folder
            patch_size, precision            "16x24", "int8"; null if unknown
            metric, value, clips             "accuracy" or "mAP", 0 to 1, number of clips
            standard_error                   of the accuracy, 0 to 1; null for mAP
            loss_points                      100 x (value of float32 at this patch size - value);
                                             null for float32 and where there is no such point
            latency_ms                       {threads: milliseconds}, median, one clip
            seconds                          length of that clip
            megabytes                        size of the file, which its signatures share
        measured     date, cores, machine, python
    """
    folder = pathlib.Path(folder)
    points = [
        {**point, "path": _relative(point["path"], folder), "loss_points": _loss(point, points)}
        for point in points
    ]
    measured = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    card = {"model": dict(run_info), "points": points, "measured": measured}
    atomic_write(folder / "card.json", json.dumps(card, indent=2) + "\n")
    threads = thread_counts(points)[0]
    points_figure(points, folder / "points.png", title=run_info["name"], threads=threads)
    atomic_write(folder / "README.md", _readme(card))
    return card


def read_card(folder):
    """The card in a folder, as `write_card` returns it.

    Raises:
        FileNotFoundError: the folder has no card.json.
        ValueError: card.json is damaged or has no points.
    """
    path = pathlib.Path(folder, "card.json")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist. `flexast export RUN --data DATA` writes one."
        )
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        for point in card["points"]:
            point["name"], point["value"], point["megabytes"], point["latency_ms"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {described(error)}. Export again.") from error
    if not card["points"]:
        raise ValueError(f"{path} has no operating points. Export again.")
    return card


def thread_counts(points):
    """Numbers of threads with which points were timed, ascending."""
    return sorted({int(count) for point in points for count in point["latency_ms"]})


def choose_point(points, budget_ms=None, max_mb=None, threads=1):
    """The best operating point within a budget.

    Args:
        points: list of points of a card.
        budget_ms: largest number of milliseconds for one clip; None for any.
        max_mb: largest size in MB; None for any.
        threads: number of threads that classify the clip.

    Returns:
        (best, nearest): the most accurate point within the budget, the fastest of several, or
        None; and the point whose largest ratio to the budget is smallest.

    Raises:
        ValueError: no point was timed with that number of threads.
    """
    timed = [point for point in points if str(threads) in point["latency_ms"]]
    if not timed:
        counts = ", ".join(map(str, thread_counts(points)))
        raise ValueError(
            f"threads={threads}: no operating point was timed with it, only with {counts}."
        )

    def latency(point):
        return point["latency_ms"][str(threads)]

    def excess(point):
        size = point["megabytes"] / (max_mb or math.inf)
        return max(latency(point) / (budget_ms or math.inf), size)

    within = [point for point in timed if excess(point) <= 1]
    best = min(within, key=lambda point: (-point["value"], latency(point)), default=None)
    return best, min(timed, key=excess)


def _relative(path, folder):
    """A path below the folder, relative to it; any other path unchanged."""
    path, folder = pathlib.Path(path), folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _loss(point, points):
    """Points below float32 at the same patch size, of the same format where there is one."""
    references = [
        other["value"]
        for other in sorted(points, key=lambda other: other["format"] != point["format"])
        if other["precision"] == "float32" and other["patch_size"] == point["patch_size"]
    ]
    if not references or point["precision"] in (None, "float32"):
        return None
    return round(100 * (references[0] - point["value"]), 3)


def _readme(card):
    model, points, measured = card["model"], card["points"], card["measured"]
    metric, errors = points[0]["metric"], points[0]["standard_error"]
    labels = model["classes"]
    named = ", ".join(labels[:50]) + (f" and {len(labels) - 50} more" if len(labels) > 50 else "")
    several = "any number of labels for a clip" if model["multi_label"] else "one label for a clip"
    seconds = sorted({point["seconds"] for point in points})
    lengths = f"{seconds[0]:g}" if len(seconds) == 1 else f"{seconds[0]:g} to {seconds[-1]:g}"
    command = f" Command: `{model['command']}`." if model.get("command") else ""
    return "\n".join(
        [
            "---",
            "library_name: keras",
            "pipeline_tag: audio-classification",
            "---",
            "",
            f"# {model['name']}",
            "",
            f"Audio classifier with {several}: {model['parameters']:,} parameters, "
            f"{model['pooling']} pooling. Waveform in, scores out; the front end is inside.",
            "",
            f"**Labels** ({len(labels)}): {named}.",
            "",
            f"**Sound**: mono at {model['sample_rate']} Hz, float32 in [-1, 1]. Log-mel as in "
            f"Kaldi: {model['mel_bins']} bins, windows of {model['window_ms']:g} ms every "
            f"{model['frame_shift_ms']:g} ms; normalized by mean {model['mean']:.4f} and standard "
            f"deviation {model['std']:.4f}.",
            "",
            "## Operating points",
            "",
            *_table(points),
            "",
            "![accuracy against latency](points.png)",
            "",
            f"The {metric} is in percent{' ± one standard error' * bool(errors)}. *lost*: points "
            f"below float32 at the same patch size.",
            "",
            *_losses(points),
            "## How it was measured",
            "",
            f"Every artifact scored {points[0]['clips']} clips"
            f"{' of ' + model['data'] if model.get('data') else ''} in its own runtime. Times are "
            f"medians of warm calls on one clip of {lengths} s; all artifacts took turns in one "
            f"process. {measured['machine']}, {measured['cores']} cores, Python "
            f"{measured['python']}, {measured['date']}.{command}",
            "",
        ]
    )


def _table(points):
    """Lines of the Markdown table of operating points."""
    threads = thread_counts(points)
    times = [f"ms, {count} thread{'s' * (count > 1)}" for count in threads]
    header = ["artifact", "patch", "precision", points[0]["metric"], "lost", *times, "MB"]
    rows = [
        [
            f"`{point['name']}`",
            point["patch_size"] or "-",
            point["precision"] or "-",
            share_text(point),
            "-" if point["loss_points"] is None else f"{point['loss_points']:.1f}",
            *(_number(point["latency_ms"].get(str(count))) for count in threads),
            f"{point['megabytes']:.2f}",
        ]
        for point in points
    ]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _losses(points):
    """Lines about the artifacts that lost more than BOUNDS; none where all are float32."""
    quantized = [point for point in points if point["precision"] in BOUNDS]
    if not quantized:
        return []
    present = {point["precision"] for point in quantized}
    lines = [
        f"- `{point['name']}` lost {point['loss_points']:.1f} points, more than "
        f"{BOUNDS[point['precision']]:g}: {REASONS[point['precision']]}."
        for point in quantized
        if (point["loss_points"] or 0) > BOUNDS[point["precision"]]
    ]
    bounds = ", ".join(f"{BOUNDS[name]:g} points ({name})" for name in BOUNDS if name in present)
    return [*(lines or [f"No artifact lost more than {bounds}."]), ""]


def _number(value):
    return "-" if value is None else f"{value:.3g}"
