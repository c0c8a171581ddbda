"""Tables and pictures of the experiments that are done, and how far they reach the targets."""

import json
import statistics

from matplotlib.figure import Figure
from paper_experiments import (
    BETWEEN,
    CASCADES,
    COSTED,
    LONG,
    LONG_SPECIALISTS,
    LONGER,
    MEAN_OF_ASTS,
    OURS,
    SPECIALISTS,
    TAUGHT,
    UNIFIED,
    mean_of,
    stages_text,
)

from keras_flexast.figures import sweep_figure
from keras_flexast.report import join_results, read_results, report_tables, write_report
from keras_flexast.settings import SWEEPS

ROUNDING = 1e-9  # of points, which are shares of clips
COSTS = "cost.json"  # file of the accuracy and time of exported models

FIGURES = {  # file: title, data set, sweep, and the experiments that are lines
    "patch_sizes": (
        "One flexible model, and ASTs of one size (FlexiAST, Figure 1 and Table 1)", "words",
        "patch-size", ("AST/8", "AST/16, continued", "AST/32", "FlexiAST", OURS, LONGER, TAUGHT),
    ),
    "resize": (
        "PI-resize and bilinear (FlexiAST, Figures 4b and 5)", "words", "patch-size",
        ("AST/16", "AST/16, bilinear", "FlexiAST", "FlexiAST, bilinear"),
    ),
    "starts": (
        "From an AST, with it as teacher, from scratch (FlexiAST, Figure 4b)", "words",
        "patch-size", ("FlexiAST", "FlexiAST, distilled", "FlexiAST, from scratch"),
    ),
    "axes": (
        "Patch sizes along one axis, both, and unified (FlexiAST, Figure 4a)",
        "speakers", "patch-size",
        (*(f"FlexiAST, {axis}" for axis in ("both axes", "time", "frequency")),
         *(UNIFIED["speakers"] + how for how in ("", LONG))),
    ),
    "lengths": (
        "Native and fixed lengths, clips cut after so many seconds (ElasticAST, Figure 4)",
        "speakers", "length",
        ("ElasticAST", "ElasticAST" + LONG, *(f"AST, {s} s" for s in (2, 4, 8)),
         "ElasticAST, average", UNIFIED["speakers"], UNIFIED["speakers"] + LONG),
    ),
    "frame_shifts": (
        "Mixed and single frame shifts (ElasticAST, Figure 5)", "speakers", "frame-shift",
        ("ElasticAST", *(f"ElasticAST, {s} ms" for s in (20, 30, 40)),
         "ElasticAST, mixed frame shifts", UNIFIED["speakers"], UNIFIED["speakers"] + LONG),
    ),
    "sizes": (
        "Which sizes are trained", "words", "patch-size",
        ("FlexiAST", OURS, "FlexiAST, few sizes", "FlexiAST, sizes uniformly",
         "FlexiAST, large sizes often", "FlexiAST, sizes 4 to 64"),
    ),
    "longer": (
        "More passes, and the AST of 16 as teacher", "words", "patch-size",
        (OURS, LONGER, f"{OURS}, distilled", TAUGHT),
    ),
    "models": (
        "Other poolings, positions and tables", "words", "patch-size",
        ("AST/16", "AST/16, the papers' grid and [CLS]", "AST/16, average", "AST/16, joint table",
         "AST/16, the papers' grid", "AST/16, [CLS]"),
    ),
    "parts": (
        "The papers' grid of positions, [CLS] and one size in a batch, together and alone", "words",
        "patch-size",
        ("FlexiAST", "FlexiAST, the papers' grid and [CLS]", "FlexiAST, the papers' grid",
         "FlexiAST, [CLS]", "FlexiAST, one size in a batch"),
    ),
}  # fmt: skip


