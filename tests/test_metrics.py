"""Metrics: scikit-learn's numbers, ties, missing classes, order."""

import json
import pathlib

import numpy as np
import pytest

from keras_flexast.figures import _most_confused, accuracy_figure, confusion_figure
from keras_flexast.metrics import (
    accuracy,
    average_precision,
    classification_report,
    confusion_matrix,
    d_prime,
    log_softmax,
    mean_average_precision,
    roc_auc,
    top_k_accuracy,
)
from keras_flexast.terminal import json_text

DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def reference():
    with np.load(DATA / "metrics.npz") as archive:
        return dict(archive)


@pytest.mark.parametrize("metric", [average_precision, roc_auc])
def test_equal_to_scikit_learn(reference, metric):
    ours = metric(reference["targets"], reference["scores"])
    expected = reference[metric.__name__]
    assert np.isnan(expected).any()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("metric", [average_precision, roc_auc])
def test_the_order_of_clips_does_not_matter(reference, metric):
    targets, scores = reference["targets"], np.round(reference["scores"], 1)  # many ties
    order = np.random.default_rng(0).permutation(len(targets))
    expected = metric(targets, scores)
    np.testing.assert_allclose(metric(targets[order], scores[order]), expected, atol=1e-12)
    np.testing.assert_allclose(metric(targets, 3 * scores - 5), expected, atol=1e-12)


def test_by_hand():
    # Steps end after 1, 3 (a tie of a positive and a negative) and 4 clips:
    # precision 1, 2/3, 3/4; a third of the positives is found at each.
    targets, scores = [[1], [0], [1], [1]], [[0.9], [0.5], [0.5], [0.1]]
    np.testing.assert_allclose(average_precision(targets, scores), (1 + 2 / 3 + 3 / 4) / 3)
    # The negative is beaten by one positive, tied with one, and beats one.
    np.testing.assert_allclose(roc_auc(targets, scores), (1 + 0.5 + 0) / 3)


def test_a_class_without_clips_is_left_out():
    targets, scores = np.array([[1, 0, 1], [0, 0, 1]]), np.array([[0.1, 0.3, 0.2], [0.7, 0.3, 0.1]])
    np.testing.assert_array_equal(average_precision(targets, scores), [0.5, np.nan, 1])
    np.testing.assert_array_equal(roc_auc(targets, scores), [0, np.nan, np.nan])
    assert mean_average_precision(targets, scores) == 0.75
    assert np.isnan(mean_average_precision(0 * targets, scores))


