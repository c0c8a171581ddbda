"""Pictures of results, as PNG files; of a report also as SVG."""

import io
import warnings

import numpy as np

from keras_flexast.files import PICTURE, SOFTWARE, refuse_overwrite
from tf_data_pipelines.atomic import atomic_write

MARKERS = "osD^vP*X"
HERTZ = (100, 250, 500, 1000, 2000, 4000, 8000, 16000)  # ticks of a frequency axis
MOST_CLASSES = 50  # of a confusion matrix: more names cannot be read
MOST_LINES = 20  # of a legend, in one column


def accuracy_figure(curves, path, title):
    """Draw a metric against the patch size, one line per model: FlexiAST's Figure 1.

    The sizes stand in order of their area, whatever the order of the results; what has no size
    stands last. Bars are standard errors.

    Args:
        curves: {model name: list of results of `evaluate_run`}.
        path: path of the PNG file to write.
        title: text above the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    results = [result for curve in curves.values() for result in curve]
    names = sorted({result["name"] for result in results}, key=patch_order)
    for (label, curve), marker in zip(curves.items(), "so^v", strict=False):
        curve = sorted(curve, key=lambda result: names.index(result["name"]))
        places = [names.index(result["name"]) for result in curve]
        values = [100 * result["value"] for result in curve]
        errors = [100 * (result.get("standard_error") or 0) for result in curve]
        axes.errorbar(
            places, values, errors, marker=marker, capsize=3 * any(errors), label=_short(label, 60)
        )
        axes.annotate(
            f"{values[-1]:.1f}", (places[-1], values[-1]), (6, -3), textcoords="offset points"
        )
    axes.set_xticks(range(len(names)), [_short(name) for name in names])
    axes.set(
        xlabel="patch size (mel bins x frames)",
        ylabel=f"{results[0]['metric']} (%)",
        title=_short(title, 80),
    )
    axes.set(ylim=(0, 104), xlim=(-0.3, len(names) - 0.3))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    _write(figure, path)


def patch_order(name):
    """A key that sorts "8" before "16" and "16x24"; names that are no patch sizes come last."""
    sizes = name.split("x")
    if not all(size.isdecimal() for size in sizes):
        return np.inf, name
    return int(sizes[0]) * int(sizes[-1]), sizes[0].zfill(9)


def sweep_figure(curves, points, path, *, title, xlabel, ylabel):
    """Draw a metric against what was swept, one line per name, a band from least to most.

    Numbers and square patch sizes stand where they are on the axis; patch sizes that are not all
    square stand side by side. Where any name has several seeds, the legend says how many each has.

    Args:
        curves: {name: list of cells}, a table of `report.join_results`.
        points: the points of all curves, in order.
        path: path of the PNG file to write; the same picture as SVG is written beside it.
        title: text above the axes.
        xlabel, ylabel: titles of the axes.
    """
    from matplotlib.figure import Figure

    columns = -(-len(curves) // MOST_LINES)
    figure = Figure(figsize=(8.5 + 2.5 * (columns - 1), 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    numeric = not any("x" in str(point) for point in points)
    places = {point: float(point) if numeric else place for place, point in enumerate(points)}
    seeds = {name: {len(cell["seeds"]) for cell in curve} for name, curve in curves.items()}
    for number, (name, curve) in enumerate(curves.items()):
        label = _short(name, 52)
        if max(map(max, seeds.values())) > 1:
            least, most = min(seeds[name]), max(seeds[name])
            label += f", {least}" + f"-{most}" * (least < most) + " seed" + "s" * (most > 1)
        style = {"color": f"C{number % 10}", "zorder": 3}
        x = [places[cell["point"]] for cell in curve]
        mean, least, most = (
            [100 * cell[key] for cell in curve] for key in ("mean", "least", "most")
        )
        axes.plot(x, mean, marker=MARKERS[number % 8], label=label, **style)
        axes.fill_between(x, least, most, alpha=0.2, linewidth=0, color=style["color"])
    ticks = list(places.values())
    if numeric and min(np.diff(ticks), default=1) < 0.04 * (ticks[-1] - ticks[0]):
        axes.set_xscale("log")  # the numbers of a linear axis would hide each other
        axes.minorticks_off()
    labels = [point if isinstance(point, str) else f"{point:g}" for point in points]
    axes.set_xticks(ticks, _thinned(labels, ticks) if axes.get_xscale() == "log" else labels)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(_short(title, 80), loc="left")  # a long one goes on above the legend
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), ncols=columns)
    _write(figure, path)
    drawn = _content(figure, "svg", {"Creator": SOFTWARE, "Date": None})
    atomic_write(path.with_suffix(".svg"), drawn)


def confusion_figure(classes, confusion, path, title):
    """Draw a confusion matrix; each row is the clips of a class, in percent.

    Up to MOST_CLASSES classes are all shown, in order. Of more, those are shown that are part of
    the most errors, and the last row and column hold all the others together.

    Args:
        classes: names of the classes.
        confusion: int (classes, classes), see `metrics.confusion_matrix`.
        path: path of the PNG file to write.
        title: text above the axes.
    """
    from matplotlib.figure import Figure

    names, counts = _most_confused(classes, np.asarray(confusion))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size, count = max(4.0, 0.3 * len(names)), len(names)
    figure = Figure(figsize=(size + 2.6, size + 1.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    mesh = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
        share = 100 * shares[row, column]
        color = "white" if share > 60 else "black"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, fontsize=7)
    shown = [_short(name) for name in names]
    axes.set_xticks(range(count), shown, rotation=90, fontsize=8)
    axes.set_yticks(
        range(count),
        [f"{name} ({clips})" for name, clips in zip(shown, counts.sum(1), strict=True)],
        fontsize=8,
    )
    axes.set(xlabel="taken for", ylabel="class (clips)", title=_short(title, 60))
    figure.colorbar(mesh, ax=axes, label="% of the clips of a class", shrink=0.6, pad=0.01)
    _write(figure, path)


def _most_confused(classes, counts):
    """(names, counts) of all classes, or of those with the most errors and of the others."""
    if len(classes) <= MOST_CLASSES:
        return list(classes), counts
    errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
    shown = np.sort(np.argsort(-errors, kind="stable")[: MOST_CLASSES - 1])
    group = np.full(len(classes), len(shown))  # the last group is all the others
    group[shown] = np.arange(len(shown))
    grouped = np.zeros((len(shown) + 1,) * 2, counts.dtype)
    np.add.at(grouped, (group[:, None], group), counts)
    names = [classes[k] for k in shown]
    return [*names, f"{len(classes) - len(shown)} others"], grouped


def points_figure(points, path, *, title, threads=1, chosen=None, budget_ms=None):
    """Draw accuracy against latency: a marker per operating point, a color per patch size.

    Args:
        points: operating points of a card, each with its latency as `ms`.
        path: path of the PNG file to write.
        title: text above the axes.
        threads: number of threads of the latency.
        chosen: the point to ring, or None.
        budget_ms: where to draw a line, or None.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(8.5, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    sizes = _numbered(points, _size)
    kinds = _numbered(points, _kind)
    for point in points:
        place = point["ms"], 100 * point["value"]
        axes.errorbar(
            *place, 100 * (point["standard_error"] or 0), fmt=MARKERS[kinds[_kind(point)] % 8],
            color=f"C{sizes[_size(point)]}", ecolor="0.85", elinewidth=1, ms=7, alpha=0.8, zorder=3,
        )  # fmt: skip
    for name, number in sizes.items():
        axes.plot([], [], "o", color=f"C{number}", label=name)
    for name, number in kinds.items():
        axes.plot([], [], MARKERS[number % 8], color="0.4", label=name)
    if chosen is not None:
        place = chosen["ms"], 100 * chosen["value"]
        axes.plot(*place, "o", ms=15, mfc="none", mec="black", label="chosen")
    if budget_ms is not None:
        axes.axvline(budget_ms, color="0.4", linestyle="--", label=f"{budget_ms:g} ms")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(
        xlabel=f"milliseconds a clip, {threads_text(points, threads)}",
        ylabel=f"{points[0]['metric']} (%)",
        title=_short(title, 80),
    )
    axes.margins(x=0.08, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    _write(figure, path)


def threads_text(points, threads):
    """ "1 thread", and how a server among the points was timed."""
    served = any(point["format"] == "saved_model" for point in points)
    return f"{threads} thread{'s' * (threads > 1)}" + "; server: all cores" * served


def timeline_figure(timeline, path, title, *, rows=10, note=None):
    """Draw a Timeline: a band of the winning labels over a heat map of the top classes.

    Args:
        timeline: Timeline.
        path: path of the PNG file to write.
        title: text above the axes.
        rows: largest number of classes, those that win most windows first; where another
            class wins, the band is white.
        note: text that the file carries unseen; None for none.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    scores, edges = timeline.scores, _edges(timeline)
    winners = scores.argmax(1)
    wins = np.bincount(winners, minlength=scores.shape[1])
    shown = np.lexsort((-scores.max(0), -wins))[:rows]
    place = np.full(scores.shape[1], -1)
    place[shown] = np.arange(len(shown))

    figure = Figure(figsize=(11, 1.9 + 0.32 * len(shown)), dpi=150, layout="constrained")
    band, heat = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [0.9, len(shown)]}
    )
    colors = ListedColormap([f"C{index}" for index in range(10)][: min(rows, 10)])
    winning = np.ma.masked_less(place[winners], 0)[None]
    band.pcolormesh(edges, [0, 1], winning % 10, cmap=colors, vmin=-0.5, vmax=colors.N - 0.5)
    _name_stretches(band, edges, winners=winners, classes=timeline.classes, shown=shown)
    band.set(yticks=[0.5], title=_short(title, 100))
    band.set_yticklabels(["winner"])
    mesh = heat.pcolormesh(
        edges, np.arange(len(shown) + 1), scores[:, shown].T, cmap="Greys", vmin=0, vmax=1
    )
    heat.invert_yaxis()
    heat.set_yticks(np.arange(len(shown)) + 0.5, [_short(timeline.classes[k]) for k in shown])
    for index, label in enumerate(heat.get_yticklabels()):
        label.set(color=colors(index % colors.N), fontweight="bold")
    heat.xaxis.set_major_formatter(lambda seconds, _: clock(seconds))
    heat.set_xticks(_ticks(edges[-1]))
    heat.set(xlabel="time (min:sec)", xlim=(edges[0], edges[-1]))
    figure.colorbar(mesh, ax=heat, label="score", pad=0.01)
    _write(figure, path, note)


def explanation_figure(explanation, path, top=3):
    """Draw an Explanation: the mel spectrogram, and over it where pooling and rollout look.

    Args:
        explanation: Explanation.
        path: path of the PNG file to write.
        top: number of classes in the title, the best ones.
    """
    from matplotlib.figure import Figure

    fbank, found = explanation.fbank, explanation.spectrogram
    end = len(found) * fbank.frame_shift_ms / 1000
    loud = np.clip(found.T / 2 + 0.5, 0, 1)  # normalized: most lies within -1 and 1
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    names = "mel spectrogram", f"attention, patch {explanation.patch_size}", "rollout"
    ticks = [hertz for hertz in HERTZ if fbank.low_freq < hertz < fbank.sample_rate / 2]
    for axes, name, heat in zip(
        panels, names, (None, explanation.attention, explanation.rollout), strict=True
    ):
        where = {"origin": "lower", "aspect": "auto", "extent": (0, end, 0, fbank.mel_bins)}
        axes.imshow(loud, cmap="gray", vmin=0, vmax=1, **where)
        if heat is not None:
            shown = axes.imshow(heat.T, cmap="inferno", vmin=0, vmax=1, alpha=0.6, **where)
        axes.set_yticks(mel_place(ticks, fbank), [_hertz(one) for one in ticks], fontsize=8)
        axes.set_title(name, fontsize=9, loc="left")
    labels = ", ".join(f"{_short(name)} {score:.2f}" for name, score in explanation.top(top))
    figure.suptitle(f"{_short(explanation.name, 60)}: {labels}", fontsize=11)
    panels[-1].set_xlabel("seconds")
    figure.supylabel("frequency (Hz)", fontsize=9)
    figure.colorbar(shown, ax=panels, label="share of the most attended patch", pad=0.01)
    _write(figure, path)


def mel_place(hertz, fbank):
    """Where frequencies lie on an axis of mel bins, of which each is 1 wide, float (n,)."""
    mel = np.log1p(np.array([fbank.low_freq, fbank.sample_rate / 2, *hertz]) / 700)
    return (mel[2:] - mel[0]) / (mel[1] - mel[0]) * (fbank.mel_bins + 1) - 0.5


def _hertz(value):
    """ "500" or "2k"."""
    return f"{value // 1000}k" if value >= 1000 else str(value)


def clock(seconds):
    """ "1:05" or "0:00.5": minutes and seconds."""
    minutes, seconds = divmod(round(seconds, 3), 60)
    return f"{minutes:.0f}:" + (f"{seconds:04.1f}" if seconds % 1 else f"{seconds:02.0f}")


def _ticks(seconds):
    """At most 12 places, whole steps of a clock apart."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800)
    step = next((step for step in steps if seconds / step <= 12), 3600 * np.ceil(seconds / 43200))
    return np.arange(0, seconds + step / 100, step)


def _edges(timeline):
    """(windows + 1,) seconds: each window's part of the time, halfway to its neighbors."""
    centers = (timeline.starts + timeline.ends) / 2
    return np.concatenate(
        [timeline.starts[:1], (centers[1:] + centers[:-1]) / 2, timeline.ends[-1:]]
    )


def _name_stretches(axes, edges, *, winners, classes, shown):
    """Write each label into its stretch of the band where it is wide enough."""
    changes = np.flatnonzero(np.diff(winners)) + 1
    for first, last in zip([0, *changes], [*changes, len(winners)], strict=True):
        name = _short(classes[winners[first]])
        if (edges[last] - edges[first]) / (edges[-1] - edges[0]) > 0.011 * len(name):
            middle = (edges[first] + edges[last]) / 2
            axes.text(
                middle, 0.48, name, ha="center", va="center", fontsize=8, fontweight="bold",
                color="white" if winners[first] in shown else "black",
            )  # fmt: skip


def _short(name, width=24):
    """A name as text in a picture: neither a formula, nor hidden, nor more than a line."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    name = name if len(name) <= width else name[: width - 1] + "\u2026"
    name = f" {name}" if name.startswith("_") else name  # a legend would leave it out
    return name.replace("$", r"\$")  # two of them would be a formula


def _size(point):
    return f"patch {point['patch_size']}" if point["patch_size"] else _short(point["name"])


def _kind(point):
    return " ".join(filter(None, (point["format"], point["precision"])))


def _numbered(points, name):
    """{name: number} of the different names, in order, patch 8 before patch 16."""
    names = {name(point) for point in points}
    return {name: number for number, name in enumerate(sorted(names, key=lambda n: (len(n), n)))}


def refuse_picture(path):
    """Raise where a picture cannot be written, or would replace what is no picture of ours.

    Args:
        path: path of the PNG file; None for none.

    Raises:
        FileExistsError, ValueError, OSError: as `refuse_overwrite`.
    """
    if path is not None:
        refuse_overwrite(path, True, kind=PICTURE)


def _thinned(labels, ticks):
    """Labels of a logarithmic axis, "" where one would touch its neighbor; both ends are shown."""
    places = np.log(ticks) / np.log(ticks[-1] / ticks[0])

    def fits(one, other):
        digits = (len(labels[one]) + len(labels[other])) / 2
        return abs(places[other] - places[one]) > 0.015 * digits + 0.01  # of the axis

    shown, end = [0], len(labels) - 1
    for place in range(1, end):
        if fits(shown[-1], place) and fits(place, end):
            shown.append(place)
    return [label if place in (*shown, end) else "" for place, label in enumerate(labels)]


def _write(figure, path, note=None):
    """Write a PNG file; it names this program, which then may replace it."""
    refuse_picture(path)
    atomic_write(path, _content(figure, "png", {"Software": SOFTWARE, "Comment": note}))


def _content(figure, suffix, metadata):
    """A picture as bytes, the same in every process."""
    import matplotlib

    content = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": SOFTWARE}):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names in any script
        figure.savefig(content, format=suffix, metadata=metadata)
    return content.getvalue()
