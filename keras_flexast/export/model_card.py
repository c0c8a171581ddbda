"""The model card of exported artifacts, measured on themselves, and the choice within a budget."""

import datetime
import json
import math
import os
import pathlib
import platform
import re
import shlex
import time

import numpy as np
from rich.progress import Progress

from keras_flexast.evaluation import artifact_scores, evaluate_run, score_clips, share_text
from keras_flexast.export.backgrounds import BACKGROUNDS, BufferedClips
from keras_flexast.figures import patch_order, points_figure
from keras_flexast.files import EXPORT
from keras_flexast.inference.artifacts import load_artifact, scoring_artifacts
from keras_flexast.inference.cascade import best_stages, best_threshold, ended
from keras_flexast.inference.classifier import load_classifier
from keras_flexast.report import is_sealed, markdown_text, seal
from keras_flexast.runs import described, heard_seconds
from keras_flexast.settings import FORMATS
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.settings import check_between, check_choice, check_positive

CARD = EXPORT.others  # the text comes first
BOUNDS = {"float32": 0.5, "float16": 0.5, "dynamic": 0.5, "int8": 2.0}  # points; more is explained
REASONS = {
    "float32": "it is not told the length of a clip, and hears what follows it",
    "float16": "the weights have 11 significant bits instead of 24",
    "dynamic": "the weights are rounded to 255 steps",
    "int8": "weights and inputs of dense layers are rounded to 255 steps, which the calibration "
    "clips set",
}
KINDS = {"saved_model": "serving", "tflite": "mobile", "onnx": "onnx"}  # of FORMATS, in a card
WARM_ROUNDS = 3
POINT = {  # what is read again of an operating point
    "name": str, "path": str, "format": str, "signature": str | None, "patch_size": str | None,
    "precision": str | None, "metric": str, "value": float | int,
    "standard_error": float | int | None, "latency_ms": dict, "megabytes": float | int,
}  # fmt: skip

CASCADE = {"threshold": float | int, "reached": list, "most_ms": dict}


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


def operating_points(
    paths, data, threads=(1, 2), *, held_out=None, run=None, frame_shift_ms=None, progress=False
):
    """Accuracy, latency and size of every signature of exported artifacts, and of cascades.

    Args:
        paths: list of the artifacts' paths.
        data: ScannedSource of the clips, such as the test split.
        threads: list of numbers of threads to time with.
        held_out: ScannedSource of validation clips, on which the thresholds of cascades over the
            patch sizes of one artifact are set; None for no cascades.
        run: Run that was exported, measured on the same clips; None for no comparison.
        frame_shift_ms: frame shift of the export in milliseconds; None for the filterbank's own.
        progress: whether to show progress bars.

    Returns:
        list of points for `write_card`; those of the run come last, one for each patch size.
        What takes any length is timed at the longest fixed length of the others, or at the
        median length of the clips, but at no more than the longest clip.
    """
    artifacts = [one for path in paths for one in scoring_artifacts(path)]
    lengths = [one.samples / one.sample_rate for one in artifacts if one.samples]
    seconds = max(lengths, default=float(np.median(data.durations)))
    any_length = min(seconds, float(max(data.durations)))  # which nothing refuses
    buffered = BufferedClips(data, seconds)
    points, scores = [], []
    for artifact in artifacts:
        description = f"Testing {artifact.name}" if progress else None
        scores.append(artifact_scores(artifact, data, description))
        result = score_clips(data.source, scores[-1])
        points.append(
            {
                "name": artifact.name,
                "path": str(artifact.path.resolve()),
                "signature": artifact.signature,
                "format": "saved_model" if artifact.path.is_dir() else artifact.path.suffix[1:],
                "patch_size": artifact.patch_size,
                "precision": artifact.precision,
                "takes_length": artifact.takes_length,
                **result,
                "backgrounds": buffered.measure(artifact.scores, artifact.sample_rate),
                "seconds": round((artifact.samples or 0) / artifact.sample_rate or any_length, 3),
                "megabytes": round(artifact.size / 1e6, 3),
            }
        )
    times = latencies(artifacts, threads, seconds=any_length, progress=progress)
    points = [{**point, "latency_ms": one} for point, one in zip(points, times, strict=True)]
    if held_out is not None and not (held_out.source.multi_label or artifacts[0].multi_label):
        points += _cascade_points(
            artifacts, points, scores, data=data, held_out=held_out, progress=progress
        )
    if run is None:
        return points
    sizes = list(dict.fromkeys(one.patch_size for one in artifacts if one.patch_size))
    options = {"buffered": buffered, "frame_shift_ms": frame_shift_ms, "progress": progress}
    return [*points, *_run_points(run, data, sizes, **options)]


