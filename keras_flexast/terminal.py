"""What the terminal shows: errors and warnings in one line, tables, nothing of TensorFlow's."""

import collections
import contextlib
import json
import os
import re
import sys
import warnings

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from tf_data_pipelines.settings import DataWarning

SHOWN_CLASSES = 4  # of a converted checkpoint

# Names of files and classes are text, neither markup nor emoji.
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


@contextlib.contextmanager
def nothing_on_stderr():
    """Hide what is written to standard error, also from C++: TensorFlow's start-up lines."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def show_warning(message, category, filename, lineno, file=None, line=None):
    """A warning about the user's sounds as one line; those of other packages as they are."""
    if issubclass(category, DataWarning):
        errors.print(f"Warning: {message}", style="yellow")
    else:
        errors.print(warnings.formatwarning(message, category, filename, lineno, line).rstrip())


def print_tables(*tables):
    """Print tables; names of files and classes are text."""
    Console(markup=False, emoji=False).print(*tables)


def json_text(value):
    """JSON, indented, with each innermost list of numbers in one line."""
    text = json.dumps(value, indent=2)  # has line breaks between values alone, not in names
    return re.sub(
        r"\[\n([-+.\de,\s]+?)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text
    )


def evaluation_table(results):
    """The numbers of whole data sets at each patch size, in 80 columns; see `evaluate_run`."""
    from keras_flexast.evaluation import share_text

    first = results[0]
    more = {"top5": "top-5", "mAP": "mAP", "auc": "AUC"}
    more = {key: name for key, name in more.items() if first["metric"] != name}
    more = {key: name for key, name in more.items() if first[key] is not None}
    packed = ["tokens", "fill"] * ("tokens" in first)
    caption = "shares in percent, ± one standard error" + "; tokens of a clip" * bool(packed)
    table = Table(
        "patch", first["metric"], *more.values(), "d'", "clips", *packed, caption=caption
    )  # fmt: skip
    for one in results:
        shares = [f"{100 * one[key]:.1f}" for key in more]
        d_prime = "" if one["d_prime"] is None else f"{one['d_prime']:.2f}"
        row = [one["name"], share_text(one), *shares, d_prime, str(one["clips"])]
        if packed:
            row += [f"{one['tokens'] / one['clips']:.0f}", f"{100 * one['fill']:.0f}"]
        table.add_row(*row)
    return table


SWEPT = {  # title of the first column
    "patch-size": "patch", "length": "seconds", "frame-shift": "ms", "pooling": "frames",
}  # fmt: skip


def sweep_table(sweep, results):
    """Accuracy along one axis and what a clip costs there; see `evaluate_sweep`."""
    from keras_flexast.evaluation import share_text

    caption = "shares in percent, ± one standard error; tokens and operations of a clip"
    table = Table(
        SWEPT[sweep], results[0]["metric"], "clips", "tokens", "operations", caption=caption
    )
    for one in results:
        tokens = f"{one['tokens'] / one['clips']:.0f}"
        row = str(one["point"]), share_text(one), str(one["clips"]), tokens
        table.add_row(*row, f"{one['operations']:.2g}")
    return table


def cascade_table(results):
    """Accuracy and cost of a cascade, of its stages and of their mean; see `evaluate_cascade`."""
    from keras_flexast.evaluation import share_text

    cascade = next(one for one in results if "threshold" in one)
    heard = ", ".join(f"{100 * share:.0f} %" for share in cascade["reached"])
    sizes = ",".join(one["name"] for one in results[:-2])
    caption = (
        f"± one standard error; the stages of the cascade hear {heard} of the clips, at "
        f"--cascade {sizes} --threshold {cascade['threshold']:g}"
    )
    table = Table("patch", results[0]["metric"], "MFLOP a clip", "clips", caption=caption)
    for one in results:
        cost = f"{one['operations'] / 1e6:,.1f}"
        table.add_row(one["name"], share_text(one), cost, str(one["clips"]))
    return table


