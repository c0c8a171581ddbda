"""One transformer, two faces: packed rows of mixed clips, and clips of one fixed shape."""

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
from keras_flexast.settings import POOLINGS, SIZES
from tf_data_pipelines.settings import (
    BASE_PATCH,
    POSITIONS,
    REMAINDERS,
    RESIZES,
    PatchSettings,
    base_and_stride,
    check_choice,
)


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedBackbone(keras.Model):
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

    Call arguments:
        inputs: dictionary of `tokens` float (rows, length, 256), the area of the base
            patch, `positions` float (rows, length, 4) and `segment_ids` int (rows, length).

    Output:
        float (rows, length, dim), after the last LayerNorm.
    """

    def __init__(
        self,
        dim,
        depth,
        *,
        num_heads,
        mlp_ratio=4,
        prefix_tokens=0,
        table="factorized",
        grid=(8, 64),
        base_patch=BASE_PATCH,
        resize="pi",
        dropout=0.0,
        attention_scale=None,
        norm_epsilon=1e-6,
        attention="auto",
        remat=False,
        dtype=None,
        **kwargs,
    ):
        check_choice("prefix_tokens", prefix_tokens, (0, 1, 2))
        base_patch, _ = base_and_stride(base_patch, None)

        # === Layers ===
        self.patch_embed = PIResizePatchEmbed(
            dim, base_patch, resize, dtype=dtype, name="patch_embed"
        )
        self.position_embed = PositionEmbedding(
            dim, grid, table, dtype=dtype, name="position_embed"
        )
        self.prefix = None
        if prefix_tokens:
            self.prefix = PrefixTokens(prefix_tokens, dtype=dtype, name="prefix_tokens")
        self.blocks = [
            EncoderBlock(
                num_heads,
                round(dim * mlp_ratio),
                dropout=dropout,
                scale=attention_scale,
                norm_epsilon=norm_epsilon,
                attention=attention,
                remat=remat,
                dtype=dtype,
                name=f"block_{index}",
            )
            for index in range(depth)
        ]
        self.norm = keras.layers.LayerNormalization(epsilon=norm_epsilon, dtype=dtype, name="norm")

        # === Functional model ===
        inputs = {
            "tokens": keras.Input((None, base_patch[0] * base_patch[1]), name="tokens"),
            "positions": keras.Input((None, 4), name="positions"),
            "segment_ids": keras.Input((None,), dtype="int32", name="segment_ids"),
        }
        positions, segment_ids = inputs["positions"], inputs["segment_ids"]
        x = self.patch_embed(inputs["tokens"]) + self.position_embed(positions)
        if self.prefix is not None:
            x = self.prefix(x, positions)
        for block in self.blocks:
            x = block(x, segment_ids)
        super().__init__(inputs=inputs, outputs=self.norm(x), **kwargs)

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

    def get_config(self):
        names = (
            "dim", "depth", "num_heads", "mlp_ratio", "prefix_tokens", "table", "grid",
            "base_patch", "resize", "dropout", "attention_scale", "norm_epsilon", "attention",
            "remat",
        )  # fmt: skip
        config = {name: getattr(self, name) for name in names}
        return {"name": self.name, "trainable": self.trainable, "dtype": _dtype(self), **config}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedAST(keras.Model):
    """Audio spectrogram transformer on packed rows: any patch size, length and frame shift.

    A functional model. `FlexiAST` and `ElasticAST` are its two named configurations; every
    combination in between works. `fixed_model` gives its other face. Its parts are attributes:
    `backbone` (PackedBackbone), `pooling`, `head_norm` and `head`.

    Args:
        num_classes: number of classes.
        dim, depth, num_heads: width, number of blocks and number of heads; or give `size`.
        size: "nano", "tiny", "small" or "base": sets dim, depth and num_heads.
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
        mlp_ratio, grid, base_patch, resize, dropout, attention_scale, norm_epsilon, attention,
            remat, dtype: as in PackedBackbone.

    Call arguments:
        inputs: packed batch, as for PackedBackbone.

    Output:
        logits float32 (rows, segments, num_classes). Slots without a clip hold finite
        numbers without meaning; their weight in the packed batch is 0.

    Example:
        model = PackedAST(num_classes=10, size="nano")
        model.fit(training_batches(...))   # tf_data_pipelines
    """

    def __init__(
        self,
        num_classes,
        dim=None,
        *,
        depth=None,
        num_heads=None,
        size=None,
        mlp_ratio=4,
        pooling="attention",
        prefix_tokens=None,
        table=None,
        grid=(8, 64),
        base_patch=BASE_PATCH,
        stride=None,
        mel_bins=None,
        segments=16,
        resize="pi",
        remainder="cover",
        position="physical",
        dropout=0.0,
        attention_scale=None,
        norm_epsilon=1e-6,
        head_norm_epsilon=1e-6,
        attention="auto",
        remat=False,
        dtype=None,
        **kwargs,
    ):
        dim, depth, num_heads = _dimensions(size, (dim, depth, num_heads))
        check_choice("pooling", pooling, tuple(POOLINGS))
        check_choice("remainder", remainder, REMAINDERS)
        check_choice("position", position, POSITIONS)
        if prefix_tokens is None:
            prefix_tokens = POOLINGS[pooling]
        if pooling.startswith("cls") and prefix_tokens != POOLINGS[pooling]:
            raise ValueError(
                f"prefix_tokens={prefix_tokens} does not fit pooling={pooling!r}; leave it out."
            )
        table = table or ("factorized" if pooling == "attention" else "joint")
        base_patch, stride = base_and_stride(base_patch, stride)
        if mel_bins is None:
            mel_bins = (grid[0] - 1) * stride[0] + base_patch[0]

        # === Layers ===
        self.head = keras.layers.Dense(num_classes, dtype=_head_dtype(dtype), name="head")
        self.backbone = PackedBackbone(
            dim,
            depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            prefix_tokens=prefix_tokens,
            table=table,
            grid=grid,
            base_patch=base_patch,
            resize=resize,
            dropout=dropout,
            attention_scale=attention_scale,
            norm_epsilon=norm_epsilon,
            attention=attention,
            remat=remat,
            dtype=dtype,
            name="backbone",
        )
        if pooling == "attention":
            self.pooling = MaskAttentionPooling(
                num_heads, segments, attention_scale, dtype=dtype, name="pooling"
            )
        else:
            kind = MeanPooling if pooling == "mean" else PrefixPooling
            self.pooling = kind(prefix_tokens, segments, dtype=dtype, name="pooling")
        self.head_norm = keras.layers.LayerNormalization(
            epsilon=head_norm_epsilon, dtype=dtype, name="head_norm"
        )

        # === Functional model ===
        inputs = self.backbone.input
        x = self.backbone(inputs)
        if pooling == "attention":
            pooled = self.pooling(x, inputs["segment_ids"])
        else:
            pooled = self.pooling(x, inputs["positions"], inputs["segment_ids"])
        super().__init__(inputs=inputs, outputs=self.head(self.head_norm(pooled)), **kwargs)

        # === Config ===
        self.num_classes = num_classes
        self.dim = dim
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.pooling_name = pooling  # `pooling` is the layer
        self.prefix_tokens = prefix_tokens
        self.table = table
        self.grid = tuple(grid)
        self.base_patch = base_patch
        self.stride = stride
        self.mel_bins = mel_bins
        self.segments = segments
        self.resize = resize
        self.remainder = remainder
        self.position = position
        self.dropout = dropout
        self.attention_scale = attention_scale
        self.norm_epsilon = norm_epsilon
        self.head_norm_epsilon = head_norm_epsilon
        self.attention = attention
        self.remat = remat

    def patch_settings(self, patch_sizes=None, **options):
        """PatchSettings of clips for this model.

        Args:
            patch_sizes: ints or (frequency, time) pairs to draw from; None for base_patch.
            **options: other settings of PatchSettings, such as frame_shifts_ms, or another
                remainder, position or resize than the model was trained with.
        """
        names = (
            "remainder", "position", "resize", "prefix_tokens", "grid", "base_patch", "stride",
        )  # fmt: skip
        own = {name: getattr(self, name) for name in names}
        return PatchSettings(patch_sizes or (self.base_patch,), **{**own, **options})

    def get_config(self):
        names = (
            "num_classes", "dim", "depth", "num_heads", "mlp_ratio", "prefix_tokens", "table",
            "grid", "base_patch", "stride", "mel_bins", "segments", "resize", "remainder",
            "position", "dropout", "attention_scale", "norm_epsilon", "head_norm_epsilon",
            "attention", "remat",
        )  # fmt: skip
        config = {name: getattr(self, name) for name in names}
        config["pooling"] = self.pooling_name
        return {"name": self.name, "trainable": self.trainable, "dtype": _dtype(self), **config}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "dtype": keras.dtype_policies.get(config.get("dtype"))})


def _dimensions(size, given):
    """(dim, depth, num_heads) of a size, each replaced by the given one that is not None."""
    if size is not None:
        check_choice("size", size, tuple(SIZES))
        given = tuple(g or default for g, default in zip(given, SIZES[size], strict=True))
    if None in given:
        dim, depth, num_heads = given
        raise ValueError(
            f"dim={dim}, depth={depth}, num_heads={num_heads}: give all three, or size= one of "
            f"{', '.join(SIZES)}."
        )
    return given


def _dtype(model):
    """The dtype policy of a model's layers, with those that are quantized one by one."""
    backbone = getattr(model, "backbone", model)
    policies = keras.dtype_policies.DTypePolicyMap(backbone.patch_embed.dtype_policy)
    for layer in model._flatten_layers():
        if layer.quantization_mode is not None:
            policies[layer.path] = layer.dtype_policy
    policy = policies if len(policies) else backbone.patch_embed.dtype_policy
    return keras.dtype_policies.serialize(policy)