def _cascade_points(artifacts, points, scores, *, data, held_out, progress):
    """Points of the cascades over the patch sizes of artifacts that have several.

    The stages are found on the validation clips, see `best_stages`, by the time with the first
    number of threads; of sizes of one area the first is tried. A clip's time is that of the stages
    that hear it, on average.
    """
    found = []
    for path in dict.fromkeys(one.path for one in artifacts):
        by_area: dict = {}
        for place, one in enumerate(artifacts):
            if one.path == path and one.patch_size:
                by_area.setdefault(patch_order(one.patch_size)[0], place)
        areas = sorted(by_area, reverse=True)
        if len(areas) < 2:
            continue
        places = [by_area[area] for area in areas]
        validated = np.stack([
            artifact_scores(artifacts[place], held_out,
                            f"Validating {artifacts[place].name}" if progress else None)
            for place in places
        ])  # fmt: skip
        heard = np.ones(validated.shape[:2], bool)
        costs = heard * [[next(iter(points[place]["latency_ms"].values()))] for place in places]
        targets = held_out.source.targets()
        chosen = best_stages(
            validated, heard, targets=targets, costs=costs, areas=areas, progress=progress
        )
        threshold = best_threshold(
            validated[chosen], heard[chosen], targets=targets, costs=costs[chosen]
        )
        places = [places[stage] for stage in chosen]
        stages, first = [points[place] for place in places], artifacts[places[0]]
        times = {
            count: np.array([one["latency_ms"][count] for one in stages])
            for count in stages[0]["latency_ms"]
        }
        heard = np.ones((len(places), len(data.source)), bool)
        ends, _, reached = ended(np.stack([scores[place] for place in places]), heard, threshold)
        sizes = ",".join(one["patch_size"] for one in stages)
        found.append(
            {
                **stages[0],
                "name": f"{first.name.removesuffix(' ' + first.signature)} cascade {sizes}",
                "signature": None,
                "patch_size": sizes,
                **score_clips(data.source, ends),
                "backgrounds": None,
                "latency_ms": {
                    count: round(float(one @ reached), 3) for count, one in times.items()
                },
                "cascade": {
                    "threshold": threshold,
                    "reached": reached,
                    "most_ms": {count: round(float(one.sum()), 3) for count, one in times.items()},
                },
            }
        )
    return found


def _run_points(run, data, sizes, *, buffered, frame_shift_ms, progress):
    """Points of the run itself at patch sizes with these names."""
    pairs = [tuple(map(int, name.split("x"))) for name in sizes]
    pairs = [pair * 2 if len(pair) == 1 else pair for pair in pairs]
    results = evaluate_run(
        run, data, patch_sizes=pairs, frame_shift_ms=frame_shift_ms, progress=progress
    )
    points = []
    for pair, result in zip(pairs, results, strict=True):
        classifier = load_classifier(run, pair, frame_shift_ms=frame_shift_ms)
        points.append(
            {
                "name": "the run itself",
                "format": "run",
                "patch_size": result["name"],
                "precision": "float32",
                **{name: result[name] for name in ("metric", "value", "standard_error", "clips")},
                "backgrounds": buffered.measure(classifier.predict, classifier.sample_rate),
            }
        )
    return points