def report(folder, files):
    """Write tables and pictures of what is done, the targets, and accuracy against cost.

    Args:
        folder: folder to write to, with the file of the costs where they are measured.
        files: paths of the results, see `papers.run_one`.
    """
    runs = [json.loads(path.read_text()) for path in files]
    swept = [path for path, run in zip(files, runs, strict=True) if run["sweeps"]]
    if not swept:
        raise SystemExit(f"nothing is done yet in {folder}.")
    results = read_results(swept)
    write_report(results, folder / "report", overwrite=True)
    for file, (title, *what) in FIGURES.items():
        draw_lines(results, folder / f"{file}.png", title, *what)
    rows = ["| | to reach | reached, in points | met | seeds |", "|---|---|---|---|---|"]
    rows += [f"| {' | '.join(row)} |" for row in targets(runs)]
    errors = {one["data"]: 0 for one in results}
    for one in results:
        errors[one["data"]] = max(errors[one["data"]], 100 * one["standard_error"])
    texts = (f"{error:.1f} on {data}" for data, error in errors.items())
    note = f"Standard error of one accuracy by its clips, in points: up to {', '.join(texts)}."
    rows += ["", note]
    (folder / "targets.md").write_text("\n".join(rows) + "\n")
    costs = folder / COSTS
    if costs.exists():
        draw_costs(json.loads(costs.read_text()), folder / "cost.png")
    print("\n".join(rows))


# === The targets ===


def targets(runs):
    """(what, to reach, reached, met, seeds) of each target whose runs are there.

    Reached is the mean of the differences over the seeds, in points, and their least and most.
    """
    done = Accuracies(runs)
    rows = []
    flexible = "FlexiAST", OURS, LONGER
    for name in (one + how for how in ("", ", distilled") for one in flexible):
        rows += _specialists_row(done, name, SPECIALISTS, "the AST trained at each")
    for name in (LONGER, TAUGHT):
        rows += _specialists_row(done, name, LONG_SPECIALISTS, f"the AST trained at each{LONG}")
    for name in (*flexible, TAUGHT):
        rows += _shape_rows(done, name)
    rows += _resize_rows(done)
    rows += _dips_row(done, "FlexiAST, both axes", "speakers")
    for axis in ("time", "frequency"):
        rows += _axis_row(done, axis)
    rows += _length_row(done)
    rows += _frame_shift_row(done)
    rows += _unified_rows(done)
    for name, how in ((OURS, ""), (LONGER, LONG)):
        rows += row(
            f"mean of one model's scores at 8, 16, 32{how} against that of three ASTs", 0,
            minus(done.mean(mean_of(name)), done.mean(MEAN_OF_ASTS)),
        )  # fmt: skip
    for name in (OURS, LONGER, TAUGHT, UNIFIED["words"], UNIFIED["words"] + LONG):
        for stages in (CASCADES[0], None):  # those of the others are in the results
            rows += _cascade_row(done, name, stages_text(stages))
    return rows


class Accuracies:
    """Percent of the experiments that are done, each as {seed: percent}."""

    def __init__(self, runs):
        self.runs = runs
        self.names = {run["name"] for run in runs}

    def at(self, name, data, sweep, point):
        return {
            run["seed"]: 100 * one["value"]
            for run in self.runs if (run["name"], run["data"]) == (name, data)
            for one in run["sweeps"].get(sweep, ()) if str(one["point"]) == str(point)
        }  # fmt: skip

    def size(self, point, name):
        return self.at(name, "words", "patch-size", point)

    def mean(self, name):
        """Of the mean scores of several models."""
        return {
            run["seed"]: 100 * run["members"][-1]["value"]
            for run in self.runs
            if run["name"] == name
        }

    def cascades(self, name, stages):
        """What `evaluate_cascade` found, as {seed: list}."""
        return {
            run["seed"]: run["cascades"][stages] for run in self.runs
            if run["name"] == name and stages in run.get("cascades", {})
        }  # fmt: skip

    def over_best(self, name, others, second):
        """Differences to the best of others on clips cut so, by the mean of the common seeds."""
        own = self.at(name, "speakers", "length", second)
        known = [minus(own, self.at(other, "speakers", "length", second)) for other in others]
        # What is not run is not in the title.
        return min(filter(None, known), key=statistics.mean, default=[])


def minus(a, b):
    """Differences of the seeds that both have."""
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def row(what, least, *differences):
    """[the row] of a target of at least so many points in each of the differences, or []."""
    found = [one for one in differences if one]
    if not found:
        return []
    if any(statistics.mean(one) < least - ROUNDING for one in found):
        met = "no"
    else:
        met = "yes" if len(found) == len(differences) else "not all is run"
    seeds = {*map(len, found)}
    count = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)}-{max(seeds)}"
    return [(what, f"{least:g} or more", "; ".join(map(_spread, differences)), met, count)]


