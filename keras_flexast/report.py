"""Results of several runs joined: tables and figures of each data set and each sweep.

OUT/report.md            the tables, each with its figure
OUT/report.csv           every result, one a line
OUT/report.json          what `join_results` returns
OUT/<data>_<sweep>.png   the figures, also as .svg
"""

import csv
import dataclasses
import hashlib
import json
import pathlib
import re
import statistics
import urllib.parse
from collections.abc import Sequence
from typing import Any

from keras_flexast.figures import patch_order, sweep_figure
from keras_flexast.files import PICTURE, FolderKind, atomic_folder
from keras_flexast.settings import SWEEPS
from tf_data_pipelines.hints import PathLike
from tf_data_pipelines.settings import patch_name

METRICS = ("accuracy", "mAP")
COLUMNS = ("data", "name", "seed", "sweep", "point", "metric", "value", "standard_error", "clips")
REPORT_TEXT = "report.md"
SEAL = "<!-- SHA-256 of this report, by which an edit is seen: "
REPORT = FolderKind("report", ((REPORT_TEXT, "report.csv", "report.json"),))
WAY_OUT = "Write the file with flexast evaluate RUN DATA --sweep ... --json."


def read_results(paths: Sequence[PathLike]) -> list[dict[str, Any]]:
    """Read what `flexast evaluate --sweep ... --json` printed of several runs.

    Args:
        paths: JSON files, one a run, and folders, of which all `*.json` with sweeps are read but
            those of earlier reports.

    Returns:
        list of dictionaries, one for each point of each sweep of each run, with the keys COLUMNS.

    Raises:
        FileNotFoundError: there is no such file, or none in a folder.
        ValueError: a file is not JSON of this form, a value is not a number from 0 to 1, a result
            is there twice, or a data set has two metrics in one sweep.
    """
    results: list[dict[str, Any]] = []
    files: dict[tuple, pathlib.Path] = {}  # what has a result, to find it twice
    metrics: dict[tuple, tuple] = {}  # (metric, first file) of each table
    paths = [pathlib.Path(path) for path in paths]
    for path in _json_files(paths):
        for one in _read_file(path, listed=path in paths):
            data, name, seed, sweep, point, metric = (one[key] for key in COLUMNS[:6])
            key = data, name, seed, sweep, point
            if files.get(key) == path:
                raise ValueError(f"{path} has {sweep} {point} twice. Leave one of them out.")
            if key in files:
                raise ValueError(
                    f"{files[key]} and {path} both have {name!r} on {data!r}, seed {seed}, at "
                    f"{sweep} {point}. Leave one of them out, or give them different names."
                )
            files[key] = path
            other, first = metrics.setdefault((data, sweep), (metric, path))
            if metric != other:
                raise ValueError(
                    f"{path} has {metric} of {data!r} by {sweep}, but {first} has {other}; a table "
                    f"has one metric. Make a report of each."
                )
            results.append(one)
    if not results:
        raise ValueError(f"{', '.join(map(str, paths))} holds no results of sweeps. {WAY_OUT}")
    return results


def _json_files(paths):
    """The files, with those in folders, each once."""
    files = []
    for path in map(pathlib.Path, paths):
        found = [path]
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*.json")) if not REPORT.is_whole(p.parent)]
        if not found:
            raise FileNotFoundError(f"{path} holds no .json file with results. {WAY_OUT}")
        files += found
    return {path.resolve(): path for path in files}.values()


def _read_file(path, listed):
    """The results of one file as dictionaries with the keys COLUMNS.

    A file that was not `listed`, but found in a folder, may be any other JSON, which has none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError(f"{path} is empty: what writes it did not finish. {WAY_OUT}")
        run = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}. {WAY_OUT}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}. {WAY_OUT}") from None
    if not isinstance(run, dict) or not isinstance(run.get("sweeps"), dict):
        if not listed:
            return []
        raise ValueError(f"{path} holds JSON without sweeps. {WAY_OUT}")
    run = {key: run.get(key) for key in ("data", "name", "seed", "sweeps")}
    for key in ("data", "name"):
        _check(run, path, key, _is_name, "a name")
    _check(run, path, "seed", lambda seed: seed is None or type(seed) is int, "a whole number")
    sweeps, results = run.pop("sweeps"), []
    for sweep, points in sweeps.items():
        if sweep not in SWEEPS:
            raise ValueError(f"{path} has a sweep {sweep!r}; expected {', '.join(SWEEPS)}.")
        if not isinstance(points, list) or not all(isinstance(one, dict) for one in points):
            raise ValueError(f"{path}: {sweep} must be a list of objects. {WAY_OUT}")
        results += [run | _checked(one, sweep, path) for one in points]
    if not results and listed:
        raise ValueError(f"{path} has no result of a sweep. {WAY_OUT}")
    return results


def _checked(one, sweep, path):
    """A result at one point, with the keys COLUMNS[3:]."""
    one = {key: one.get(key) for key in COLUMNS[3:]} | {"sweep": sweep}
    where = f"{path}: {sweep}"
    if sweep == "patch-size":
        _check(one, where, "point", _patch_sizes, "a patch size such as '16' or '16x24'")
        one["point"] = patch_name(_patch_sizes(one["point"]))
    else:
        _check(one, where, "point", lambda x: _is_number(x) and 0 < x < 1e9, "a number over 0")
    where = f"{where} {one['point']}"
    _check(one, where, "metric", lambda name: name in METRICS, " or ".join(map(repr, METRICS)))
    _check(one, where, "value", _is_share, "a number from 0 to 1")
    _check(
        one, where, "standard_error", lambda x: x is None or _is_share(x),
        "null or a number from 0 to 1",
    )  # fmt: skip
    _check(one, where, "clips", lambda x: type(x) is int and x > 0, "a whole number from 1")
    return one


def _check(values, where, key, is_good, expected):
    if not is_good(values[key]):
        raise ValueError(f"{where}: {key}={values[key]!r} must be {expected}. {WAY_OUT}")


def _patch_sizes(point):
    """ "16" or "16x24" -> ("16", "16") or ("16", "24"); None for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", str(point), re.ASCII)
    return found and (found[1], found[2] or found[1])