def describe_run(run, name, frame_shift_ms=None):
    """What a card says of the model itself.

    Args:
        run: Run.
        name: name of the model.
        frame_shift_ms: frame shift of the export in milliseconds; None for the filterbank's own.

    Returns:
        dictionary for `write_card`.
    """
    fbank = run.front_end(frame_shift_ms)[0]
    return {
        "name": name,
        "classes": list(run.classes),
        "multi_label": run.multi_label,
        "parameters": run.model.count_params(),
        "pooling": run.model.pooling_name,
        "sample_rate": run.fbank.sample_rate,
        "mel_bins": run.fbank.mel_bins,
        "frame_shift_ms": fbank.frame_shift_ms,
        "window_ms": run.fbank.window_ms,
        "heard_seconds": heard_seconds(fbank),
        "mean": run.fbank.mean,
        "std": run.fbank.std,
    }


def write_card(folder, points, run_info):
    """Write `card.json`, `points.png` and the model card `README.md`.

    Args:
        folder: folder of the three files; paths below it are written relative to it.
        points: list of points, from `operating_points` or from a card. Those of the run
            itself are what the others are compared with.
        run_info: dictionary of `describe_run`. More keys are kept; `data` (which clips),
            `command` and `default_patch_size` (of the server) appear in the README.

    Returns:
        the card as a dictionary, the content of card.json:

        model        run_info
        run          list, the run itself at each patch size; the keys of points that apply
        points       list, one operating point each:
            name, path, signature, format    the artifact; path relative to the folder; no
                                             signature of a cascade
            patch_size, precision            "16x24", "int8"; null if unknown; "48,24,8" of a
                                             cascade
            cascade                          its threshold; reached, the share of the clips that
                                             each stage hears; and most_ms {threads: milliseconds}
                                             of a clip that all of them hear
            metric, value, clips             "accuracy" or "mAP", 0 to 1, number of clips
            standard_error                   of the accuracy, 0 to 1; null for mAP
            takes_length                     whether it hears the clip alone, whatever follows it
            loss_points                      100 x (the run's value at this patch size - value),
                                             clips of their own lengths; null without the run
            backgrounds                      {"clips": some of them, "alone": value at their own
                                             lengths, "silence", ...: value in a full buffer}
            background_loss_points           {"silence", ...: points below the run's "alone"}
            latency_ms                       {threads: milliseconds}, median, one clip
            seconds                          length of that clip
            megabytes                        size of the file, which its signatures share
        measured     date, cores, machine, python
    """
    folder = pathlib.Path(folder)
    reference = {point["patch_size"]: point for point in points if point["format"] == "run"}
    points = [{**point, **_losses_of(point, reference)} for point in points]
    own = [point for point in points if point["format"] == "run"]
    points = [
        {**point, "path": _relative(point["path"], folder)}
        for point in points
        if point["format"] != "run"
    ]
    measured = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    card = {"model": dict(run_info), "run": own, "points": points, "measured": measured}
    atomic_write(folder / "card.json", json.dumps(card, indent=2) + "\n")
    threads = thread_counts(points)[0]
    timed = timed_points(points, threads)
    points_figure(timed, folder / "points.png", title=run_info["name"], threads=threads)
    text = _readme(card)
    others = [folder / name for name in CARD[1:]]
    atomic_write(folder / "README.md", text + seal(text, others))
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
        _check_kinds({"name": str}, card["model"])
        for point in card["points"]:
            _check_kinds(POINT, point)
            check_choice("format", point["format"], tuple(KINDS))
            check_between("value", point["value"], 0, 1)
            if not point["path"] or not point["latency_ms"]:
                raise ValueError(f"{point['name']} has no path or no time")
            for threads, milliseconds in point["latency_ms"].items():
                check_positive("threads", int(threads))
                check_positive("latency_ms", milliseconds)
            if point.get("cascade") is not None:
                _check_kinds(CASCADE, point["cascade"])
                check_between("threshold", point["cascade"]["threshold"], 0, 1)
                for count in point["latency_ms"]:
                    check_positive("most_ms", point["cascade"]["most_ms"][count])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {described(error)}. Export again.") from error
    if not card["points"]:
        raise ValueError(f"{path} has no operating points. Export again.")
    return card