def _head_dtype(dtype):
    """float32, so that logits are exact in mixed precision, unless the head is quantized."""
    quantized = isinstance(dtype, keras.dtype_policies.DTypePolicyMap) and "head" in list(dtype)
    return dtype["head"] if quantized else "float32"


def FlexiAST(num_classes, size="base", pooling="cls", **kwargs):
    """FlexiAST: [CLS] (or [CLS] and distillation) pooling, joint position table.

    Args:
        num_classes: number of classes.
        size: "nano", "tiny", "small" or "base".
        pooling: "cls" or "cls_distillation".
        **kwargs: any argument of PackedAST.

    Returns:
        PackedAST. The LayerNorm of its head has AST's epsilon, 1e-5.

    Reference: FlexiAST, Feng et al. 2023 (arXiv:2307.09286).
    """
    kwargs = {"head_norm_epsilon": 1e-5, **kwargs}
    return PackedAST(num_classes, size=size, pooling=pooling, **kwargs)


def ElasticAST(num_classes, size="base", **kwargs):
    """ElasticAST: mask attention pooling, one position table per axis.

    Args:
        num_classes: number of classes.
        size: "nano", "tiny", "small" or "base".
        **kwargs: any argument of PackedAST.

    Returns:
        PackedAST. The time table has 192 cells, 30 s at a frame shift of 10 ms.

    Reference: ElasticAST, Feng et al. 2024 (arXiv:2407.08691).
    """
    kwargs = {"pooling": "attention", "grid": (8, 192), **kwargs}
    return PackedAST(num_classes, size=size, **kwargs)


