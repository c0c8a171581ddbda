"""One transformer, two faces: packed rows of mixed clips, and clips of one fixed shape."""

import functools

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
from tf_data_pipelines.settings import (
    BASE_PATCH,
    POSITIONS,
    REMAINDERS,
    RESIZES,
    PatchSettings,
    base_and_stride,
    check_choice,
)

SIZES = {  # name: (dim, depth, num_heads)
    "nano": (96, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}
BY_CLIP_FROM = 512  # tokens in a row; shorter ones gain nothing, and lose with tiny clips
PREFIX_TOKENS = {"attention": 0, "cls": 1, "cls_distillation": 2, "mean": 0}


class PackedModel(keras.Model):
    """A functional model on packed rows that attends as is fastest for their length."""

    _row_length = 0

    def choose_attention(self, row_length):
        """Let the blocks attend clip by clip where that is faster than a dense mask.

        On a CPU and with rows of BY_CLIP_FROM tokens or more. On TensorFlow that runs without
        XLA: `predict` then does so by itself, and for training `compile_packed` sees to it. The
        numbers are the same.

        Args:
            row_length: tokens in a row; 0 for the dense mask.

        Returns:
            bool, whether they do.
        """
        chosen = row_length >= BY_CLIP_FROM and _on_one_cpu()
        blocks = self._blocks()
        if row_length != self._row_length or any(b.attention.by_clip != chosen for b in blocks):
            self.predict_function = None  # it was traced for other rows
        self._row_length = row_length
        for block in blocks:
            block.attention.by_clip = chosen
        if chosen and keras.backend.backend() == "tensorflow":
            self.jit_compile = False
        return chosen

    def rematerialise(self):
        """Keep only what goes into a block while training, and compute the rest of it again.

        Less memory for a third more time; the numbers are the same. For this object: a model
        that is saved and loaded has to be told again. Call it before `compile`.

        Raises:
            ValueError: the blocks have dropout, which would be drawn anew.
        """
        for block in self._blocks():
            if block.dropout:
                raise ValueError(
                    f"dropout={block.dropout} would be drawn anew when a block is computed again. "
                    f"Train without dropout, or without rematerialise."
                )
            block.call = _recomputed(block.call)

    def _blocks(self):
        return [layer for layer in self.layers if isinstance(layer, EncoderBlock)]


def _recomputed(call):
    """A block's call whose gradient computes it again."""

    def call_again(tokens, segment_ids=None, training=None):
        if not training:
            return call(tokens, segment_ids)
        # keras.RematScope would make a traced value of `training`, which fails on both backends.
        return keras.remat(functools.partial(call, training=True))(tokens, segment_ids)

    return call_again


@keras.saving.register_keras_serializable(package="keras_flexast")
class PackedAST(PackedModel):
    """Audio spectrogram transformer on packed rows: any patch size, length and frame shift.

    A functional model. `FlexiAST` and `ElasticAST` are its two named configurations; every
    combination in between works. `fixed_model` gives its other face.

    Args:
        num_classes: number of classes.
        dim, depth, num_heads: width, blocks and heads; or give `size`.
        size: "nano", "tiny", "small" or "base": sets dim, depth and num_heads.
        mlp_ratio: hidden width of a block over dim.
        pooling: "attention" (one learned query a clip), "cls" or "cls_distillation" (the
            mean of one or two prefix tokens), or "mean" (of the patches, as SSAST).
        prefix_tokens: 0, 1 or 2 tokens before each clip; None for what the pooling needs.
        table: position table, "joint" or "factorized"; None for what the papers have with
            that pooling: factorized with attention, else joint.
        grid: (frequency, time) cells of the position table. Later positions share the
            last cell.
        base_patch: int or (frequency, time): bins and frames of the patch kernel.
        stride: int or (frequency, time): bins and frames from one base patch, and one cell
            of the table, to the next; None for base_patch, without overlap. Standard ASTs
            have 10. Patches of other sizes overlap by the same share.
        mel_bins: of the spectrograms; None for what the grid spans.
        segments: clip slots in a row.
        resize: "pi" or "bilinear", how patch sizes other than 16 are treated.
        remainder, position: policies of the patch grid that the model is trained with,
            see PatchSettings; `fixed_model` follows them.
        dropout: rate, in every block.
        attention_scale: None for 1 / sqrt(width of a head).
        norm_epsilon, head_norm_epsilon: of the encoder's LayerNorms, and of the head's.

    Call arguments:
        inputs: dictionary of `tokens` float (rows, length, 256), the area of the base
            patch, `positions` float (rows, length, 4) and `segment_ids` int (rows, length).

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
        **kwargs,
    ):
        if size is not None:
            check_choice("size", size, tuple(SIZES))
            defaults = SIZES[size]
            dim, depth, num_heads = (
                given or default
                for given, default in zip((dim, depth, num_heads), defaults, strict=True)
            )
        if None in (dim, depth, num_heads):
            raise ValueError(
                f"dim={dim}, depth={depth}, num_heads={num_heads}: give all three, or size= "
                f"one of {', '.join(SIZES)}."
            )
        check_choice("pooling", pooling, tuple(PREFIX_TOKENS))
        check_choice("remainder", remainder, REMAINDERS)
        check_choice("position", position, POSITIONS)
        prefix = PREFIX_TOKENS[pooling] if prefix_tokens is None else prefix_tokens
        check_choice("prefix_tokens", prefix, (0, 1, 2))
        if pooling.startswith("cls") and prefix != PREFIX_TOKENS[pooling]:
            raise ValueError(
                f"prefix_tokens={prefix} does not fit pooling={pooling!r}; leave it out."
            )
        table = table or ("factorized" if pooling == "attention" else "joint")
        base_patch, stride = base_and_stride(base_patch, stride)
        if mel_bins is None:
            mel_bins = (grid[0] - 1) * stride[0] + base_patch[0]
        dtype = kwargs.pop("dtype", None)

        # === Layers ===
        embed = PIResizePatchEmbed(dim, base_patch, resize, dtype=dtype, name="patch_embed")
        locate = PositionEmbedding(dim, grid, table, dtype=dtype, name="position_embed")
        blocks = [
            EncoderBlock(
                num_heads,
                round(dim * mlp_ratio),
                dropout,
                attention_scale,
                norm_epsilon,
                dtype=dtype,
                name=f"block_{index}",
            )
            for index in range(depth)
        ]
        norm = keras.layers.LayerNormalization(epsilon=norm_epsilon, dtype=dtype, name="norm")
        head_norm = keras.layers.LayerNormalization(
            epsilon=head_norm_epsilon, dtype=dtype, name="head_norm"
        )
        head = keras.layers.Dense(num_classes, dtype="float32", name="head")

        # === Functional model ===
        inputs = {
            "tokens": keras.Input((None, base_patch[0] * base_patch[1]), name="tokens"),
            "positions": keras.Input((None, 4), name="positions"),
            "segment_ids": keras.Input((None,), dtype="int32", name="segment_ids"),
        }
        positions, segment_ids = inputs["positions"], inputs["segment_ids"]
        x = embed(inputs["tokens"]) + locate(positions)
        if prefix:
            x = PrefixTokens(prefix, dtype=dtype, name="prefix_tokens")(x, positions)
        for block in blocks:
            x = block(x, segment_ids)
        x = norm(x)
        if pooling == "attention":
            pool = MaskAttentionPooling(
                num_heads, segments, attention_scale, dtype=dtype, name="pooling"
            )
            pooled = pool(x, segment_ids)
        else:
            kind = MeanPooling if pooling == "mean" else PrefixPooling
            pooled = kind(prefix, segments, dtype=dtype, name="pooling")(x, positions, segment_ids)
        super().__init__(inputs=inputs, outputs=head(head_norm(pooled)), **kwargs)

        # === Config ===
        self.num_classes = num_classes
        self.dim = dim
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.pooling = pooling
        self.prefix_tokens = prefix
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

    def patch_settings(self, patch_sizes=None, **options):
        """PatchSettings of clips for this model.

        Args:
            patch_sizes: ints or (frequency, time) pairs to draw from; None for base_patch.
            **options: PatchSettings' own, such as frame_shifts_ms, or another remainder,
                position or resize than the model was trained with.
        """
        names = (
            "remainder", "position", "resize", "prefix_tokens", "grid", "base_patch", "stride",
        )  # fmt: skip
        own = {name: getattr(self, name) for name in names}
        return PatchSettings(patch_sizes or (self.base_patch,), **{**own, **options})

    def get_config(self):
        names = (
            "num_classes", "dim", "depth", "num_heads", "mlp_ratio", "pooling", "prefix_tokens",
            "table", "grid", "base_patch", "stride", "mel_bins", "segments", "resize",
            "remainder", "position", "dropout", "attention_scale", "norm_epsilon",
            "head_norm_epsilon",
        )  # fmt: skip
        config = {name: getattr(self, name) for name in names}
        dtype = keras.dtype_policies.serialize(self.get_layer("patch_embed").dtype_policy)
        return {"name": self.name, "trainable": self.trainable, "dtype": dtype, **config}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def _on_one_cpu():
    """Whether Keras computes on one CPU, on TensorFlow or JAX."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.default_backend() == "cpu" and keras.distribution.distribution() is None
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.config.list_logical_devices("GPU") and not tf.distribute.has_strategy()
    return False


def FlexiAST(num_classes, size="base", pooling="cls", **kwargs):
    """FlexiAST: [CLS] (or [CLS] and distillation) pooling, joint position table.

    Args:
        num_classes: number of classes.
        size: "nano", "tiny", "small" or "base".
        pooling: "cls" or "cls_distillation".
        **kwargs: any argument of PackedAST.

    Returns:
        PackedAST. Its head's LayerNorm has AST's epsilon, 1e-5.

    Reference: FlexiAST, Feng et al. 2023 (arXiv:2307.09286).
    """
    kwargs = {"head_norm_epsilon": 1e-5, **kwargs}
    return PackedAST(num_classes, size=size, pooling=pooling, **kwargs)


def ElasticAST(num_classes, size="base", **kwargs):
    """ElasticAST: mask attention pooling, one position table an axis.

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
        frames: frames of every spectrogram.
        remainder, position, resize: see PatchSettings; None for what the model was trained
            with.
        frame_shift_scale: the frame shift over that of training.
        output: "logits", or "embedding": one vector a clip, before the head and its norm.

    Returns:
        functional keras.Model from normalized log-mel float32 (batch, frames, mel_bins) to
        logits float32 (batch, num_classes), or embeddings (batch, dim), equal to the packed
        model's for the same clip.

    Raises:
        ValueError: the patch is larger than the spectrogram, or a policy is unknown.

    Example:
        fixed = fixed_model(model, patch_size=(16, 24), frames=1024)
    """
    remainder = model.remainder if remainder is None else remainder
    position = model.position if position is None else position
    resize = model.resize if resize is None else resize
    check_choice("remainder", remainder, REMAINDERS)
    check_choice("position", position, POSITIONS)
    check_choice("resize", resize, RESIZES)
    check_choice("output", output, ("logits", "embedding"))
    spectrogram = keras.Input((frames, model.mel_bins), name="spectrogram")
    embed = model.get_layer("patch_embed")
    cut = PatchGrid(
        patch_size,
        remainder,
        position,
        model.grid,
        model.base_patch,
        model.stride,
        frame_shift_scale,
        dtype=embed.dtype_policy,
        name="patch_grid",
    )
    patches, positions = cut(spectrogram)
    x = embed(patches, resize=resize) + model.get_layer("position_embed")(positions)
    if model.prefix_tokens:
        x = model.get_layer("prefix_tokens")(x)
    for index in range(model.depth):
        x = model.get_layer(f"block_{index}")(x)
    pooled = model.get_layer("pooling")(model.get_layer("norm")(x))
    if output == "logits":
        pooled = model.get_layer("head")(model.get_layer("head_norm")(pooled))
    return keras.Model(spectrogram, pooled[:, 0], name=f"{model.name}_fixed")


def embedding_model(model):
    """Packed batches to embeddings (rows, segments, dim): a clip's vector before the head."""
    return PackedModel(model.inputs, model.get_layer("pooling").output, name="embedding")
