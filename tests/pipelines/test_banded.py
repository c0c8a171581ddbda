"""The product by parts is the whole product, whatever the parts."""

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines.banded import band_product, split_bands


def bands(rows, columns, width=3):
    """(rows, columns) of random bands that run down; the first two columns are empty."""
    matrix = np.random.default_rng(3).normal(size=(rows, columns)).astype("float32")
    centers = np.linspace(0, rows - 1, columns)
    matrix[np.abs(np.arange(rows)[:, None] - centers) > width] = 0
    matrix[:, :2] = 0
    return matrix


@pytest.mark.parametrize("shape", [(7, 31), (2, 5, 31), (0, 31)])
@pytest.mark.parametrize("parts", [1, 2, 4, 13, 50])
def test_is_the_whole_product(parts, shape):
    matrix = bands(31, 13)
    x = np.random.default_rng(4).normal(size=shape).astype("float32")
    split = split_bands(matrix, parts)
    assert sum(part.shape[1] for _, _, part in split) == 13
    np.testing.assert_allclose(band_product(tf.constant(x), split), x @ matrix, atol=1e-5)


def test_leaves_out_what_is_zero():
    matrix = bands(61, 24)
    split = split_bands(matrix, 4)
    assert sum(part.size for _, _, part in split) < matrix.size / 2
    for low, high, part in split:
        assert part.shape[0] == high - low < 61