def fixed_model(
    model,
    patch_size,
    frames,
    *,
    remainder=None,
    position=None,
    resize=None,
    frame_shift_scale=1.0,
    output="logits",
):
    """The fixed face of a packed model: one patch size, one length, ready to export.

    It shares the model's layers: what one learns the other knows. The patch kernel and
    the position table are resized in the graph, from the base ones, and become constants
    where a graph is frozen (TFLite).

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
    remainder = model.remainder if remainder is None else remainder
    position = model.position if position is None else position
    resize = model.resize if resize is None else resize
    check_choice("remainder", remainder, REMAINDERS)
    check_choice("position", position, POSITIONS)
    check_choice("resize", resize, RESIZES)
    check_choice("output", output, ("logits", "embedding"))
    backbone = model.backbone
    patch_grid = PatchGrid(
        patch_size,
        remainder,
        position=position,
        grid=model.grid,
        base_patch=model.base_patch,
        stride=model.stride,
        frame_shift_scale=frame_shift_scale,
        dtype=backbone.patch_embed.dtype_policy,
        name="patch_grid",
    )
    spectrogram = keras.Input((frames, model.mel_bins), name="spectrogram")
    patches, positions = patch_grid(spectrogram)
    x = backbone.patch_embed(patches, resize=resize) + backbone.position_embed(positions)
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