def _patch_text(name):
    return f"patch {name}" if name[:1].isdigit() else name


def class_table(results):
    """The accuracy (average precision where clips have several labels) of each class."""
    key = "accuracy" if results[0]["metric"] == "accuracy" else "average_precision"
    titles = (str(one["point"]) if "point" in one else _patch_text(one["name"]) for one in results)
    table = Table("class", "clips", *titles)
    for columns in zip(*(one["per_class"] for one in results), strict=True):
        values = ("" if one[key] is None else f"{100 * one[key]:.1f} %" for one in columns)
        table.add_row(columns[0]["class"], str(columns[0]["clips"]), *values)
    return table


def answers_table(answers):
    """The best classes of each file: dictionaries of `file` and `top`."""
    table = Table(Column("file", overflow="fold"))
    for number in range(1, len(answers[0]["top"]) + 1):
        table.add_column(f"{number}.")
    for answer in answers:
        texts = (f"{one['label']} {one['score']:.3f}" for one in answer["top"])
        table.add_row(answer["file"], *texts)
    return table


def points_table(points, best, threads):
    """Operating points from the most accurate on, the best in bold; see `timed_points`."""
    from keras_flexast.evaluation import share_text
    from keras_flexast.figures import threads_text

    table = Table(
        "", Column("artifact", overflow="fold"), "patch", "precision", f"{points[0]['metric']} %",
        Column("ms a clip", justify="right"), Column("MB", justify="right"),
        caption=threads_text(points, threads),
    )  # fmt: skip
    for point in sorted(points, key=lambda point: -point["value"]):
        table.add_row(
            "→" if point == best else "",
            point["name"],
            point["patch_size"] or "",
            point["precision"] or "",
            share_text(point),
            f"{point['ms']:.3g}",
            f"{point['megabytes']:.2f}",
            style="bold" if point == best else None,
        )
    return table


def data_tables(summary):
    """The facts of a data set, and its clips by class and split; see `ScannedSource.summary`."""
    facts, (splits, *_) = Table(show_header=False), summary["classes"].values()
    for name, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        if name != "classes":
            facts.add_row(name, str(value))
    classes = Table("class", *splits)
    for name, row in summary["classes"].items():
        classes.add_row(name, *map(str, row.values()))
    return facts, classes


def report_table(table):
    """One table of a report, turned, as a terminal is narrow; see `report.report_tables`."""
    columns = (Column(name, overflow="fold") for name in table.rows)
    shown = Table("", *columns, title=table.title, caption=table.note)
    for point, *cells in zip(table.columns, *table.rows.values(), strict=True):
        shown.add_row(point, *(Text(cell, "bold" * best) for cell, best in cells))
    return shown


def conversion_table(done):
    """What became of the names of a checkpoint, counted by reason."""
    model, backbone = done.run.model, done.run.model.backbone
    table = Table(show_header=False)
    table.add_row("family", done.family)
    table.add_row(
        "model",
        f"{backbone.depth} blocks, {backbone.dim} wide, {backbone.num_heads} heads, "
        f"{model.pooling_name} pooling",
    )
    table.add_row("patches", f"{_text(backbone.base_patch)}, one every {_text(model.stride)}")
    table.add_row("position table", f"{_text(backbone.grid)}, {model.position}")
    names = done.run.classes
    more = ", ..." * (len(names) > SHOWN_CLASSES)
    table.add_row("classes", f"{len(names)}: {', '.join(names[:SHOWN_CLASSES])}{more}")
    table.add_row("names used", str(len(done.used)))
    for reason, count in collections.Counter(done.ignored.values()).items():
        table.add_row("names ignored", f"{count}: {reason}")
    for layer, reason in done.new.items():
        table.add_row("new", f"{layer}: {reason}")
    for note in done.notes:
        table.add_row("note", note)
    return table


def _text(pair):
    return "x".join(map(str, pair))
