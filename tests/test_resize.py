"""Resize matrices and patch grids: the PI identity, the policies."""

import numpy as np
import pytest

from tf_data_pipelines.resize import (
    axis_grid,
    bilinear_matrix,
    kernel_matrix,
    patch_count,
    patch_step,
    resize_kernel,
    table_weights,
    token_count,
)
from tf_data_pipelines.settings import Axis, PatchSettings, patch_pair

SIZES = [(8, 8), (16, 24), (24, 16), (12, 20), (16, 48), (48, 16), (30, 30), (7, 29)]
LARGER = [size for size in SIZES if min(size) >= 16]


@pytest.mark.parametrize("size", SIZES)
def test_resizing_the_kernel_is_mapping_the_patch(size):
    rng = np.random.default_rng(0)
    patch, kernel = rng.normal(size=size), rng.normal(size=(16, 16))
    whole = np.kron(bilinear_matrix(16, size[0]), bilinear_matrix(16, size[1]))
    over_f, over_t = (kernel_matrix(p) for p in size)

    resized = np.linalg.pinv(whole.T) @ kernel.ravel()
    mapped = np.linalg.pinv(whole) @ patch.ravel()
    np.testing.assert_allclose(resize_kernel(kernel, size).ravel(), resized, atol=1e-12)
    np.testing.assert_allclose((over_f.T @ patch @ over_t).ravel(), mapped, atol=1e-12)
    np.testing.assert_allclose(patch.ravel() @ resized, mapped @ kernel.ravel(), atol=1e-12)


@pytest.mark.parametrize("size", LARGER)
def test_a_larger_patch_of_the_same_picture_embeds_alike(size):
    rng = np.random.default_rng(1)
    patch, kernel = rng.normal(size=(16, 16)), rng.normal(size=(16, 16))
    larger = bilinear_matrix(16, size[0]) @ patch @ bilinear_matrix(16, size[1]).T
    embedded = np.sum(larger * resize_kernel(kernel, size))
    np.testing.assert_allclose(embedded, np.sum(patch * kernel), atol=1e-12)


@pytest.mark.parametrize("resize", ["pi", "bilinear"])
def test_the_base_size_is_left_alone(resize):
    np.testing.assert_allclose(kernel_matrix(16, 16, resize), np.eye(16), atol=1e-12)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("target", [1, 5, 13, 16, 47])
def test_bilinear_rows_sum_to_one(target, antialias):
    matrix = bilinear_matrix(16, target, antialias)
    assert matrix.shape == (target, 16)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)


def test_bilinear_by_hand():
    # Centers of 2 -> 3: -1/6 (clamped), 1/2, 7/6 (clamped).
    np.testing.assert_allclose(bilinear_matrix(2, 3), [[1, 0], [0.5, 0.5], [0, 1]], atol=1e-15)
    # 3 -> 2 looks at 1/4 and 7/4 with a triangle 3/2 wide: 5/6, 1/2, 0 over their sum 4/3.
    expected = [[0.625, 0.375, 0], [0, 0.375, 0.625]]
    np.testing.assert_allclose(bilinear_matrix(3, 2, antialias=True), expected, atol=1e-15)


def test_table_weights_stop_at_the_ends():
    weights = table_weights([-9.0, 0, 6, 99], 3.0, 7)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-12)
    np.testing.assert_array_equal(weights[[0, 3]], weights[[1, 2]])


def test_axis_grid_by_hand():
    def starts(remainder):
        return axis_grid(53, 11, axis=Axis(16, 16, 5), remainder=remainder, position="grid")[
            0
        ].tolist()

    assert starts("crop") == [0, 11, 22, 33]
    assert starts("pad") == [0, 11, 22, 33, 44]
    assert starts("cover") == [0, 11, 21, 32, 42]  # 10.5 and 31.5 round up
    _, centers, extents = axis_grid(53, 11, axis=Axis(16, 16, 5), remainder="crop", position="grid")
    np.testing.assert_allclose(centers, [0.125, 1.375, 2.625, 3.875], atol=1e-12)
    np.testing.assert_allclose(extents, 1.25, atol=1e-12)
    _, centers, extents = axis_grid(
        53, 11, axis=Axis(16, 16, 5), remainder="cover", position="physical"
    )
    np.testing.assert_allclose(centers, (np.array(starts("cover")) + 5.5) / 16 - 0.5, atol=1e-12)
    np.testing.assert_allclose(extents, 11 / 16, atol=1e-12)


