"""One transformer, two faces: packed rows of mixed clips, and clips of one fixed shape."""

from collections.abc import Sequence
from typing import Any, Self

import keras

from keras_flexast.layers import (
    EncoderBlock,
    MaskAttentionPooling,
    MeanPooling,
    PatchGrid,
    PIResizePatchEmbed,
    PositionEmbedding,
    PrefixPooling,
    PrefixTokens,
)
from keras_flexast.layers.configured import arguments_of
from keras_flexast.settings import POOLINGS, SIZES
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.settings import (
    BASE_PATCH,
    POSITIONS,
    REMAINDERS,
    PatchSettings,
    base_and_stride,
    check_choice,
)


class _PackedModel(keras.Model):
    """How packed models are made from configs, quantized layers one by one, and exported."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return made_with_policy(cls, config, "dtype")

    def export(
        self,
        filepath: PathLike,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().export(filepath, format, verbose, **export_options(self, kwargs))


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedBackbone(_PackedModel):
    """Transformer encoder on packed rows: from patches to one vector per token.

    A functional model. Its layers are attributes: `patch_embed`, `position_embed`, `prefix`
    (PrefixTokens, or None), `blocks` (a list of EncoderBlock) and `norm`.

    Args:
        dim: width of the tokens.
        depth: number of blocks.
        num_heads: number of attention heads in a block.
        mlp_ratio: hidden width of a block over dim.
        prefix_tokens: number of [CLS]-like tokens before each clip, 0, 1 or 2.
        table: kind of position table, "joint" or "factorized", see PositionEmbedding.
        grid: (frequency, time) cells of the position table. Later positions share the last
            cell.
        base_patch: int or (frequency, time): bins and frames of the patch kernel.
        resize: "pi" or "bilinear": how raw patches of other sizes are embedded.
        dropout: dropout rate in every block.
        attention_scale: factor on the query-key products; None for 1 / sqrt(width of a head).
        norm_epsilon: epsilon of the LayerNorms.
        attention: implementation of self-attention, see MaskedSelfAttention.
        remat: gradient checkpointing of every block, see EncoderBlock.
        dtype: dtype policy of the layers.
        name, trainable: as in keras.Model.

    Call arguments:
        inputs: dictionary of `tokens` float (rows, length, 256), the area of the base
            patch, `positions` float (rows, length, 4) and `segment_ids` int (rows, length).

    Output:
        float (rows, length, dim), after the last LayerNorm.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4,
        prefix_tokens: int = 0,
        table: str = "factorized",
        grid: tuple[int, int] = (8, 64),
        base_patch: PatchSize = BASE_PATCH,
        resize: str = "pi",
        dropout: float = 0.0,
        attention_scale: float | None = None,
        norm_epsilon: float = 1e-6,
        attention: str = "auto",
        remat: bool = False,
        dtype: str | keras.DTypePolicy | None = None,
        name: str | None = None,
        trainable: bool = True,
    ) -> None:
        check_choice("prefix_tokens", prefix_tokens, (0, 1, 2))
        base_patch, _ = base_and_stride(base_patch, None)

        # === Layers ===
        patch_embed = PIResizePatchEmbed(dim, base_patch, resize, dtype=dtype, name="patch_embed")
        position_embed = PositionEmbedding(dim, grid, table, dtype=dtype, name="position_embed")
        prefix = None
        if prefix_tokens:
            prefix = PrefixTokens(prefix_tokens, dtype=dtype, name="prefix_tokens")
        block = {
            "dropout": dropout, "scale": attention_scale, "norm_epsilon": norm_epsilon,
            "attention": attention, "remat": remat, "dtype": dtype,
        }  # fmt: skip
        blocks = [
            EncoderBlock(num_heads, round(dim * mlp_ratio), **block, name=f"block_{index}")
            for index in range(depth)
        ]
        norm = keras.layers.LayerNormalization(epsilon=norm_epsilon, dtype=dtype, name="norm")

        # === Functional model ===
        inputs = {
            "tokens": keras.Input((None, base_patch[0] * base_patch[1]), name="tokens"),
            "positions": keras.Input((None, 4), name="positions"),
            "segment_ids": keras.Input((None,), dtype="int32", name="segment_ids"),
        }
        positions, segment_ids = inputs["positions"], inputs["segment_ids"]
        x = patch_embed(inputs["tokens"]) + position_embed(positions)
        if prefix is not None:
            x = prefix(x, positions)
        for one in blocks:
            x = one(x, segment_ids)
        super().__init__(inputs=inputs, outputs=norm(x), name=name)
        self.patch_embed, self.position_embed, self.prefix = patch_embed, position_embed, prefix
        self.blocks, self.norm = blocks, norm
        if not trainable:
            self.trainable = False  # of all layers

        # === Config ===
        self.dim = dim
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.prefix_tokens = prefix_tokens
        self.table = table
        self.grid = tuple(grid)
        self.base_patch = base_patch
        self.resize = resize
        self.dropout = dropout
        self.attention_scale = attention_scale
        self.norm_epsilon = norm_epsilon
        self.attention = attention
        self.remat = remat

    def patch_settings(
        self, patch_sizes: Sequence[PatchSize] | None = None, **options: Any
    ) -> PatchSettings:
        """PatchSettings of clips for this backbone.

        Args:
            patch_sizes: ints or (frequency, time) pairs to draw from; None for base_patch.
            **options: other settings of PatchSettings.
        """
        names = ("resize", "prefix_tokens", "grid", "base_patch")
        own = {name: getattr(self, name) for name in names}
        return PatchSettings(tuple(patch_sizes or (self.base_patch,)), **{**own, **options})

    def get_config(self) -> dict[str, Any]:
        policy = policy_of(self, self.patch_embed.dtype_policy)
        own = {"name": self.name, "trainable": self.trainable, "dtype": policy}
        return {**own, **arguments_of(self, leave_out=["dtype"])}


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedAST(_PackedModel):
    """Audio spectrogram transformer on packed rows: any patch size, length and frame shift.

    A functional model. `FlexiAST` and `ElasticAST` are its two named configurations; every
    combination in between works. `fixed_model` gives its other face. Its parts are attributes:
    `backbone` (PackedBackbone), `pooling`, `head_norm` and `head`.

    Args:
        num_classes: number of classes.
        size: "nano", "tiny", "small" or "base": sets dim, depth and num_heads; None where
            these are given.
        pooling: "attention" (one learned query per clip), "cls" or "cls_distillation" (the
            mean of one or two prefix tokens), or "mean" (of the patches, as SSAST).
        prefix_tokens: 0, 1 or 2 tokens before each clip; None for what the pooling needs.
        table: position table, "joint" or "factorized"; None for what the papers have with
            that pooling: factorized with attention, else joint.
        stride: int or (frequency, time): bins and frames from one base patch, and one cell
            of the table, to the next; None for base_patch, without overlap. Standard ASTs
            have 10. Patches of other sizes overlap by the same share.
        mel_bins: bins of the spectrograms; None for what the grid spans.
        segments: clip slots in a row.
        remainder, position: policies of the patch grid that the model is trained with,
            see PatchSettings; `fixed_model` follows them.
        head_norm_epsilon: epsilon of the head's LayerNorm.
        dtype: dtype policy of all layers but the head, which computes in float32.
        name, trainable: as in keras.Model.
        **backbone: other arguments of PackedBackbone, such as dim, grid or dropout.

    Call arguments:
        inputs: packed batch, as for PackedBackbone.

    Output:
        logits float32 (rows, segments, num_classes). Slots without a clip hold finite
        numbers without meaning; their weight in the packed batch is 0.
    """

    def __init__(
        self,
        num_classes: int,
        size: str | None = None,
        *,
        pooling: str = "attention",
        prefix_tokens: int | None = None,
        table: str | None = None,
        stride: PatchSize | None = None,
        mel_bins: int | None = None,
        segments: int = 16,
        remainder: str = "cover",
        position: str = "physical",
        head_norm_epsilon: float = 1e-6,
        dtype: str | keras.DTypePolicy | None = None,
        name: str | None = None,
        trainable: bool = True,
        **backbone: Any,
    ) -> None:
        check_choice("pooling", pooling, tuple(POOLINGS))
        check_choice("remainder", remainder, REMAINDERS)
        check_choice("position", position, POSITIONS)
        if prefix_tokens is None:
            prefix_tokens = POOLINGS[pooling]
        if pooling.startswith("cls") and prefix_tokens != POOLINGS[pooling]:
            raise ValueError(
                f"prefix_tokens={prefix_tokens} does not fit pooling={pooling!r}; leave it out."
            )
        options = {
            **_with_dimensions(size, backbone),
            "prefix_tokens": prefix_tokens,
            "table": table or ("factorized" if pooling == "attention" else "joint"),
        }
        base_patch, stride = base_and_stride(options.get("base_patch", BASE_PATCH), stride)

        # === Layers ===
        head = keras.layers.Dense(num_classes, dtype="float32", name="head")
        encoder = PackedBackbone(**options, dtype=dtype, name="backbone")
        pool = pooling_layer(encoder, pooling, segments, dtype=dtype)
        head_norm = keras.layers.LayerNormalization(
            epsilon=head_norm_epsilon, dtype=dtype, name="head_norm"
        )

        # === Functional model ===
        inputs = encoder.input
        logits = head(head_norm(pooled_clips(pool, encoder(inputs), inputs)))
        super().__init__(inputs=inputs, outputs=logits, name=name)
        self.backbone, self.pooling, self.head_norm, self.head = encoder, pool, head_norm, head
        if not trainable:
            self.trainable = False  # of all layers

        # === Config ===
        self.num_classes = num_classes
        self.pooling_name = pooling  # `pooling` is the layer
        self.stride = stride
        self.mel_bins = mel_bins
        if mel_bins is None:
            self.mel_bins = (self.backbone.grid[0] - 1) * stride[0] + base_patch[0]
        self.segments = segments
        self.remainder = remainder
        self.position = position
        self.head_norm_epsilon = head_norm_epsilon

    def patch_settings(
        self, patch_sizes: Sequence[PatchSize] | None = None, **options: Any
    ) -> PatchSettings:
        """PatchSettings of clips for this model.

        Args:
            patch_sizes: ints or (frequency, time) pairs to draw from; None for base_patch.
            **options: other settings of PatchSettings, such as frame_shifts_ms, or another
                remainder, position or resize than the model was trained with.
        """
        own = {name: getattr(self, name) for name in ("remainder", "position", "stride")}
        return self.backbone.patch_settings(patch_sizes, **{**own, **options})

    def get_config(self) -> dict[str, Any]:
        of_backbone = ("size", "prefix_tokens", "table", "backbone")
        own = arguments_of(self, leave_out=["pooling", "dtype", *of_backbone])
        policy = policy_of(self, self.backbone.patch_embed.dtype_policy)
        own.update(pooling=self.pooling_name, dtype=policy)
        return {**self.backbone.get_config(), **own}