def _is_name(value):
    return isinstance(value, str) and value and value.encode(errors="ignore").decode() == value


def _is_number(value):
    return type(value) in (int, float)  # True is none


def _is_share(value):
    return _is_number(value) and 0 <= value <= 1  # NaN is none


def join_results(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the seeds of each name at each point.

    Args:
        results: what `read_results` returns.

    Returns:
        {data: {sweep: {name: cells}}}, in the order first seen. The cells are a list of
        dictionaries in the order of their `point`: `metric`, `mean`, `least` and `most` over the
        seeds, `standard_error` of a single one, and the lists `seeds` and `clips` with an entry a
        seed.
    """
    groups: dict[str, Any] = {}
    for one in results:
        rows = groups.setdefault(one["data"], {}).setdefault(one["sweep"], {})
        rows.setdefault(one["name"], {}).setdefault(one["point"], []).append(one)
    return {
        data: {
            sweep: {
                name: [_cell(points[point]) for point in _ordered(points)]
                for name, points in rows.items()
            }
            for sweep, rows in sweeps.items()
        }
        for data, sweeps in groups.items()
    }


def _cell(results):
    values = [one["value"] for one in results]
    return {
        "point": results[0]["point"],
        "metric": results[0]["metric"],
        "mean": statistics.fmean(values),
        "least": min(values),
        "most": max(values),
        "standard_error": results[0]["standard_error"] if len(results) == 1 else None,
        "seeds": [one["seed"] for one in results],
        "clips": [one["clips"] for one in results],
    }


def _ordered(points):
    """Points of one sweep in order, each once: patch sizes by area, then by frequency."""
    return sorted(set(points), key=lambda one: patch_order(one) if isinstance(one, str) else one)


@dataclasses.dataclass(frozen=True)
class ReportTable:
    """A table of a report as text.

    Args:
        data, sweep: what the table is of.
        metric: "accuracy" or "mAP".
        points: points of the sweep in order, one a column.
        rows: {name: list of (text, whether it is the best of its column)}, one a column.
        note: a line about the clips and the seeds.
    """

    data: str
    sweep: str
    metric: str
    points: list
    rows: dict[str, list[tuple[str, bool]]]
    note: str

    @property
    def title(self):
        return f"{self.data}: {self.metric} in percent by {SWEEPS[self.sweep]}"

    @property
    def columns(self):
        return [point if isinstance(point, str) else f"{point:g}" for point in self.points]


def report_tables(joined: dict[str, Any]) -> list[ReportTable]:
    """Tables of joined results as text, in percent: "95.3 ± 0.8", of seeds "95.3 (94.8-95.9)".

    Args:
        joined: what `join_results` returns.
    """
    tables = []
    for data, sweeps in joined.items():
        for sweep, rows in sweeps.items():
            points = _ordered(cell["point"] for cells in rows.values() for cell in cells)
            found = {(name, cell["point"]): cell for name in rows for cell in rows[name]}
            best = {
                point: max(cell["mean"] for (_, at), cell in found.items() if at == point)
                for point in points
            }
            texts = {
                name: [
                    _text(found.get((name, point)), best[point] if len(rows) > 1 else None)
                    for point in points
                ]
                for name in rows
            }
            metric = next(iter(found.values()))["metric"]
            tables.append(ReportTable(data, sweep, metric, points, texts, _note(rows)))
    return tables


def _text(cell, best):
    """A cell as (text, whether it is the best); empty where a run has no such point."""
    if cell is None:
        return "", False
    mean, least, most = (f"{100 * cell[key]:.1f}" for key in ("mean", "least", "most"))
    error = cell["standard_error"]
    text = mean if error is None else f"{mean} ± {100 * error:.1f}"
    if len(cell["seeds"]) > 1:
        text = f"{mean} ({least}-{most})"
    return text, cell["mean"] == best


def _note(rows):
    """The clips, and the seeds: once, or of each row where they differ."""
    cells = [cell for row in rows.values() for cell in row]
    clips = sorted({count for cell in cells for count in cell["clips"]})
    seeds = {name: _seeds(row) for name, row in rows.items()}
    several = any(len(cell["seeds"]) > 1 for cell in cells)
    listed = next(iter(seeds.values()))
    if len(set(seeds.values())) > 1:
        listed = "; ".join(f"{name}: {text}" for name, text in seeds.items())
    counts = " to ".join(map(str, dict.fromkeys((clips[0], clips[-1]))))
    texts = [f"{counts} clips"]
    if any(cell["standard_error"] is not None for cell in cells):
        texts.append("± one standard error of the clips")
    range_text = "mean (least-most) of trainings, on the same clips, of the seeds"
    texts.append(f"{range_text if several else 'seed'} {listed}")
    if len(rows) > 1:
        texts.append("bold: the best of all rows")
    return "; ".join(texts)


def _seeds(cells):
    """The seeds of a row as text."""
    seeds = dict.fromkeys(seed for cell in cells for seed in cell["seeds"])
    some = any(len(cell["seeds"]) < len(seeds) for cell in cells)
    listed = ", ".join("unknown" if seed is None else str(seed) for seed in seeds)
    return listed + " (not all at every point)" * some


def write_report(
    results: Sequence[dict[str, Any]], out: PathLike, *, overwrite: bool = False
) -> pathlib.Path:
    """Write tables and figures of results; the folder appears whole or not at all.

    Args:
        results: what `read_results` returns.
        out: folder to write.
        overwrite: replace an earlier report.

    Returns:
        path of the folder.

    Raises:
        FileExistsError: `out` exists and must not be replaced, or is a report that was edited.
        ValueError: there are no results.
    """
    if not results:
        raise ValueError(f"there are no results to write into {out}. {WAY_OUT}")
    joined, out = join_results(results), pathlib.Path(out)
    lines = ["# Results", ""]
    drawn = [path.stem for path in out.glob("*.png") if PICTURE.foreign(path) is None]
    pictures = [f"{stem}{suffix}" for stem in drawn for suffix in (".png", ".svg")]
    kind = dataclasses.replace(REPORT, others=tuple(pictures))
    if overwrite and REPORT.is_whole(out) and not kind.foreign(out):
        _refuse_edited(out)
    with atomic_folder(out, overwrite, kind=kind) as folder:
        for table in report_tables(joined):
            picture = f"{_file_name(table.data)}_{table.sweep}.png"
            sweep_figure(
                joined[table.data][table.sweep], table.points, folder / picture, title=table.data,
                xlabel=SWEEPS[table.sweep], ylabel=f"{table.metric} (%)",
            )  # fmt: skip
            lines += _markdown(table, picture)
        (folder / "report.json").write_text(json.dumps(joined, indent=2), encoding="utf-8")
        with open(folder / "report.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(results)
        text = "\n".join(lines)
        sealed = text + seal(text, _others(folder))
        (folder / REPORT_TEXT).write_bytes(sealed.encode())
    return out


def seal(text, others):
    """The last line of a text: the digest of it and of other files, as they are written."""
    digest = hashlib.sha256(text.encode(errors="surrogateescape"))
    for path in others:
        digest.update(path.name.encode(errors="surrogateescape") + path.read_bytes())
    return f"\n{SEAL}{digest.hexdigest()} -->\n"


def is_sealed(path, others):
    """Whether a text and the other files are as they were written; None if it has no seal."""
    text = path.read_bytes().decode(errors="surrogateescape")
    body, mark, _ = text.rpartition(f"\n{SEAL}")
    return text == body + seal(body, others) if mark else None


def _others(folder):
    """The files of a report beside its text, sorted."""
    files = (path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    return sorted(path for path in files if path.name != REPORT_TEXT)


def _refuse_edited(folder):
    """Raise a FileExistsError where a report is not as it was written."""
    sealed = is_sealed(folder / REPORT_TEXT, _others(folder))
    if not sealed:
        why = (
            "has no seal against edits"
            if sealed is None
            else "was edited since this program wrote it"
        )
        raise FileExistsError(f"{folder} {why}. Choose another place, or move it away.")


def _file_name(data):
    """A data set's name in names of files; other names never become the same."""
    return urllib.parse.quote(data, safe=" ")


def _markdown(table, picture):
    """Lines of a table, its note and its picture."""
    rows = [["", *table.columns], ["---"] + ["---:"] * len(table.points)]
    for name, cells in table.rows.items():
        rows.append([markdown_text(name), *(f"**{text}**" * best or text for text, best in cells)])
    return [
        f"## {markdown_text(table.title)}",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        markdown_text(table.note),
        "",
        f"![{markdown_text(table.title)}]({urllib.parse.quote(picture)})",
        "",
    ]


def markdown_text(name):
    """A name of the user's as Markdown shows it: as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(name.split()))