def is_own_card(folder):
    """Whether the files of a model card in a folder are as `write_card` wrote them."""
    text, *others = (pathlib.Path(folder, name) for name in CARD)
    if any(path.is_symlink() or not path.is_file() for path in (text, *others)):
        return False
    return bool(is_sealed(text, others))


def _check_kinds(kinds, values):
    """Raise a KeyError or TypeError unless a dictionary has these keys with values of the kinds."""
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name} is {values[name]!r}")


def thread_counts(points):
    """Numbers of threads with which points were timed, ascending."""
    return sorted({int(count) for point in points for count in point["latency_ms"]})


def in_formats(points, formats):
    """The points of a card with one of these formats, which have the names of FORMATS.

    Raises:
        ValueError: a format is unknown, or there is no such point.
    """
    for name in formats:
        check_choice("formats", name, FORMATS)
    found = [point for point in points if _format(point) in formats]
    if not found:
        raise ValueError(f"formats: the card has no operating point of {', '.join(formats)}.")
    return found


def _format(point):
    """Which of FORMATS a point is: its folder says it, or what kind of file it is."""
    folder = pathlib.PurePath(point["path"]).parts[0]
    return folder if folder in FORMATS else KINDS[point["format"]]


def timed_points(points, threads=1):
    """The points that were timed with a number of threads.

    A server takes all cores of a machine, and was timed so only: it counts with that time.

    Args:
        points: list of points of a card.
        threads: number of threads.

    Returns:
        list of the points, each with its time in milliseconds as `ms`; a cascade also with that
        of a clip that all stages hear as `most_ms`.

    Raises:
        ValueError: no point was timed with that number of threads.
    """
    timed, key = [], str(threads)
    for point in points:
        times, served = point["latency_ms"], point["format"] == "saved_model"
        if key in times or served:
            count = key if key in times else min(times, key=times.get)
            timed.append({**point, "ms": times[count]})
            if point.get("cascade"):
                timed[-1]["most_ms"] = point["cascade"]["most_ms"][count]
    if len(timed) < len(points):
        counts = ", ".join(map(str, thread_counts(points)))
        raise ValueError(
            f"threads={threads}: no operating point was timed with it, only with {counts}."
        )
    return timed


def choose_point(points, budget_ms=None, max_mb=None, threads=1):
    """The best operating point within a budget.

    Args:
        points: list of points of a card.
        budget_ms: largest number of milliseconds for one clip; None for any.
        max_mb: largest size in MB; None for any.
        threads: number of threads that classify the clip.

    Returns:
        (best, nearest), points of `timed_points`: the most accurate point within the budget,
        the fastest of several, or None; and the point whose largest ratio to the budget is
        smallest.

    Raises:
        ValueError: no point was timed with that number of threads, or a limit is no positive
            number.
    """
    for name, limit in (("budget_ms", budget_ms), ("max_mb", max_mb)):
        if limit is not None:
            check_positive(name, limit)
    points = timed_points(points, threads)

    def excess(point):
        size = point["megabytes"] / (max_mb or math.inf)
        return max(point["ms"] / (budget_ms or math.inf), size)

    within = [point for point in points if excess(point) <= 1]
    best = min(within, key=lambda point: (-point["value"], point["ms"]), default=None)
    return best, min(points, key=excess)


def _relative(path, folder):
    """A path below the folder, relative to it; any other path unchanged."""
    path, folder = pathlib.Path(path), folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _losses_of(point, reference):
    """How far a point lies below the run, {patch size: point}: `loss_points` and in backgrounds."""
    run, heard = reference.get(point["patch_size"]), point.get("backgrounds")
    if run is None:
        return {name: point.get(name) for name in ("loss_points", "background_loss_points")}
    losses = None
    if heard and run.get("backgrounds"):
        alone = run["backgrounds"]["alone"]
        losses = {
            name: None if heard[name] is None else round(100 * (alone - heard[name]), 3)
            for name in (one.name for one in BACKGROUNDS)
        }
    loss = round(100 * (run["value"] - point["value"]), 3)
    return {"loss_points": loss, "background_loss_points": losses}