def pooling_layer(backbone, pooling, segments, dtype=None):
    """The layer that makes one vector of each clip's tokens; arguments as in PackedAST."""
    if pooling == "attention":
        heads, scale = backbone.num_heads, backbone.attention_scale
        return MaskAttentionPooling(heads, segments, scale, dtype=dtype, name="pooling")
    kind = MeanPooling if pooling == "mean" else PrefixPooling
    return kind(backbone.prefix_tokens, segments, dtype=dtype, name="pooling")


def pooled_clips(pool, tokens, inputs):
    """One vector per slot (rows, segments, dim), from tokens of packed inputs."""
    keys = ["segment_ids"]
    if not isinstance(pool, MaskAttentionPooling):
        keys = ["positions", *keys]
    return pool(tokens, *(inputs[key] for key in keys))


def FlexiAST(
    num_classes: int, size: str | None = "base", pooling: str = "cls", **kwargs: Any
) -> PackedAST:
    """FlexiAST: [CLS] (or [CLS] and distillation) pooling, joint position table.

    Args: as in PackedAST; pooling is "cls" or "cls_distillation".

    Returns:
        PackedAST. The LayerNorm of its head has AST's epsilon, 1e-5.

    Reference: FlexiAST, Feng et al. 2023 (arXiv:2307.09286).
    """
    kwargs = {"head_norm_epsilon": 1e-5, **kwargs}
    return PackedAST(num_classes, size, pooling=pooling, **kwargs)


