"""Tokens and positions against NumPy written from the definition, in float64."""

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines.patches import padded_patches, patch_tokens
from tf_data_pipelines.resize import (
    axis_grid,
    kernel_matrix,
    resize_kernel,
    table_weights,
    token_count,
)
from tf_data_pipelines.settings import (
    BASE_PATCH,
    PATCH_SIZES,
    POSITIONS,
    REMAINDERS,
    Axis,
    PatchSettings,
)

SIZES = [8, (12, 20), 16, (30, 10), 48]
GEOMETRIES = {  # base patch, stride: FlexiAST's, AST's, another
    "16": ((16, 16), (16, 16)),
    "16 every 10": ((16, 16), (10, 10)),
    "12x20 every 5x11": ((12, 20), (5, 11)),
}


def spectrogram_of(frames, mel_bins, seed=5):
    return np.random.default_rng(seed).normal(0, 0.5, (frames, mel_bins)).astype("float32")


def pair(size):
    return size if isinstance(size, tuple) else (size, size)


def starts_of(size, patch, remainder, step=None):
    """First cells of the patches on one axis, as a list of int."""
    step = step or patch
    if remainder == "crop":
        return list(range(0, size - patch + 1, step))
    count = 1 + -(-(size - patch) // step)
    if remainder == "pad":
        return [i * step for i in range(count)]
    return [int(np.floor(i * (size - patch) / max(1, count - 1) + 0.5)) for i in range(count)]


def bilinear(target, base=BASE_PATCH):
    """(target, base): what half-pixel interpolation makes of each unit vector."""
    centers = (np.arange(target) + 0.5) * base / target - 0.5
    return np.stack([np.interp(centers, np.arange(base), row) for row in np.eye(base)], 1)


def antialiased(target, base=BASE_PATCH):
    """(target, base): triangles as wide as the step, as torch's antialias=True."""
    step = base / target
    centers = (np.arange(target) + 0.5) * step - 0.5
    weights = np.maximum(0, 1 - np.abs(centers[:, None] - np.arange(base)) / max(1, step))
    return weights / weights.sum(1, keepdims=True)


def reference_tokens(spectrogram, size, *, remainder, resize, base, stride):
    """Cut [start : start + p] on both axes, R_f^T x R_t, frequency-major."""
    patch_f, patch_t = pair(size)
    cells = spectrogram.T.astype("float64")  # (mel_bins, frames)
    starts_f, starts_t = (
        starts_of(cells.shape[k], patch, remainder, int(patch * stride[k] / base[k] + 0.5))
        for k, patch in enumerate((patch_f, patch_t))
    )
    cells = np.pad(cells, [(0, patch_f), (0, patch_t)])
    if resize == "pi":
        over_f, over_t = (
            np.linalg.pinv(bilinear(p, b)) for p, b in zip((patch_f, patch_t), base, strict=True)
        )
    else:
        over_f, over_t = (
            antialiased(p, b).T for p, b in zip((patch_f, patch_t), base, strict=True)
        )
    return np.array(
        [
            (over_f @ cells[f : f + patch_f, t : t + patch_t] @ over_t.T).ravel()
            for f in starts_f
            for t in starts_t
        ]
    )


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tokens_are_the_definition(geometry, size, remainder):
    spectrogram, (base, stride) = spectrogram_of(151, 107), GEOMETRIES[geometry]
    for resize in ("pi", "bilinear"):
        settings = PatchSettings(
            (size,), remainder=remainder, resize=resize, base_patch=base, stride=stride
        )
        expected = reference_tokens(
            spectrogram, size, remainder=remainder, resize=resize, base=base, stride=stride
        )
        tokens, positions = patch_tokens(spectrogram, settings)
        assert tokens.dtype == positions.dtype == tf.float32
        assert tokens.shape == expected.shape and positions.shape == (len(expected), 4)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(tokens, expected, rtol=0, atol=2e-6 * scale)


def test_two_dimensional_pseudo_inverse():
    """The separable token is the pseudo-inverse of the whole two-dimensional resize."""
    patch = spectrogram_of(20, 12)
    whole = np.linalg.pinv(np.kron(bilinear(12), bilinear(20)))  # (256, 240)
    tokens, _ = patch_tokens(patch, PatchSettings(((12, 20),)))
    np.testing.assert_allclose(tokens[0], whole @ patch.T.ravel(), rtol=0, atol=1e-5)


def test_a_base_patch_is_its_own_token():
    spectrogram = np.arange(32 * 48, dtype="float32").reshape(32, 48)
    tokens, _ = patch_tokens(spectrogram, PatchSettings((16,)))
    assert tokens.shape == (6, 256)
    # Band 1, patch 1 in time: bin 16 + 2 at frame 16 + 3 is element 2 * 16 + 3 of token 3.
    np.testing.assert_allclose(tokens[3, 2 * 16 + 3], spectrogram[19, 18], rtol=1e-5)


@pytest.mark.parametrize("resize", ["pi", "bilinear"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resized_data_is_the_resized_kernel(size, resize):
    """<token, kernel> = <patch, resized kernel>: one base kernel serves every size."""
    patch_f, patch_t = pair(size)
    patch = spectrogram_of(patch_t, patch_f)
    kernel = np.random.default_rng(2).normal(size=(BASE_PATCH, BASE_PATCH, 3))
    tokens, _ = patch_tokens(patch, PatchSettings((size,), resize=resize))
    on_weights = np.einsum("ft,ftd->d", patch.T, resize_kernel(kernel, size, resize))
    on_data = tokens[0].numpy() @ kernel.reshape(256, 3)
    np.testing.assert_allclose(on_data, on_weights, rtol=0, atol=2e-5 * np.abs(tokens).max())


def test_kernel_matrices_by_hand():
    np.testing.assert_allclose(kernel_matrix(16), np.eye(16), atol=1e-12)
    # Half the size without antialias is the mean of two neighbors; the least-norm way
    # back repeats each of them.
    np.testing.assert_allclose(kernel_matrix(8).T, np.kron(np.eye(8), [[1], [1]]), atol=1e-12)
    for size in PATCH_SIZES:
        inverse = kernel_matrix(size).T @ bilinear(size)
        if size >= BASE_PATCH:  # enlarging loses nothing
            np.testing.assert_allclose(inverse, np.eye(16), atol=1e-11)


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grid_positions(size, remainder):
    settings = PatchSettings((size,), remainder=remainder, position="grid", grid=(7, 59))
    _, positions = patch_tokens(spectrogram_of(151, 107), settings)
    count_f, count_t = (
        len(starts_of(cells, patch, remainder))
        for cells, patch in zip((107, 151), pair(size), strict=True)
    )
    expected = [
        [(f + 0.5) * 7 / count_f - 0.5, (t + 0.5) * 59 / count_t - 0.5, 7 / count_f, 59 / count_t]
        for f in range(count_f)
        for t in range(count_t)
    ]
    np.testing.assert_allclose(positions, expected, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_physical_positions(size, remainder):
    settings = PatchSettings((size,), remainder=remainder, position="physical")
    scale = 1.6
    _, positions = patch_tokens(spectrogram_of(151, 107), settings, frame_shift_scale=scale)
    patch_f, patch_t = pair(size)
    expected = [
        [
            (f + patch_f / 2) / 16 - 0.5,
            (t + patch_t / 2) * scale / 16 - 0.5,
            patch_f / 16,
            patch_t * scale / 16,
        ]
        for f in starts_of(107, patch_f, remainder)
        for t in starts_of(151, patch_t, remainder)
    ]
    np.testing.assert_allclose(positions, expected, rtol=1e-6, atol=1e-6)


def test_a_second_is_a_second_at_every_frame_shift():
    fine = patch_tokens(spectrogram_of(192, 64), PatchSettings(((16, 32),)))[1].numpy()
    coarse = patch_tokens(
        spectrogram_of(96, 64), PatchSettings((16,)), frame_shift_scale=tf.constant(2.0)
    )[1].numpy()
    np.testing.assert_allclose(coarse, fine, rtol=1e-6)
    seconds = (coarse[:6, 1] + 0.5) * 16 * 0.010  # 16 frames of 10 ms a cell
    np.testing.assert_allclose(seconds, [0.16, 0.48, 0.80, 1.12, 1.44, 1.76], rtol=1e-6)


def test_positions_of_base_patches_are_the_table_itself():
    for position in ("grid", "physical"):
        settings = PatchSettings((16,), position=position, grid=(3, 5))
        _, positions = patch_tokens(spectrogram_of(80, 48), settings)
        expected = [[f, t, 1, 1] for f in range(3) for t in range(5)]
        np.testing.assert_allclose(positions, expected, atol=1e-6)
        np.testing.assert_allclose(table_weights(positions[:5, 1], 1.0, 5), np.eye(5), atol=1e-6)


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("frames", [1, 7, 19])
def test_a_clip_shorter_than_one_patch_is_padded(frames, remainder):
    settings = PatchSettings(((13, 20),), remainder=remainder, position="physical")
    short = spectrogram_of(frames, 53)
    found = patch_tokens(short, settings)
    padded = patch_tokens(np.pad(short, [(0, 20 - frames), (0, 0)]), settings)
    assert len(found[0]) == len(starts_of(53, 13, remainder))
    for one, other in zip(found, padded, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("prefix_tokens", [0, 2])
def test_max_tokens_crops_the_end(remainder, prefix_tokens):
    settings = PatchSettings((10,), remainder=remainder, prefix_tokens=prefix_tokens)
    spectrogram = spectrogram_of(97, 40)
    whole, _ = patch_tokens(spectrogram, settings)
    found = patch_tokens(spectrogram, settings, max_tokens=23)
    # 23 tokens hold 5 columns of 4 bands: the first 50 frames.
    expected = patch_tokens(spectrogram[:50], settings)
    assert len(found[0]) == 20 + prefix_tokens < len(whole)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    kept, _ = patch_tokens(spectrogram, settings, max_tokens=len(whole))
    np.testing.assert_array_equal(kept, whole)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
def test_prefix_tokens_have_extent_zero(prefix_tokens):
    spectrogram = spectrogram_of(61, 47)
    plain = patch_tokens(spectrogram, PatchSettings((12,)))
    tokens, positions = patch_tokens(spectrogram, PatchSettings((12,), prefix_tokens=prefix_tokens))
    marked = (positions[:, 2] == 0) & (positions[:, 3] == 0)
    np.testing.assert_array_equal(marked, np.arange(len(tokens)) < prefix_tokens)
    np.testing.assert_array_equal(tokens[:prefix_tokens], np.zeros([prefix_tokens, 256]))
    expected = [[k, 0, 0, 0] for k in range(prefix_tokens)]
    np.testing.assert_array_equal(positions[:prefix_tokens], np.reshape(expected, [-1, 4]))
    np.testing.assert_array_equal(tokens[prefix_tokens:], plain[0])
    np.testing.assert_array_equal(positions[prefix_tokens:], plain[1])


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_a_drawn_size_is_the_fixed_size(remainder):
    """A tensor as choice, frames unknown, in tf.data: as if the size were the only one."""
    settings = PatchSettings(SIZES, remainder=remainder, prefix_tokens=1)
    spectrogram = spectrogram_of(83, 61)
    dataset = tf.data.Dataset.range(len(SIZES), output_type=tf.int32).map(
        lambda choice: patch_tokens(
            tf.ensure_shape(tf.repeat(spectrogram, choice * 0 + 1, axis=0), [None, 61]),
            settings,
            choice=choice,
        )
    )
    assert [spec.shape.as_list() for spec in dataset.element_spec] == [[None, 256], [None, 4]]
    for size, drawn in zip(SIZES, dataset, strict=True):
        fixed = patch_tokens(
            spectrogram, PatchSettings((size,), remainder=remainder, prefix_tokens=1)
        )
        np.testing.assert_allclose(drawn[0], fixed[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(drawn[1], fixed[1], rtol=1e-6)


@pytest.mark.parametrize("remainder", REMAINDERS)
def test_number_of_tokens(remainder):
    settings = PatchSettings((8, (12, 20), 48), remainder=remainder, prefix_tokens=2)
    count = tf.function(
        lambda spectrogram, choice: tf.shape(patch_tokens(spectrogram, settings, choice=choice)[0])[
            0
        ],
        [tf.TensorSpec([None, 53], tf.float32), tf.TensorSpec([], tf.int32)],
    )
    frames = np.array([1, 7, 8, 9, 19, 20, 21, 47, 48, 49, 95, 96, 97, 131])
    for choice, size in enumerate(settings.patch_sizes):
        expected = token_count(frames, 53, size, settings)
        found = [count(np.zeros([n, 53], "float32"), choice) for n in frames]
        np.testing.assert_array_equal(found, expected)
        by_hand = [
            len(starts_of(53, size[0], remainder))
            * len(starts_of(max(n, size[1]), size[1], remainder))
            + 2
            for n in frames
        ]
        np.testing.assert_array_equal(expected, by_hand)


@pytest.mark.parametrize(
    ("size", "patch"), [(107, 12), (151, 48), (53, 53), (54, 53), (128, 16), (1024, 48)]
)
def test_cover_misses_no_cell(size, patch):
    starts, _, _ = axis_grid(
        size, patch, axis=Axis(16, 16, 8), remainder="cover", position="physical"
    )
    assert starts[0] == 0 and starts[-1] == size - patch and len(starts) == -(-size // patch)
    steps = np.diff(starts)
    assert (steps <= patch).all() and (np.ptp(steps) <= 1 if len(steps) else size == patch)
    np.testing.assert_array_equal(starts, starts_of(size, patch, "cover"))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("size", [(16, 16), (10, 24)])
def test_a_clip_has_its_own_patches_in_a_longer_spectrogram(size, remainder, position):
    base, stride = GEOMETRIES["16 every 10"]
    settings = PatchSettings(
        (size,), remainder=remainder, position=position, base_patch=base, stride=stride, grid=(5, 9)
    )
    lengths = [101, 100, 59, 25, 24, 23, 7, 0]
    spectrograms = np.stack([spectrogram_of(101, 67, seed) for seed in range(len(lengths))])
    for clip, length in enumerate(lengths):
        spectrograms[clip, length:] = 0
    patches, positions, segment_ids = padded_patches(
        spectrograms, tf.constant(lengths), settings, frame_shift_scale=1.5
    )
    over_f, over_t = (kernel_matrix(patch, 16) for patch in size)
    tokens = np.einsum("pf,cnpq,qt->cnft", over_f, patches, over_t)
    for clip, length in enumerate(lengths):
        expected = patch_tokens(spectrograms[clip, :length], settings, frame_shift_scale=1.5)
        exists = segment_ids[clip].numpy() == 1
        assert exists.sum() == token_count(length, 67, size, settings)
        found = tokens[clip][exists].reshape(-1, 256), positions[clip].numpy()[exists]
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_mistakes():
    with pytest.raises(ValueError, match=r"patch_size is 48 along frequency, larger than .* 40"):
        patch_tokens(spectrogram_of(97, 40), PatchSettings((16, 48)))
    for values, message in (
        ({"patch_sizes": ()}, "patch_sizes is empty"),
        ({"patch_sizes": (0,)}, "patch_size=0 must be one whole number from 1 to 4096"),
        ({"patch_sizes": ((8, 8, 8),)}, r"patch_size=\(8, 8, 8\) must be"),
        ({"patch_sizes": (8.5,)}, r"patch_size=8\.5 must be"),
        ({"frame_shifts_ms": (10, 0)}, "frame_shifts_ms=0 must be a positive number"),
        ({"frame_shifts_ms": (float("nan"),)}, "frame_shifts_ms=nan must be a positive number"),
        ({"grid": (0, 0)}, r"grid=\(0, 0\) must be one whole number from 1 to 100000, or two"),
        ({"grid": (8, float("inf"))}, r"grid=\(8, inf\) must be"),
        ({"remainder": "wrap"}, "remainder='wrap' is unknown. Choose one of 'crop', 'pad', 'cov"),
        ({"prefix_tokens": 3}, "prefix_tokens=3 is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            PatchSettings(**values)
    assert PatchSettings(grid=(8, 22500)).grid == (8, 22500)  # an hour at 10 ms
    assert PatchSettings.from_dict(PatchSettings((8, [12, 20])).to_dict()) == PatchSettings(
        (8, (12, 20))
    )
