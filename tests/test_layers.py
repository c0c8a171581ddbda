"""Layers: configs, NumPy references, and clips that do not care about their neighbors."""

import json

import keras
import numpy as np
import pytest
from helpers import pack_rows, randomize

from keras_flexast import PackedAST
from keras_flexast.layers import (
    EncoderBlock,
    MaskAttentionPooling,
    MaskedSelfAttention,
    PatchGrid,
    PIResizePatchEmbed,
    PositionEmbedding,
    PrefixPooling,
    PrefixTokens,
)
from tf_data_pipelines.resize import kernel_matrix, table_weights

RNG = np.random.default_rng(0)
LENGTH, DIM = 23, 22
LENGTHS = (5, 7, 2)  # of three clips in a row; nine places of padding


def normal(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype("float32")


def arrays(outputs):
    return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(outputs)]


SEGMENT_IDS = np.zeros((1, LENGTH), "int32")
SEGMENT_IDS[0, :14] = np.repeat([1, 2, 3], LENGTHS)
POSITIONS = np.abs(normal(1, LENGTH, 4)) + 0.5
POSITIONS[0, [0, 5, 12]] = 0
POSITIONS[0, [1, 6, 13]] = [1, 0, 0, 0]
INPUTS = {
    "tokens": normal(1, LENGTH, 256),
    "positions": POSITIONS,
    "segment_ids": SEGMENT_IDS,
}
EMBEDDED = normal(1, LENGTH, DIM)
LAYERS = [
    (PIResizePatchEmbed(DIM, base_patch=5, resize="bilinear"), [normal(2, 3, 7, 11)]),
    (PositionEmbedding(DIM, (3, 5), "joint"), [POSITIONS]),
    (PositionEmbedding(DIM, (3, 5), "factorized"), [POSITIONS]),
    (PrefixTokens(2), [EMBEDDED, POSITIONS]),
    (
        PatchGrid((7, 11), "cover", position="physical", grid=(3, 5), base_patch=5, stride=2),
        [normal(2, 31, 17)],
    ),
    (MaskedSelfAttention(2, 0.7, 0.1, "dense"), [EMBEDDED, SEGMENT_IDS]),
    (MaskAttentionPooling(2, 3, 0.7, 0.1), [EMBEDDED, SEGMENT_IDS]),
    (PrefixPooling(2, 3), [EMBEDDED, POSITIONS, SEGMENT_IDS]),
    (
        EncoderBlock(2, 31, dropout=0.1, scale=0.7, norm_epsilon=1e-3, attention="dense"),
        [EMBEDDED, SEGMENT_IDS],
    ),
    (EncoderBlock(2, 31, remat=True), [EMBEDDED, SEGMENT_IDS]),
]


@pytest.mark.parametrize("layer, inputs", LAYERS, ids=lambda x: getattr(x, "name", ""))
def test_layers_survive_their_config(layer, inputs):
    layer(*inputs)
    randomize(layer)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    for clone in (
        type(layer).from_config(layer.get_config()),
        keras.saving.deserialize_keras_object(config),
    ):
        assert clone.get_config() == layer.get_config()
        symbolic = clone(*(keras.Input(batch_shape=x.shape, dtype=x.dtype) for x in inputs))
        clone.set_weights(layer.get_weights())
        outputs = arrays(layer(*inputs))
        for ours, theirs in zip(arrays(clone(*inputs)), outputs, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        for ours, theirs in zip(keras.tree.flatten(symbolic), outputs, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("pooling", ["attention", "cls_distillation"])
def test_models_survive_their_config(pooling, dtype):
    model = PackedAST(
        5, dim=22, depth=1, num_heads=2, mlp_ratio=3, pooling=pooling, table="joint", grid=(3, 5),
        segments=3, resize="bilinear", remainder="pad", position="grid", dropout=0.1,
        attention_scale=0.7, norm_epsilon=1e-3, head_norm_epsilon=1e-2, attention="dense",
        dtype=dtype,
    )  # fmt: skip
    randomize(model)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(model)))
    for clone in (
        PackedAST.from_config(model.get_config()),
        keras.saving.deserialize_keras_object(config),
    ):
        assert clone.get_config() == model.get_config()
        clone.set_weights(model.get_weights())
        np.testing.assert_array_equal(*(arrays(m(INPUTS))[0] for m in (clone, model)))


@pytest.mark.parametrize("resize", ["pi", "bilinear"])
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (16, 24), (12, 20), (47, 7)])
def test_tokens_and_raw_patches_embed_alike(size, resize):
    embed = PIResizePatchEmbed(11, resize=resize)
    patches = normal(2, 3, *size)
    over_f, over_t = (kernel_matrix(p, 16, resize) for p in size)
    tokens = np.einsum("pf,qt,bnpq->bnft", over_f, over_t, patches).reshape(2, 3, 256)
    np.testing.assert_allclose(*(arrays(embed(x))[0] for x in (patches, tokens)), atol=1e-5)


