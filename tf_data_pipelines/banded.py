"""Products with a matrix whose columns are narrow bands, such as the mel triangles."""

import numpy as np
import tensorflow as tf


def split_bands(matrix, parts):
    """Split a matrix by columns and drop the outer rows of each part that are zero.

    Args:
        matrix: array (rows, columns) whose bands run down from the first row to the last.
        parts: number of parts; more of them save products and cost copies.

    Returns:
        list of (first row, last row + 1, array (rows of the part, columns of the part)).
    """
    split = []
    for columns in np.array_split(matrix, min(parts, matrix.shape[1]), axis=1):
        used = np.flatnonzero(columns.any(axis=1)) if columns.any() else np.array([0])
        low, high = used[0], used[-1] + 1
        split.append((low, high, np.ascontiguousarray(columns[low:high])))
    return split


def band_product(x, split):
    """`x @ matrix` for x (..., rows) and a matrix from `split_bands`."""
    return tf.concat([tf.matmul(x[..., low:high], part) for low, high, part in split], -1)