def _specialists_row(done, name, specialists, against):
    gains = [minus(done.size(p, name), done.size(p, fixed)) for p, fixed in specialists.items()]
    return row(f"{name} at 8, 16, 32 against {against}", -1, *gains)


def _dips_row(done, name, data):
    """Between the sizes of training."""

    def over_line(point, *ends):
        own, below, above = (done.at(name, data, "patch-size", p) for p in (point, *ends))
        share = (point - ends[0]) / (ends[1] - ends[0])
        both = below.keys() & above.keys()
        line = {seed: (1 - share) * below[seed] + share * above[seed] for seed in both}
        return minus(own, line)

    dips = [over_line(point, *ends) for point, ends in BETWEEN.items()]
    what = f"{name} at {', '.join(map(str, BETWEEN))} against the line between the neighbors"
    return row(what + ", speakers" * (data == "speakers"), -1, *dips)


def _shape_rows(done, name):
    """Between the sizes of training, and at both ends."""
    return [
        *_dips_row(done, name, "words"),
        *row(f"{name} at 48 against 16", -4, minus(done.size(48, name), done.size(16, name))),
        *row(f"{name} at 8 against 16", 0, minus(done.size(8, name), done.size(16, name))),
    ]


def _resize_rows(done):
    rows = []
    for name, points in (("AST/16", (8, 12, 24, 32)), ("FlexiAST", (8, 16, 32, 48))):
        gains = [minus(done.size(p, name), done.size(p, f"{name}, bilinear")) for p in points]
        named = ", ".join(map(str, points))
        rows += row(f"{name} at {named}: PI-resize against bilinear", 0, *gains)
    return rows


def _axis_row(done, axis):
    def along(name, point):
        return done.at(f"FlexiAST, {name}", "speakers", "patch-size", point)

    sizes = [(p, f"16x{p}" if axis == "time" else f"{p}x16") for p in (8, 32, 48)]
    gains = [minus(along(axis, point), along("both axes", p)) for p, point in sizes]
    what = f"patch sizes along {axis} alone, 8, 32, 48, against along both (other costs)"
    return row(what, 0, *gains)


def _length_row(done):
    cut = [name for s in (2, 4, 8) if (name := f"AST, {s} s") in done.names] or ["AST, 2 s"]
    gains = [done.over_best("ElasticAST", cut, second) for second in (2, 4, 8, 20)]
    what = f"ElasticAST on clips cut after 2, 4, 8, 20 s, against the best of {'; '.join(cut)}"
    return row(what, 0, *gains)


def _frame_shift_row(done):
    def at(name, shift):
        return done.at(name, "speakers", "frame-shift", shift)

    single = {10: "ElasticAST", **{shift: f"ElasticAST, {shift} ms" for shift in (20, 30, 40)}}
    mixed = "ElasticAST, mixed frame shifts"
    gains = [minus(at(mixed, shift), at(name, shift)) for shift, name in single.items()]
    return row("mixed frame shifts at 10, 20, 30, 40 ms against training at each", -2, *gains)


def _unified_rows(done):
    rows = []
    for how in ("", LONG):
        sizes = [
            minus(done.size(p, UNIFIED["words"] + how), done.size(p, OURS + how))
            for p in (8, 16, 32, 48)
        ]
        rows += row(f"unified{how}, at 8, 16, 32, 48 against {OURS}{how}", -1.5, *sizes)
        for against in dict.fromkeys(("ElasticAST", "ElasticAST" + how)):
            lengths = [
                done.over_best(UNIFIED["speakers"] + how, [against], s) for s in (2, 4, 8, 20)
            ]
            what = f"unified{how}, on clips cut after 2, 4, 8, 20 s, against {against}"
            rows += row(what, -1.5, *lengths)
    return rows


