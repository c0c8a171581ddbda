"""Reports: numbers by hand, order, the best, several seeds, files, wrong input."""

import csv
import json

import pytest
from typer.testing import CliRunner

from keras_flexast import cli
from keras_flexast.report import join_results, read_results, report_tables, write_report


def point(at, value, **more):
    return {"point": at, "metric": "accuracy", "value": value, "standard_error": None, "clips": 70,
            "operations": 1e8} | more  # fmt: skip


def write(path, name="A", seed=0, data="words", **sweeps):
    """A file as `flexast evaluate --sweep ... --json` prints it."""
    sweeps = {sweep.replace("_", "-"): points for sweep, points in sweeps.items()}
    run = {"name": name, "data": data, "seed": seed, "sweeps": sweeps, "split": "test"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run))
    return path


@pytest.fixture
def results(tmp_path):
    """A folder with two seeds of a model B, and one of A, which lacks a size."""
    folder = tmp_path / "results"
    write(
        folder / "1.json", "B", 0, patch_size=[point("16x24", 0.5), point("8", 0.9)],
        length=[point(10.0, 0.75), point(0.5, 0.25, standard_error=0.05)],
    )  # fmt: skip
    write(folder / "2.json", "B", 1, patch_size=[point("8", 0.7), point("16x24", 0.5)])
    write(folder / "more" / "3.json", "A", 0, patch_size=[point("24x16", 0.6), point("8", 0.812)])
    return folder


def test_seeds_are_joined(results):
    joined = join_results(read_results([results]))
    assert list(joined) == ["words"] and list(joined["words"]) == ["patch-size", "length"]
    b, a = joined["words"]["patch-size"].values()
    assert [cell["point"] for cell in b] == ["8", "16x24"]
    assert b[0] == {
        "point": "8", "metric": "accuracy", "mean": pytest.approx(0.8), "least": 0.7, "most": 0.9,
        "standard_error": None, "seeds": [0, 1], "clips": [70, 70],
    }  # fmt: skip
    assert [cell["mean"] for cell in a] == [0.812, 0.6] and a[0]["seeds"] == [0]
    assert [cell["point"] for cell in joined["words"]["length"]["B"]] == [0.5, 10]


def test_tables_have_ranges_and_the_best(results):
    sizes, lengths = report_tables(join_results(read_results([results])))
    assert sizes.columns == ["8", "16x24", "24x16"] and lengths.columns == ["0.5", "10"]
    assert sizes.rows == {
        "B": [("80.0 (70.0-90.0)", False), ("50.0 (50.0-50.0)", True), ("", False)],
        "A": [("81.2", True), ("", False), ("60.0", True)],
    }
    of_trainings = "mean (least-most) of trainings, on the same clips, of the seeds"
    assert sizes.note.startswith("70 clips; ")
    assert sizes.note.endswith(f"{of_trainings} B: 0, 1; A: 0; bold: the best of all rows")
    assert lengths.rows["B"][0] == ("25.0 ± 5.0", False)  # one row has no best
    assert lengths.note == "70 clips; ± one standard error of the clips; seed 0"


def test_the_note_tells_what_differs(tmp_path):
    write(tmp_path / "1.json", seed=None, pooling=[point(1, 0.5), point(2, 0.5, clips=60)])
    write(tmp_path / "2.json", seed=3, pooling=[point(1, 0.25)])
    (table,) = report_tables(join_results(read_results([tmp_path])))
    assert table.note.startswith("60 to 70 clips; ")
    assert table.note.endswith("of the seeds unknown, 3 (not all at every point)")