def test_accuracy():
    assert accuracy([2, 0, 1], [[0, 1, 2], [3, 1, 2], [2, 1, 0]]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 scores are not finite"):
        accuracy([0, 1], [[np.nan, 1], [0, 1]])  # NaN would be the largest


@pytest.mark.parametrize("metric", [average_precision, mean_average_precision, roc_auc])
def test_errors(metric):
    with pytest.raises(ValueError, match=r"\(3, 2\) and scores \(3, 5\).*\(clips, classes\)"):
        metric(np.ones((3, 2)), np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        metric(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="2 scores are not finite"):
        metric(np.ones((2, 2)), [[0, np.nan], [np.inf, 1]])


def test_top_k_by_hand():
    scores = [[0.1, 0.7, 0.2], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.5, 0.2, 0.3]]
    labels = [2, 0, 1, 1]  # second; first of a tie; second of it; last
    found = [top_k_accuracy(labels, scores, k) for k in (1, 2, 3)]
    assert found == [0.25, 0.75, 1]
    assert found[0] == accuracy(labels, scores)
    several = np.array([[0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]])  # any of them; none
    assert [top_k_accuracy(several, scores, k) for k in (1, 2, 3)] == [0.5, 0.5, 0.75]
    with pytest.raises(ValueError, match="1 scores are not finite"):
        top_k_accuracy([0], [[np.nan, 1]], 1)


def test_d_prime():
    """Two normal distributions d apart have that d', and an area that is known."""
    assert d_prime(0.5) == 0
    assert d_prime(0.7602499389065233) == pytest.approx(1)  # erf(1/2) = 2 area - 1
    assert d_prime(1 - 0.7602499389065233) == pytest.approx(-1)
    assert d_prime(1.0) == np.inf and d_prime(0.0) == -np.inf and np.isnan(d_prime(np.nan))


def test_confusion_by_hand():
    scores = np.eye(3)[[0, 1, 1, 2, 0]]
    found = confusion_matrix([0, 0, 1, 2, 2], scores)
    np.testing.assert_array_equal(found, [[1, 1, 0], [0, 1, 0], [1, 0, 1]])


def test_log_softmax_ranks_as_scores_do_where_these_are_all_one():
    logits = np.array([[40.0, 0], [80, 0], [0, np.log(3)]])
    found = log_softmax(logits)
    np.testing.assert_allclose(np.exp(found[2]), [0.25, 0.75])
    assert found[0, 1] > found[1, 1] and np.exp(found).sum(1) == pytest.approx(1)
    assert roc_auc([[0], [1]], logits[:2, 1:] - logits[:2, :1])[0] == 0


def test_a_report_has_the_numbers_of_each_class(reference):
    targets, scores = reference["targets"], reference["scores"]
    names = [f"class {number}" for number in range(7)]
    report = classification_report(names, targets, scores)
    assert report["confusion"] is None and report["per_class"][3]["class"] == "class 3"
    for ours, theirs in (("average_precision", "average_precision"), ("roc_auc", "roc_auc")):
        found = [one[ours] for one in report["per_class"]]
        assert (None in found) == np.isnan(reference[theirs]).any()
        found = np.array(found, "float64")
        np.testing.assert_allclose(found, reference[theirs], rtol=0, atol=1e-6)
    assert report["mAP"] == pytest.approx(np.nanmean(reference["average_precision"]))
    assert report["auc"] == pytest.approx(np.nanmean(reference["roc_auc"]))
    assert report["d_prime"] == d_prime(report["auc"])
    assert [one["clips"] for one in report["per_class"]] == targets.sum(0).astype(int).tolist()
    json.dumps(report, allow_nan=False)


def test_a_report_of_single_labels():
    scores = np.eye(4)[[0, 1, 1, 2]]
    report = classification_report("abcd", [0, 0, 1, 2], scores)
    assert report["top1"] == 0.75 and report["top5"] is None
    assert [one["accuracy"] for one in report["per_class"]] == [0.5, 1, 1, None]
    assert [one["clips"] for one in report["per_class"]] == [2, 1, 1, 0]
    assert np.trace(report["confusion"]) == 3 and np.sum(report["confusion"]) == 4
    perfect = classification_report("abc", [0, 1, 2], np.eye(3))
    assert perfect["auc"] == 1 and perfect["d_prime"] is None
    json.dumps(report, allow_nan=False)


def test_json_has_a_row_of_numbers_in_a_line():
    value = [{"class": "[\n1\n]", "rows": [[1, 2], [-3.5, 1e-9]], "none": [None, 1]}, []]
    text = json_text(value)
    assert "[1, 2]" in text and "[-3.5, 1e-09]" in text and json.loads(text) == value


def test_many_classes_are_grouped_by_their_errors():
    counts = 9 * np.eye(60, dtype=int)
    counts[7, 50], counts[58, 59] = 3, 2
    names, grouped = _most_confused([f"c{k}" for k in range(60)], counts)
    assert len(names) == 50 and grouped.sum() == counts.sum()
    assert names[-1] == "11 others" and {"c7", "c50", "c58", "c59"} <= set(names)
    assert grouped[-1, -1] == 99  # without errors
    assert grouped[names.index("c7"), names.index("c50")] == 3
    names, same = _most_confused(["a", "b"], np.eye(2))
    assert names == ["a", "b"] and (same == np.eye(2)).all()


@pytest.mark.parametrize("count", [2, 60])
def test_pictures_of_confusion_and_accuracy(count, tmp_path, monkeypatch):
    counts = np.random.default_rng(0).integers(0, 9, (count, count))
    confusion_figure([f"$c{k}" for k in range(count)], counts, tmp_path / "c.png", "run")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    drawn = []
    monkeypatch.setattr("keras_flexast.figures._write", lambda figure, path: drawn.append(figure))
    results = [
        {"name": name, "metric": "accuracy", "value": value, "standard_error": 0.01}
        for name, value in (("48", 0.5), ("8x40", 0.6), ("serving", 0.4), ("16", 0.7))
    ]
    accuracy_figure({"run": results}, "a.png", "clips")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["16", "8x40", "48", "serving"]
    line, _, (bars,) = axes.containers[0]
    np.testing.assert_allclose(np.float64(line.get_ydata()), [70, 60, 50, 40])
    np.testing.assert_allclose(np.float64(bars.get_segments()[0])[:, 1], [69, 71])
