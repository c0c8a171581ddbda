"""Metrics: scikit-learn's numbers, ties, missing classes, order."""

import pathlib

import numpy as np
import pytest

from keras_flexast.metrics import accuracy, average_precision, mean_average_precision, roc_auc

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