def _cascade_row(done, name, stages):
    """A cascade against the best single size of all, and against those that cost no more."""
    found = done.cascades(name, stages)
    if not found:
        return []
    cascade, mean = ({seed: one[place] for seed, one in found.items()} for place in (-2, -1))
    singles = {}  # patch size: {seed: what was found}
    for run in done.runs:
        if run["name"] == name and run["seed"] in found:
            for one in run["sweeps"]["patch-size"]:
                singles.setdefault(one["point"], {})[run["seed"]] = one

    def average(results, key):
        return statistics.mean(one[key] for one in results.values())

    def gains(results, others):
        return [100 * (results[seed]["value"] - others[seed]["value"]) for seed in sorted(results)]

    operations = average(cascade, "operations")
    best = max(singles, key=lambda size: average(singles[size], "value"))
    cost = 100 * operations / average(singles[best], "operations")
    gained = gains(cascade, singles[best])
    reached = f"{_spread(gained)} against {best} at {cost:.1f} %"
    cheap = [size for size, one in singles.items() if average(one, "operations") <= operations]
    if cheap:
        peer = max(cheap, key=lambda size: average(singles[size], "value"))
        reached += f", {_spread(gains(cascade, singles[peer]))} against {peer}"
    reached += f"; the mean of all {_spread(gains(mean, singles[best]))} against {best}"
    if stages == "auto":
        each = (",".join(one["name"] for one in found[seed][:-2]) for seed in sorted(found))
        stages = f"found on the validation clips ({'; '.join(each)})"
    what = f"cascade {stages} of {name} against the best size alone, and the best as cheap"
    met = statistics.mean(gained) >= -ROUNDING and cost <= 50
    to_reach = "0 or more at 50 % of its cost or less"
    return [(what, to_reach, reached, "yes" if met else "no", str(len(found)))]


def _spread(values):
    """Mean of some values, and their least and most."""
    if not values:
        return "-"
    mean, least, most = (
        f"{one:+.1f}".replace("-0.0", "+0.0")
        for one in (statistics.mean(values), min(values), max(values))
    )
    return mean if len(values) == 1 else f"{mean} ({least} to {most})"


# === Pictures ===


def draw_lines(results, path, title, data, sweep, names):
    """One figure of the papers, of the experiments that are done."""
    found = [one for name in names for one in results
             if (one["name"], one["data"], one["sweep"]) == (name, data, sweep)]  # fmt: skip
    if sweep == "patch-size":
        found = [{**one, "point": _side(one)} for one in found if _side(one)]
    done = {one["name"] for one in found}
    if 2 * len(done) <= len(names):  # a title that promises more than is drawn
        return
    joined = join_results(found)
    (table,) = report_tables(joined)
    sweep_figure(joined[data][sweep], table.points, path, title=title, xlabel=SWEEPS[sweep],
                 ylabel="accuracy (%)")  # fmt: skip


def _side(result):
    """The side of a patch that training changes; None for other patches that are not square."""
    freq, *time = str(result["point"]).split("x")
    if not time or result["name"].endswith("frequency"):
        return freq
    return time[0] if result["name"].endswith("time") else None


def draw_costs(measured, path):
    """Accuracy against a clip's time: flexible models, their cascades, the ASTs of one size."""
    figure = Figure(figsize=(7, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()

    def draw(point, *args, **kwargs):
        place = point["latency_ms"]["1"], 100 * point["value"]
        axes.plot(*place, *args, **kwargs)
        where = {"xytext": (3, 8), "ha": "center"} if point["cascade"] else {"xytext": (5, -11)}
        axes.annotate(
            point["patch_size"], place, textcoords="offset points", fontsize=8, **where
        )  # fmt: skip

    points = measured["points"]
    for number, (name, passes) in enumerate(COSTED.items()):
        ours = [one for one in points if one["name"] == name]
        sizes = sorted((one for one in ours if not one["cascade"]),
                       key=lambda one: int(one["patch_size"]))  # fmt: skip
        axes.plot([one["latency_ms"]["1"] for one in sizes], [100 * one["value"] for one in sizes],
                  f"C{number}-", label=f"one flexible model at each size, {passes}")  # fmt: skip
        for one in sizes:
            draw(one, f"C{number}o")
        for one in ours:
            if one["cascade"]:
                draw(one, f"C{number}D", ms=9, mec="k", label="its cascade, on average")
    for number, one in enumerate(one for one in points if one["name"] not in COSTED):
        draw(one, "k*", ms=11, label=None if number else "an AST for each size, 5 passes each")
    axes.set(
        xscale="log", xlabel="milliseconds of a clip of the longest word, one thread, .tflite",
        ylabel="accuracy (%)", title="Words, seed 0: accuracy against time",
    )  # fmt: skip
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.12)  # for the names beside the last points
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")
    figure.savefig(path)
