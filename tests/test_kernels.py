"""Attention clip by clip is attention under the dense mask, forward and backward."""

import keras
import numpy as np
import pytest
from helpers import randomize
from keras import ops

from keras_flexast import PackedAST
from keras_flexast.layers import MaskedSelfAttention
from keras_flexast.training import compile_packed

LENGTH = 450  # more than two of the tiles that JAX takes
ROWS = {  # lengths of the clips; what is left of a row is padding
    "random": [[101, 7, 64, 199], [13, 400, 31]],
    "one token": [[1, 1, 440, 1], [1]],
    "full rows": [[225, 225], [449, 1]],
    "empty": [[], []],
    "one clip": [[LENGTH], [5]],
    "whole tiles": [[384, 66], [192, 193, 5]],
}


def segments(layout):
    ids = np.zeros((len(layout), LENGTH), "int32")
    for row, lengths in zip(ids, layout, strict=True):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return ids


def value_and_gradients(layer, tokens, ids, slope):
    """The output at real tokens, and gradients of its product with slope."""
    real = (ids > 0)[..., None]

    def loss(x, weights):
        output = ops.where(real, call(x, weights), 0.0)
        return ops.sum(output * slope), output

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                output = tf.where(real, layer(x, ids), 0.0)
                total = tf.reduce_sum(output * slope)
            return output, tape.gradient(total, [x, *layer.trainable_weights])

        return run(tf.constant(tokens))
    import jax

    def call(x, weights):
        return layer.stateless_call(weights, [], x, ids)[0]

    weights = [w.value for w in layer.trainable_weights]
    (_, output), (dx, dw) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(tokens, weights)
    return output, [dx, *dw]


@pytest.mark.parametrize("name, scale", [*((name, None) for name in ROWS), ("random", 1.0)])
def test_equal_to_the_dense_mask(name, scale):
    rng, ids = np.random.default_rng(0), segments(ROWS[name])
    tokens, slope = (rng.normal(size=(2, LENGTH, 12)).astype("float32") for _ in range(2))
    layer = MaskedSelfAttention(3, scale)
    layer.build(tokens.shape)
    randomize(layer)
    results = []
    for layer.by_clip in (False, True):
        output, gradients = value_and_gradients(layer, tokens, ids, slope)
        results.append((output, gradients))
    (dense, dense_slopes), (ours, our_slopes) = results
    np.testing.assert_allclose(ours, dense, rtol=0, atol=1e-5)
    assert len(our_slopes) == 9
    for ours, dense in zip(our_slopes, dense_slopes, strict=True):
        ours, dense = np.asarray(ours), np.asarray(dense)
        np.testing.assert_allclose(ours, dense, rtol=0, atol=1e-4 * max(1, np.abs(dense).max()))


def test_clips_never_mix():
    """Another clip's NaN stays there."""
    ids = segments(ROWS["random"])
    layer = MaskedSelfAttention(3)
    tokens = np.random.default_rng(0).normal(size=(2, LENGTH, 12)).astype("float32")
    layer.build(tokens.shape)
    randomize(layer)
    layer.by_clip = True
    before = ops.convert_to_numpy(layer(tokens, ids))
    tokens[0, 101:108] = np.nan  # the second clip of the first row
    after = ops.convert_to_numpy(layer(tokens, ids))
    others = np.ones(ids.shape, bool)
    others[0, 101:108] = False
    real = ids > 0
    np.testing.assert_array_equal(after[others & real], before[others & real])
    assert np.isnan(after[~others]).all()


def test_training_takes_it_for_long_rows_and_learns_the_same():
    rng, ids = np.random.default_rng(0), np.zeros((2, 512), "int32")
    ids[0, :500], ids[1, :77] = np.repeat([1, 2], [310, 190]), 1
    batch = {
        "tokens": rng.normal(size=(2, 512, 256)).astype("float32"),
        "positions": np.ones((2, 512, 4), "float32"),
        "segment_ids": ids,
    }
    labels, weights = np.zeros((2, 2), "int32"), np.float32([[1, 1], [1, 0]])
    losses = {}
    for row_length in (0, 512):
        model = randomize(PackedAST(3, 16, 1, 2, segments=2), scale=0.1)
        compile_packed(model, 1e-2, row_length=row_length)
        attention = model.get_layer("block_0").attention
        assert attention.by_clip == (row_length == 512)
        losses[row_length] = [
            model.train_on_batch(batch, labels, sample_weight=weights)[0] for _ in range(3)
        ]
        again = model.predict_on_batch(batch)
        model.choose_attention(0)
        np.testing.assert_allclose(
            again[weights > 0], ops.convert_to_numpy(model(batch))[weights > 0], atol=1e-4
        )
    np.testing.assert_allclose(losses[512], losses[0], atol=1e-4)