@pytest.mark.parametrize("stride", [16, 10, 3])
@pytest.mark.parametrize("size", [48, 53, 128, 1009])
@pytest.mark.parametrize("patch", [1, 7, 16, 47, 48])
def test_policies_reach_what_they_promise(size, patch, stride):
    axis, cells = Axis(16, stride, 8), {}
    step = patch_step(patch, axis)
    for remainder in ("crop", "pad", "cover"):
        starts, centers, extents = axis_grid(
            size, patch, axis=axis, remainder=remainder, position="physical"
        )
        settings = PatchSettings((patch,), remainder=remainder, stride=stride)
        assert len(starts) == len(centers) == len(extents)
        assert len(starts) == patch_count(size, patch, step, remainder)
        assert len(starts) ** 2 == token_count(size, size, (patch, patch), settings)
        assert (np.diff(starts) > 0).all()
        cells[remainder] = starts[:, None] + np.arange(patch)
    count = len(range(0, size - patch + 1, step))  # of a VALID convolution
    np.testing.assert_array_equal(cells["crop"][:, 0], np.arange(count) * step)
    np.testing.assert_array_equal(cells["pad"][:, 0], np.arange(len(cells["pad"])) * step)
    assert size <= cells["pad"].max() + 1 < size + step
    assert (cells["cover"].min(), cells["cover"].max()) == (0, size - 1)
    assert len(cells["cover"]) == len(cells["pad"])
    np.testing.assert_array_equal(np.unique(cells["cover"]), np.arange(size))


def test_overlap_by_hand():
    # AST: 128 mel bins and 1,024 frames at patch 16 and stride 10 are 12 x 101 patches.
    assert [patch_count(size, 16, 10, "crop") for size in (128, 1024)] == [12, 101]
    assert [patch_step(patch, Axis(16, 10, 12)) for patch in (8, 12, 16, 24)] == [5, 8, 10, 15]
    for position in ("grid", "physical"):  # a cell for each patch, whole
        _, centers, extents = axis_grid(
            128, 16, axis=Axis(16, 10, 12), remainder="crop", position=position
        )
        np.testing.assert_allclose(centers, np.arange(12), atol=1e-12)
        np.testing.assert_allclose(extents, 1, atol=1e-12)
    # Patch 24 of step 15 starts at 0, 15, ...: middles 12, 27, ...; cell j's is 8 + 10 j.
    _, centers, extents = axis_grid(
        128, 24, axis=Axis(16, 10, 12), remainder="crop", position="physical"
    )
    np.testing.assert_allclose(centers[:3], [0.4, 1.9, 3.4], atol=1e-12)
    np.testing.assert_allclose(extents, 1.5, atol=1e-12)


@pytest.mark.parametrize("position", ["grid", "physical"])
@pytest.mark.parametrize("remainder", ["crop", "pad", "cover"])
def test_base_patches_look_whole_cells_up(remainder, position):
    starts, centers, extents = axis_grid(
        112, 16, axis=Axis(16, 16, 7), remainder=remainder, position=position
    )
    np.testing.assert_array_equal(starts, np.arange(0, 112, 16))
    np.testing.assert_allclose(table_weights(centers, extents, 7), np.eye(7), atol=1e-12)


def test_a_short_clip_counts_as_one_patch():
    settings = PatchSettings(prefix_tokens=2)
    assert token_count(np.array([1, 16, 17]), 48, (24, 16), settings).tolist() == [4, 4, 6]


def test_errors():
    with pytest.raises(ValueError, match=r"13 along time, larger than the spectrogram's 11"):
        axis_grid(11, 13, axis=Axis(16, 16, 5), remainder="cover", position="grid", name="time")
    with pytest.raises(ValueError, match=r"resize='nearest' is unknown.*'pi', 'bilinear'"):
        kernel_matrix(8, 16, "nearest")
    with pytest.raises(ValueError, match=r"stride=\(17, 17\) is larger than base_patch=\(16, 16\)"):
        PatchSettings(stride=17)
    for wrong in (0, -3, 2.5, (8,), (8, 8, 8), True):
        with pytest.raises(ValueError, match="patch_size="):
            patch_pair(wrong)