def test_a_report_has_tables_numbers_and_pictures(results, tmp_path):
    write(results / "4.json", "a|b", data="a/b", pooling=[point(2, 1, clips=9)])
    found = read_results([results])
    out = write_report(found, tmp_path / "out")
    pictures = {"words_patch-size", "words_length", "a%2Fb_pooling"}
    drawn = {f"{name}.{suffix}" for name in pictures for suffix in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == drawn | {
        "report.md", "report.csv", "report.json",
    }  # fmt: skip
    legend = (out / "words_patch-size.svg").read_text()
    assert "<!-- B, 2 seeds -->" in legend and "<!-- A, 1 seed -->" in legend
    assert "<!-- B -->" in (out / "words_length.svg").read_text()  # of one seed all
    lines = (out / "report.md").read_text().splitlines()
    assert "| B | 80.0 (70.0-90.0) | **50.0 (50.0-50.0)** |  |" in lines
    assert r"| a\|b | 100.0 |" in lines
    assert any(line.endswith("(a%252Fb_pooling.png)") for line in lines)
    with open(out / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found) == 9
    assert ",".join(rows[3].values()) == "words,B,0,length,0.5,accuracy,0.25,0.05,70"
    assert json.loads((out / "report.json").read_text()) == join_results(found)


def test_pictures_are_the_same_again(results, tmp_path):
    one, two = (write_report(read_results([results]), tmp_path / name) for name in ("one", "two"))
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_lines_stand_where_their_points_are(results, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("keras_flexast.figures._write", lambda figure, path: figures.append(figure))
    write(results / "4.json", "B", 0, "square", patch_size=[point("48", 0.5), point("8", 0.9)])
    write_report(read_results([results]), tmp_path / "out")
    mixed, lengths, square = (figure.axes[0] for figure in figures)
    assert mixed.lines[1].get_xdata().tolist() == [0, 2]  # of A, which lacks 16x24
    assert mixed.lines[0].get_ydata().tolist() == pytest.approx([80, 50])
    assert mixed.collections[0].get_paths()[0].get_extents().bounds == pytest.approx((0, 50, 1, 40))
    assert square.lines[0].get_xdata().tolist() == [8, 48]
    assert square.get_xlabel() == "patch size (mel bins x frames)"
    assert (
        lengths.get_xlabel() == "clip length (seconds)" and lengths.get_ylabel() == "accuracy (%)"
    )


def test_many_lines_leave_room_for_the_curves(results, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("keras_flexast.figures._write", lambda figure, path: figures.append(figure))
    for number in range(45):
        path = results / f"many{number}.json"
        write(path, f"run {number}", 0, "many", length=[point(1, 0.5), point(2, 0.6)])
    write_report(read_results([results]), tmp_path / "out")
    figures[-1].draw_without_rendering()
    assert figures[-1].axes[0].get_window_extent().height > 300


def test_only_a_report_is_replaced(results, tmp_path):
    found, out = read_results([results]), results / "out"
    write_report(found, out)
    assert read_results([results, results / "1.json"]) == found  # no file twice, no report
    with pytest.raises(FileExistsError, match="exists already"):
        write_report(found, out)
    write_report(found[:1], out, overwrite=True)
    assert not (out / "words_length.svg").exists()
    (out / "mine.png").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match=r"it also holds 'mine\.png'"):
        write_report(found, out, overwrite=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("name", ["report.md", "report.csv", "words_length.svg"])
def test_an_edited_report_is_not_replaced(results, tmp_path, name):
    found, out = read_results([results]), results / "out"
    write_report(found, out)
    with (out / name).open("a") as file:
        file.write("my remarks\n")
    (out / ".left.partial").mkdir()  # by a kill; no edit
    edited = (out / name).read_bytes()
    with pytest.raises(FileExistsError, match=r"was edited since .* wrote it. Choose another"):
        write_report(found, out, overwrite=True)
    assert (out / name).read_bytes() == edited


def test_no_results_make_no_report(tmp_path):
    with pytest.raises(ValueError, match="there are no results to write into"):
        write_report([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_leaves_an_earlier_report(results, tmp_path, monkeypatch):
    found, out = read_results([results]), tmp_path / "out"
    write_report(found, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("csv.DictWriter", None)
    with pytest.raises(TypeError):
        write_report(found[:1], out, overwrite=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"results", "out"}


RUN = {"name": "A", "data": "words", "seed": 0, "sweeps": {"length": [point(1, 0.5)]}}


def length(**changed):
    return RUN | {"sweeps": {"length": [point(1, 0.5) | changed]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not JSON: .* --sweep"),
        ("", "is empty: what writes it did not finish"),
        ([RUN], r"holds JSON without sweeps\. .* --sweep"),
        ({"name": "A"}, "holds JSON without sweeps"),
        (RUN | {"sweeps": {}}, "has no result of a sweep"),
        (RUN | {"sweeps": {"length": []}}, "has no result of a sweep"),
        (RUN | {"sweeps": {"length": {}}}, "length must be a list of objects"),
        (RUN | {"sweeps": {"pitch": []}}, "has a sweep 'pitch'; expected patch-size, length"),
        (RUN | {"sweeps": {"patch-size": [point("16x", 1)]}}, "point='16x' must be a patch size"),
        (RUN | {"name": ""}, "name='' must be a name"),
        (RUN | {"data": None}, "data=None must be a name"),
        (RUN | {"seed": True}, "seed=True must be a whole number"),
        (length(point="1"), "length: point='1' must be a number over 0"),
        (length(value=95.3), r"length 1: value=95\.3 must be a number from 0 to 1"),
        (length(value=True), "value=True must be"),
        (length(value=float("nan")), "value=nan must be"),
        (length(value=None), "value=None must be"),
        (length(standard_error=-1), "standard_error=-1 must be null or"),
        (length(metric="auc"), "metric='auc' must be 'accuracy' or 'mAP'"),
        (length(clips=0), "clips=0 must be a whole number"),
        (length(point=10**400), "must be a number over 0"),
        (RUN | {"name": "\ud800"}, "must be a name"),
        (RUN | {"sweeps": {"length": [point(1, 0.5)] * 2}}, "has length 1 twice"),
    ],
)
def test_what_is_no_result_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"a\.json.*{message}"):
        read_results([path])


def test_other_json_in_a_folder_is_left_alone(results, tmp_path):
    found = read_results([results])
    (results / "history.json").write_text('{"loss": [1.0]}')
    (results / "mean.json").write_text('{"data": "words", "name": "mean", "sweeps": {}}')
    assert read_results([results]) == found
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "history.json").write_text("{}")
    with pytest.raises(ValueError, match="none holds no results of sweeps"):
        read_results([tmp_path / "none"])


def test_results_that_do_not_fit_name_both_files(tmp_path):
    first = write(tmp_path / "1.json", length=[point(1, 0.5)])
    again = write(tmp_path / "2.json", length=[point(1.0, 0.6)])
    other = write(tmp_path / "3.json", seed=1, length=[point(1, 0.5, metric="mAP")])
    with pytest.raises(ValueError, match=r"1\.json and .*2\.json both have 'A' on 'words', seed 0"):
        read_results([first, again])
    with pytest.raises(ValueError, match=r"3\.json has mAP of 'words' .*1\.json has accuracy"):
        read_results([first, other])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no \.json file"):
        read_results([first, tmp_path / "empty"])


def test_the_command_prints_the_tables(results, tmp_path):
    arguments = ["report", str(results), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.exception
    assert "81.2" in done.stdout and "The report is" in done.stdout
    assert (tmp_path / "out" / "report.md").is_file()
    assert isinstance(CliRunner().invoke(cli.app, arguments).exception, FileExistsError)
    assert CliRunner().invoke(cli.app, [*arguments, "--overwrite"]).exit_code == 0


def test_labels_of_a_logarithmic_axis_do_not_touch():
    from keras_flexast.figures import _thinned

    sizes = [4, 8, 16, 28, 30, 32, 62, 64]
    assert _thinned([*map(str, sizes)], sizes) == ["4", "8", "16", "28", "", "32", "", "64"]