def test_patch_embedding_is_frequency_major():
    embed = PIResizePatchEmbed(1, base_patch=3)
    embed.build((None, None, 9))
    kernel = np.zeros((3, 3, 1))
    kernel[0, 2] = 1
    embed.set_weights([kernel, np.array([0.5])])
    token = np.arange(9, dtype="float32")[None, None]
    assert arrays(embed(token))[0].item() == 2.5
    assert arrays(embed(token.reshape(1, 1, 3, 3)))[0].item() == 2.5


@pytest.mark.parametrize("table", ["joint", "factorized"])
def test_positions_equal_numpy(table):
    freq, time = 3, 5
    layer = PositionEmbedding(11, (freq, time), table)
    rng = np.random.default_rng(0)
    positions = rng.uniform([-2, -3, 0.1, 0.1], [4, 9, 2.5, 3.5], (2, 13, 4)).astype("float32")
    positions[0, 0] = [1e6, -1e6, 0, 0]
    layer(positions)
    weights = [w.astype("float64") for w in randomize(layer).get_weights()]
    over_f = table_weights(positions[..., 0], positions[..., 2], freq)
    over_t = table_weights(positions[..., 1], positions[..., 3], time)
    if table == "joint":
        expected = np.einsum("bnf,bnt,ftd->bnd", over_f, over_t, weights[0])
    else:
        expected = over_f @ weights[0] + over_t @ weights[1]
    np.testing.assert_allclose(arrays(layer(positions))[0], expected, atol=1e-5)


def test_positions_by_hand():
    layer = PositionEmbedding(1, (2, 4), "factorized")
    layer.build((None, None, 4))
    layer.set_weights([np.array([[10], [20]]), np.array([[1], [2], [3], [5]])])
    positions = [[[0.25, 1.5, 1, 1], [1, 0, 1, 2], [7, 3, 0, 0]]]
    # Three quarters of 10 and one of 20, between 2 and 3; then a triangle two cells wide
    # around the first cell, (1 + 2/2) / (1 + 1/2); then the last cells.
    expected = [[12.5 + 2.5, 20 + 4 / 3, 20 + 5]]
    np.testing.assert_allclose(arrays(layer(np.float32(positions)))[0][..., 0], expected, 1e-6)


def test_half_precision_keeps_the_centers():
    positions = np.float32([[[1, 200.5, 1, 1], [0.3, 131.25, 1, 1]]])  # beyond bfloat16's 8 bits
    outputs = []
    for dtype in ("float32", "mixed_bfloat16"):
        layer = PositionEmbedding(7, (3, 257), dtype=dtype)
        layer(positions)
        outputs.append(arrays(randomize(layer)(positions))[0].astype("float32"))
    np.testing.assert_allclose(*outputs, atol=5e-3)