def ElasticAST(num_classes: int, size: str | None = "base", **kwargs: Any) -> PackedAST:
    """ElasticAST: mask attention pooling, one position table per axis.

    Args: as in PackedAST.

    Returns:
        PackedAST. The time table has 192 cells, 30 s at a frame shift of 10 ms.

    Reference: ElasticAST, Feng et al. 2024 (arXiv:2407.08691).
    """
    return PackedAST(num_classes, size, **{"pooling": "attention", "grid": (8, 192), **kwargs})


def fixed_model(
    model: PackedAST,
    patch_size: PatchSize,
    frames: int,
    *,
    remainder: str | None = None,
    position: str | None = None,
    resize: str | None = None,
    frame_shift_scale: float = 1.0,
    output: str = "logits",
) -> keras.Model:
    """The fixed face of a packed model: one patch size, one length, ready to export.

    It shares the model's layers: what one learns the other knows. Patch kernel and position
    table are resized in the graph, and become constants where a graph is frozen (TFLite).

    Args:
        model: PackedAST.
        patch_size: int or (frequency, time).
        frames: number of frames of every spectrogram.
        remainder, position, resize: as in PatchSettings; None for what the model was trained
            with.
        frame_shift_scale: the frame shift over that of training.
        output: "logits", or "embedding": one vector per clip, before the head and its norm.

    Returns:
        functional keras.Model from normalized log-mel float32 (batch, frames, mel_bins) to
        logits float32 (batch, num_classes), or embeddings (batch, dim), equal to the packed
        model's for the same clip.

    Raises:
        ValueError: the patch is larger than the spectrogram, a policy is unknown, or the model
            is no PackedAST.

    Example:
        fixed = fixed_model(model, patch_size=(16, 24), frames=1024)
    """
    _check_packed(model)
    backbone = model.backbone
    check_choice("output", output, ("logits", "embedding"))
    given = {"remainder": remainder, "position": position, "resize": resize}
    given = {name: value for name, value in given.items() if value is not None}
    patches = model.patch_settings((patch_size,), **given)
    patch_grid = PatchGrid(
        patch_size, patches.remainder, position=patches.position, grid=patches.grid,
        base_patch=patches.base_patch, stride=patches.stride, frame_shift_scale=frame_shift_scale,
        dtype=backbone.patch_embed.dtype_policy, name="patch_grid",
    )  # fmt: skip
    spectrogram = keras.Input((frames, model.mel_bins), name="spectrogram")
    cut, positions = patch_grid(spectrogram)
    x = backbone.patch_embed(cut, resize=patches.resize) + backbone.position_embed(positions)
    if backbone.prefix is not None:
        x = backbone.prefix(x)
    for block in backbone.blocks:
        x = block(x)
    pooled = model.pooling(backbone.norm(x))
    if output == "logits":
        pooled = model.head(model.head_norm(pooled))
    return keras.Model(spectrogram, pooled[:, 0], name=f"{model.name}_fixed")


