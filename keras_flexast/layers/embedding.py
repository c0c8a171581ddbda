"""Patches and positions: everything between a spectrogram and the first encoder block."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_flexast.hints import Shape, Tensor
from keras_flexast.layers.configured import ConfiguredLayer
from tf_data_pipelines.hints import PatchSize
from tf_data_pipelines.resize import axis_grid, kernel_matrix
from tf_data_pipelines.settings import (
    BASE_PATCH,
    RESIZES,
    base_and_stride,
    base_axes,
    check_choice,
    patch_pair,
)


@keras.saving.register_keras_serializable(package="keras_flexast")
class PIResizePatchEmbed(ConfiguredLayer):
    """Linear embedding of patches of any size, with one kernel of the base size.

    With `B` the bilinear matrix from the base size to p_f x p_t, PI-resize computes the kernel
    `pinv(B^T) w`. The same inner product comes out when the patch is mapped to the base
    size instead, `<x, pinv(B^T) w> = <pinv(B) x, w>`; so this layer takes either.

    Args:
        dim: width of the embedding.
        base_patch: int or (frequency, time), the size of the base kernel.
        resize: "pi", or "bilinear" (the papers' ablation), for raw patches; tokens are
            resized in the pipeline.

    Call arguments:
        patches: tokens already mapped to the base size, float (batch, tokens, 256),
            frequency-major inside a patch; or raw patches (batch, tokens, p_f, p_t),
            for which the kernel is resized.
        resize: as above, for this call; None for the layer's own.

    Output:
        float (batch, tokens, dim).

    Example:
        embed = PIResizePatchEmbed(dim=192)
        embed(np.zeros((2, 5, 256)))     # (2, 5, 192)
        embed(np.zeros((2, 5, 24, 30)))  # (2, 5, 192), same weights

    Reference: FlexiAST, Feng et al. 2023 (arXiv:2307.09286).
    """

    def __init__(
        self, dim: int, base_patch: PatchSize = BASE_PATCH, resize: str = "pi", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_choice("resize", resize, RESIZES)
        self.dim = dim
        self.base_patch = patch_pair(base_patch, "base_patch")
        self.resize = resize

    def build(self, input_shape: Shape) -> None:
        area = self.base_patch[0] * self.base_patch[1]
        if len(input_shape) not in (3, 4) or (len(input_shape) == 3 and input_shape[-1] != area):
            raise ValueError(
                f"patches have shape {tuple(input_shape)}; expected tokens "
                f"(batch, tokens, {area}) or raw patches (batch, tokens, p_f, p_t)."
            )
        self.kernel = self.add_weight(
            shape=(*self.base_patch, self.dim),
            initializer=keras.initializers.RandomUniform(-(area**-0.5), area**-0.5),
            name="kernel",
        )
        self.bias = self.add_weight(shape=(self.dim,), initializer="zeros", name="bias")
        self.built = True

    def call(self, patches: Tensor, resize: str | None = None) -> Tensor:
        kernel, size = self.kernel, self.base_patch
        if len(patches.shape) == 4:
            size = tuple(patches.shape[2:])
            kernel = self.resized_kernel(size, resize)
            patches = ops.reshape(patches, (-1, patches.shape[1], size[0] * size[1]))
        kernel = ops.reshape(kernel, (size[0] * size[1], self.dim))
        return ops.matmul(patches, kernel) + self.bias

    def resized_kernel(self, patch_size: tuple[int, int], resize: str | None = None) -> Tensor:
        """The kernel at (p_f, p_t), (p_f, p_t, dim); the base kernel itself at the base size."""
        if tuple(patch_size) == self.base_patch:
            return self.kernel
        over_f, over_t = (
            kernel_matrix(patch, base, resize or self.resize)
            for patch, base in zip(patch_size, self.base_patch, strict=True)
        )
        kernel = ops.einsum("pf,ftd->ptd", ops.cast(over_f, self.compute_dtype), self.kernel)
        return ops.einsum("qt,ptd->pqd", ops.cast(over_t, self.compute_dtype), kernel)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape[:2], self.dim)


@keras.saving.register_keras_serializable(package="keras_flexast")
class PositionEmbedding(ConfiguredLayer):
    """Embedding of continuous positions, looked up in a table with triangular weights.

    A token with center c and extent s (in cells of the table) gets
    `sum_j tri((c - j) / max(1, s)) E_j / sum_j tri(...)` on each axis: antialiased bilinear
    resizing of the table, for any grid and any length, with static shapes. Beyond the
    table's ends the end cells count.

    Args:
        dim: width of the embedding.
        grid: (frequency, time) cells of the table.
        table: "joint", one (frequency, time) table as ViT and AST have; or "factorized",
            one table an axis, added, as ElasticAST has.

    Call arguments:
        positions: float (batch, tokens, 4): frequency center, time center, frequency
            extent, time extent.

    Output:
        float (batch, tokens, dim).

    Reference: ElasticAST, Feng et al. 2024 (arXiv:2407.08691); NaViT, Dehghani et al. 2023.
    """

    def __init__(self, dim, grid=(8, 64), table="joint", **kwargs):
        # Inputs stay float32 in mixed precision: 200.5 has no bfloat16.
        super().__init__(autocast=False, **kwargs)
        check_choice("table", table, ("joint", "factorized"))
        self.dim = dim
        self.grid = tuple(grid)
        self.table = table

    def build(self, input_shape):
        normal = keras.initializers.TruncatedNormal(stddev=0.02)
        freq, time = self.grid
        if self.table == "joint":
            self.joint = self.add_weight(
                shape=(freq, time, self.dim), initializer=normal, name="joint"
            )
        else:
            self.freq = self.add_weight(shape=(freq, self.dim), initializer=normal, name="freq")
            self.time = self.add_weight(
                shape=(time, self.dim), initializer=normal.clone(), name="time"
            )
        self.built = True

    def call(self, positions):
        positions = ops.cast(positions, "float32")
        over_f = self._weights(positions[..., 0], positions[..., 2], self.grid[0])
        over_t = self._weights(positions[..., 1], positions[..., 3], self.grid[1])

        def table(weight):
            return ops.cast(ops.reshape(weight, (-1, self.dim)), self.compute_dtype)

        if self.table == "factorized":
            return ops.matmul(over_f, table(self.freq)) + ops.matmul(over_t, table(self.time))
        freq, time = self.grid
        both = over_f[..., :, None] * over_t[..., None, :]
        both = ops.reshape(both, (*ops.shape(positions)[:2], freq * time))
        return ops.matmul(both, table(self.joint))

    def _weights(self, centers, extents, cells):
        """(batch, tokens) -> (batch, tokens, cells); rows sum to 1."""
        centers = ops.clip(centers, 0, cells - 1)[..., None]
        distance = ops.abs(centers - ops.arange(cells, dtype="float32"))
        weights = ops.relu(1 - distance / ops.maximum(extents, 1.0)[..., None])
        weights = weights / ops.sum(weights, -1, keepdims=True)
        return ops.cast(weights, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:2], self.dim)


@keras.saving.register_keras_serializable(package="keras_flexast")
class PrefixTokens(ConfiguredLayer):
    """[CLS]-like tokens: put into the places that the positions mark with extent 0.

    Args:
        count: prefix tokens per clip: 1 ([CLS]) or 2 ([CLS] and distillation).

    Call arguments:
        embedded: float (batch, tokens, dim).
        positions: float (batch, tokens, 4). A token of frequency extent 0 is a prefix
            token; its frequency center says which one.

    Output:
        float (batch, tokens, dim); other tokens unchanged. Without positions, (batch,
        count + tokens, dim): the prefix tokens are put first, as for unpacked clips.
    """

    def __init__(self, count, **kwargs):
        super().__init__(**kwargs)
        self.count = count

    def build(self, embedded_shape, positions_shape=None):
        self.tokens = self.add_weight(
            shape=(self.count, embedded_shape[-1]),
            initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            name="tokens",
        )
        self.built = True

    def call(self, embedded, positions=None):
        if positions is None:
            shape = (ops.shape(embedded)[0], self.count, embedded.shape[-1])
            prefix = ops.cast(ops.broadcast_to(self.tokens, shape), embedded.dtype)
            return ops.concatenate([prefix, embedded], 1)
        which = ops.one_hot(ops.cast(positions[..., 0], "int32"), self.count, dtype=embedded.dtype)
        is_prefix = ops.equal(positions[..., 2:3], 0)
        return ops.where(is_prefix, ops.matmul(which, self.tokens), embedded)

    def compute_output_shape(self, embedded_shape, positions_shape=None):
        if positions_shape is not None:
            return embedded_shape
        batch, tokens, dim = embedded_shape
        return (batch, None if tokens is None else tokens + self.count, dim)


@keras.saving.register_keras_serializable(package="keras_flexast")
class PatchGrid(ConfiguredLayer):
    """Cut spectrograms of one known length into raw patches of one size.

    Args:
        patch_size: int or (frequency, time).
        remainder: "crop", "pad" or "cover", as PatchSettings.
        position: "grid" or "physical".
        grid, base_patch, stride: as PatchSettings.
        frame_shift_scale: the spectrogram's frame shift over that of training.

    Call arguments:
        spectrogram: float (batch, frames, mel_bins), normalized; both sizes static.

    Output:
        patches float (batch, tokens, p_f, p_t) and positions float (1, tokens, 4), tokens
        running through time inside each band.
    """

    def __init__(
        self, patch_size, remainder, *, position, grid, base_patch=BASE_PATCH, stride=None,
        frame_shift_scale=1.0, **kwargs,
    ):  # fmt: skip
        super().__init__(**kwargs)
        self.patch_size = patch_pair(patch_size)
        self.remainder = remainder
        self.position = position
        self.grid = tuple(grid)
        self.base_patch, self.stride = base_and_stride(base_patch, stride)
        self.frame_shift_scale = frame_shift_scale

    def build(self, input_shape):
        _, frames, mel_bins = input_shape
        axis_f, axis_t = base_axes(self.base_patch, self.stride, self.grid)
        patch_f, patch_t = self.patch_size
        policies = {"remainder": self.remainder, "position": self.position}
        self._freq, center_f, extent_f = axis_grid(
            mel_bins, patch_f, axis=axis_f, name="frequency", **policies
        )
        self._time, center_t, extent_t = axis_grid(
            frames, patch_t, axis=axis_t, name="time", scale=self.frame_shift_scale, **policies
        )
        columns = (
            np.meshgrid(center_f, center_t, indexing="ij"),
            np.meshgrid(extent_f, extent_t, indexing="ij"),
        )
        positions = np.reshape(columns, (4, -1)).T  # time runs inside each band
        self._positions = positions[None].astype("float32")
        self.built = True

    def call(self, spectrogram):
        (patch_f, patch_t), (_, frames, mel_bins) = self.patch_size, spectrogram.shape
        beyond_f = max(0, self._freq[-1] + patch_f - mel_bins)  # only "pad" has any
        beyond_t = max(0, self._time[-1] + patch_t - frames)
        x = ops.pad(spectrogram, [[0, 0], [0, beyond_t], [0, beyond_f]])
        count_f, count_t = len(self._freq), len(self._time)
        x = ops.take(x, (self._time[:, None] + np.arange(patch_t)).ravel(), axis=1)
        x = ops.take(x, (self._freq[:, None] + np.arange(patch_f)).ravel(), axis=2)
        x = ops.reshape(x, (-1, count_t, patch_t, count_f, patch_f))
        x = ops.transpose(x, (0, 3, 1, 4, 2))
        patches = ops.reshape(x, (-1, count_f * count_t, patch_f, patch_t))
        return patches, ops.convert_to_tensor(self._positions)

    def compute_output_spec(self, spectrogram):
        tokens = self._positions.shape[1]
        return (
            keras.KerasTensor((spectrogram.shape[0], tokens, *self.patch_size), self.compute_dtype),
            keras.KerasTensor((1, tokens, 4), "float32"),
        )