def attend(layer, queries, tokens):
    """One clip's attention in float64: queries (q, dim), tokens (t, dim) -> (q, dim)."""

    def dense(name, x):
        kernel, bias = (w.astype("float64") for w in getattr(layer, f"{name}_dense").get_weights())
        return x @ kernel + bias

    def heads(x):
        return x.reshape(len(x), layer.num_heads, -1).swapaxes(0, 1)

    q, k, v = dense("query", queries), dense("key", tokens), dense("value", tokens)
    logits = heads(q) @ heads(k).swapaxes(1, 2)
    logits = logits * (layer.scale or (tokens.shape[1] // layer.num_heads) ** -0.5)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = (weights / weights.sum(-1, keepdims=True)) @ heads(v)
    return dense("output", mixed.swapaxes(0, 1).reshape(len(queries), -1))


@pytest.mark.parametrize("scale", [None, 1.0, 0.2])
def test_self_attention_equals_numpy_clip_by_clip(scale):
    layer = MaskedSelfAttention(2, scale)
    layer(EMBEDDED, SEGMENT_IDS)
    output = arrays(randomize(layer)(EMBEDDED, SEGMENT_IDS))[0]
    assert np.isfinite(output).all()
    for segment in (1, 2, 3):
        mine = segment == SEGMENT_IDS
        clip = EMBEDDED[mine].astype("float64")
        np.testing.assert_allclose(output[mine], attend(layer, clip, clip), atol=1e-5)
        alone = arrays(layer(EMBEDDED[mine][None]))[0][0]
        np.testing.assert_allclose(output[mine], alone, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 1.0, 0.2])
def test_attention_pooling_equals_numpy_clip_by_clip(scale):
    layer = MaskAttentionPooling(2, 5, scale)
    layer(EMBEDDED, SEGMENT_IDS)
    output = arrays(randomize(layer)(EMBEDDED, SEGMENT_IDS))[0]
    query = keras.ops.convert_to_numpy(layer.query).astype("float64")[None]
    assert output.shape == (1, 5, DIM)
    assert np.isfinite(output).all()  # slots 4 and 5 are empty
    for segment in (1, 2, 3):
        clip = EMBEDDED[segment == SEGMENT_IDS]
        expected = attend(layer, query, clip.astype("float64"))[0]
        np.testing.assert_allclose(output[0, segment - 1], expected, atol=1e-5)
        np.testing.assert_allclose(arrays(layer(clip[None]))[0][0, 0], expected, atol=1e-5)


LAYOUTS = {  # clip 0 alone, packed, packed elsewhere with others
    "alone": ([0], None),
    "alone, padded": ([0], LENGTH),
    "first": ([0, 1, 2], LENGTH),
    "last, full row": ([2, 3, 0], 18),
    "other neighbors": ([3, 0, 1], LENGTH),
}


@pytest.mark.parametrize("kind", ["self", "attention", "prefix", "block"])
def test_a_clip_does_not_care_about_its_neighbors(kind):
    layer, pooled = {
        "self": (MaskedSelfAttention(2), False),
        "block": (EncoderBlock(2, 31), False),
        "attention": (MaskAttentionPooling(2, 3), True),
        "prefix": (PrefixPooling(2, 3), True),
    }[kind]
    clips = []
    for length in (7, 5, 2, 9):
        positions = np.abs(normal(length, 4)) + 0.5
        positions[:2] = [[0, 0, 0, 0], [1, 0, 0, 0]]
        clips.append((RNG.normal(size=(length, DIM)), positions))
    results = {}
    for name, (chosen, length) in LAYOUTS.items():
        row = [clips[i] for i in chosen]
        batch = pack_rows([row], length or sum(len(tokens) for tokens, _ in row))
        ids = batch["segment_ids"]
        inputs = [batch["positions"], ids] if kind == "prefix" else [ids]
        if not layer.built:
            layer(batch["tokens"], *inputs)
            randomize(layer)
        output, segment = arrays(layer(batch["tokens"], *inputs))[0], chosen.index(0) + 1
        results[name] = output[0, segment - 1] if pooled else output[ids == segment]
    for result in results.values():
        np.testing.assert_allclose(result, results["alone"], atol=1e-5)


def test_prefix_tokens_stand_where_they_are_marked():
    layer = PrefixTokens(2)
    layer(EMBEDDED, POSITIONS)
    (table,) = randomize(layer).get_weights()
    output = arrays(layer(EMBEDDED, POSITIONS))[0]
    np.testing.assert_array_equal(output[0, [0, 5, 12]], table[[0, 0, 0]])
    np.testing.assert_array_equal(output[0, [1, 6, 13]], table[[1, 1, 1]])
    others = POSITIONS[..., 2] > 0
    np.testing.assert_array_equal(output[others], EMBEDDED[others])
    fixed = arrays(layer(EMBEDDED))[0]
    np.testing.assert_array_equal(fixed[0], np.concatenate([table, EMBEDDED[0]]))


def test_prefix_pooling_is_the_mean_of_the_prefix():
    output = arrays(PrefixPooling(2, 5)(EMBEDDED, POSITIONS, SEGMENT_IDS))[0]
    expected = [EMBEDDED[0, start : start + 2].mean(0) for start in (0, 5, 12)]
    np.testing.assert_allclose(output[0, :3], expected, atol=1e-6)
    np.testing.assert_array_equal(output[0, 3:], 0)
    fixed = arrays(PrefixPooling(2, 5)(EMBEDDED))[0]
    np.testing.assert_allclose(fixed, EMBEDDED[:, :2].mean(1, keepdims=True), atol=1e-6)


def test_errors():
    for shape in ((None, 255), (2, 3, 255), (2, 256), (1, 2, 3, 4, 5)):
        with pytest.raises(ValueError, match="expected tokens"):
            PIResizePatchEmbed(7).build(shape)
    with pytest.raises(ValueError, match="resize='cubic' is unknown"):
        PIResizePatchEmbed(7, resize="cubic")
    with pytest.raises(ValueError, match="table='sine' is unknown"):
        PositionEmbedding(7, table="sine")
    for layer in (MaskedSelfAttention(5), MaskAttentionPooling(5)):
        with pytest.raises(ValueError, match="dim=22 is not a multiple of num_heads=5"):
            layer.build((None, None, 22))
    with pytest.raises(ValueError, match="19 along frequency, larger than the spectrogram's 17"):
        PatchGrid(19, "cover", position="grid", grid=(3, 5)).build((None, 31, 17))