def embedding_model(model):
    """The part of a PackedAST from packed batches to embeddings, one vector per clip.

    Returns:
        functional keras.Model that shares the model's layers; its output is float (rows,
        segments, dim), what pooling gives the head.
    """
    _check_packed(model)
    return keras.Model(model.input, model.pooling.output, name="embedding")


def _check_packed(model):
    if not isinstance(model, PackedAST):
        raise ValueError(
            f"model is a {type(model).__name__}; expected a PackedAST. keras.models.clone_model "
            f"makes a plain Functional: use PackedAST.from_config(model.get_config()) instead."
        )


def _with_dimensions(size, options):
    """The options with the size's dim, depth and num_heads where they are not given."""
    names = ("dim", "depth", "num_heads")
    if size is not None:
        check_choice("size", size, tuple(SIZES))
        defaults = dict(zip(names, SIZES[size], strict=True))
        options = {**options, **{n: options.get(n) or defaults[n] for n in names}}
    given = {name: options.get(name) for name in names}
    if None in given.values():
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{listed}: give all three, or size= one of {', '.join(SIZES)}.")
    return options


def export_options(model, options):
    """Options of keras.Model.export that suit a model on packed rows, on either backend."""
    if keras.backend.backend() != "jax" or "input_signature" in options:
        return options
    # Keras names the length of each input differently; JAX then knows of no relation.
    shapes = [dict.fromkeys(model.input, "(rows, length, ...)")]
    return {"jax2tf_kwargs": {"polymorphic_shapes": shapes}, **options}


def policy_of(model, policy):
    """The dtype policy of a model's layers, serialized; of quantized layers one by one."""
    policy = keras.dtype_policies.get(policy)
    policies = keras.dtype_policies.DTypePolicyMap(policy)
    for layer in model._flatten_layers():
        if layer.quantization_mode is not None:
            policies[layer.path] = layer.dtype_policy
    return keras.dtype_policies.serialize(policies if len(policies) else policy)


def made_with_policy(make, config, name):
    """What `make` makes of a config whose entry of this name is what `policy_of` gave."""
    policy = keras.dtype_policies.get(config.get(name))
    if not isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        return make(**{**config, name: policy})
    model = make(**{**config, name: policy.default_policy})
    for layer in [one for one in model._flatten_layers() if one.path in list(policy)]:
        if layer.quantization_mode is None:
            layer.dtype_policy = policy[layer.path]  # built as float, so Keras quantizes it
    return model