def _readme(card):
    model, points, measured = card["model"], card["points"], card["measured"]
    metric, errors = points[0]["metric"], points[0]["standard_error"]
    labels = model["classes"]
    comma = "; " if any("," in label for label in labels) else ", "
    named = comma.join(map(markdown_text, labels[:50])) + (
        f" and {len(labels) - 50} more" if len(labels) > 50 else ""
    )
    several = "any number of labels for a clip" if model["multi_label"] else "one label for a clip"
    seconds = sorted({point["seconds"] for point in points})
    lengths = f"{seconds[0]:g}" if len(seconds) == 1 else f"{seconds[0]:g} to {seconds[-1]:g}"
    command = f" Command: {_code(model['command'])}." if model.get("command") else ""
    return "\n".join(
        [
            "---",
            "library_name: keras",
            "pipeline_tag: audio-classification",
            "---",
            "",
            f"# {markdown_text(model['name'])}",
            "",
            f"Audio classifier with {several}: {model['parameters']:,} parameters, "
            f"{model['pooling']} pooling. Waveform in, scores out; the front end is inside.",
            "",
            f"**Labels** ({len(labels)}): {named}.",
            "",
            f"**Sound**: mono at {model['sample_rate']} Hz, float32 in [-1, 1]. Log-mel as in "
            f"Kaldi: {model['mel_bins']} bins, windows of {model['window_ms']:g} ms every "
            f"{model['frame_shift_ms']:g} ms; normalized by mean {model['mean']:.4f} and standard "
            f"deviation {model['std']:.4f}.{_heard(model)}",
            "",
            *_server(model.get("default_patch_size")),
            "## Operating points",
            "",
            *_table([*card["run"], *points]),
            "",
            "![accuracy against latency](points.png)",
            "",
            f"The {metric} is in percent{' ± one standard error' * bool(errors)}, of clips at "
            f"their own lengths.",
            "",
            *_explained(card),
            *_losses(points),
            *_cascades(points),
            "## How it was measured",
            "",
            f"Every artifact scored {points[0]['clips']} clips"
            f"{' of ' + markdown_text(model['data']) if model.get('data') else ''} "
            "in its own runtime. "
            f"Times are medians of warm calls on one clip of {lengths} s; all artifacts took turns "
            f"in one process. {measured['machine']}, {measured['cores']} cores, Python "
            f"{measured['python']}, {measured['date']}.{command}",
            "",
        ]
    )


def _server(size):
    """Lines about the server's default patch size; none where there is no server."""
    if size is None:
        return []
    text = "the most accurate on these clips, where the name of a signature has no size."
    return [f"**Server**: patch {size}, {text}", ""]


def _table(points):
    """Lines of the Markdown table of operating points."""
    threads = sorted({int(count) for point in points for count in point.get("latency_ms", {})})
    times = [f"ms, {count} thread{'s' * (count > 1)}" for count in threads]
    names = [one.name for one in BACKGROUNDS] * any(
        point["background_loss_points"] for point in points
    )
    header = ["artifact", "patch", "precision", points[0]["metric"], "lost", *names, *times, "MB"]
    rows = []
    for point in points:
        in_buffer = point["background_loss_points"] or {}
        losses = [point["loss_points"], *(in_buffer.get(name) for name in names)]
        is_run = point["format"] == "run"
        cells = [
            # Even code ends at the column's edge.
            point["name"] if is_run else _code(point["name"]).replace("|", r"\|"),
            point["patch_size"] or "-",
            point["precision"] or "-",
            share_text(point),
            *("-" if loss is None else f"{loss:.1f}" for loss in losses),
            *(_number(point.get("latency_ms", {}).get(str(count))) for count in threads),
            "-" if is_run else f"{point['megabytes']:.2f}",
        ]
        rows.append(cells)
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def _heard(model):
    """What is left out of longer clips; nothing where they are heard whole."""
    seconds = model.get("heard_seconds")  # None also in cards of models of any length
    if seconds is None:
        return ""
    return (
        f" A server hears the first {seconds:.3g} s of a clip. A file for phones hears clips of "
        f"its own length; of a longer one `flexast predict` takes the mean over windows."
    )


def _cascades(points):
    """Lines about cascades; none where there are none."""
    found = [point for point in points if point.get("cascade")]
    if not found:
        return []
    lines = [
        "A cascade hears every clip at its first patch size. A clip's scores are the mean of those "
        "at the sizes so far; while the best of them is below the threshold, the next size is "
        "asked. The threshold was set on the validation clips. The times above are those of a clip "
        "on average. A server needs a request for each size that is asked.",
        "",
    ]
    for point in found:
        cascade = point["cascade"]
        shares = ", ".join(f"{100 * share:.0f} %" for share in cascade["reached"])
        most = " and ".join(
            f"{_number(milliseconds)} ms with {count} thread{'s' * (int(count) > 1)}"
            for count, milliseconds in cascade["most_ms"].items()
        )
        lines.append(
            f"- {_code(point['name'])}: its stages hear {shares} of the clips; a clip that all of "
            f"them hear takes {most}. {_code(cascade_command(point['path'], point))}"
        )
    return [*lines, ""]


def cascade_command(path, point):
    """The command that runs a cascade of a card."""
    return (
        f"flexast predict {shlex.quote(str(path))} FILE --cascade {point['patch_size']} "
        f"--threshold {point['cascade']['threshold']:g}"
    )


def _explained(card):
    """Lines that say what the columns of losses are; none without the run."""
    if not card["run"]:
        return []
    lines = [
        "The next columns are points lost against the run itself on the same clips, at their own "
        "lengths and the same patch size:",
        "",
        "- *lost*: clips at their own lengths. An artifact that is told the length hears the clip "
        "alone; any other hears the silence that fills its buffer up.",
    ]
    heard = card["run"][0].get("backgrounds")
    if heard:
        lines += [f"- *{one.name}*: {one.text}" for one in BACKGROUNDS]
        lines += ["", f"The backgrounds are heard with {heard['clips']} of the clips, seeded."]
    return [*lines, ""]


def _losses(points):
    """Lines about the largest losses, and the artifacts that lost more than BOUNDS."""
    compared = [point for point in points if point["loss_points"] is not None]
    if not compared:
        return []
    worst = max(compared, key=lambda point: point["loss_points"])
    lines = [
        f"Largest loss at own lengths: {worst['loss_points']:.1f} points ({_code(worst['name'])})."
    ]
    for background in BACKGROUNDS:
        heard = {
            point["name"]: (point["background_loss_points"] or {}).get(background.name)
            for point in compared
        }
        heard = {name: loss for name, loss in heard.items() if loss is not None}
        if heard:
            name = max(heard, key=heard.get)
            lines[0] += f" {background.name}: {heard[name]:.1f} ({_code(name)})."
    more = [
        f"- {_code(point['name'])} lost {point['loss_points']:.1f} points, more than "
        f"{BOUNDS[point['precision']]:g}: {_reason(point)}."
        for point in compared
        if point["loss_points"] > BOUNDS.get(point["precision"], math.inf)
    ]
    return [*lines, *([""] * bool(more)), *more, ""]


def _reason(point):
    """Why an artifact scores less than the run."""
    reasons = [] if point.get("takes_length") else [REASONS["float32"]]
    if point["precision"] != "float32":
        reasons.append(REASONS[point["precision"]])
    return "; ".join(reasons) or "its runtime computes other numbers, which it should not"


def _code(text):
    """Text in Markdown's type for code, between more backticks than it has in a row."""
    runs = [len(run) for run in re.findall("`+", text)]
    fence, space = "`" * (1 + max(runs, default=0)), " " * bool(runs)
    return f"{fence}{space}{text}{space}{fence}"


def _number(value):
    return "-" if value is None else f"{value:.3g}"
