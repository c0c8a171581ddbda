"""Kernels: each computes what the dense mask does, forward and backward; "auto" chooses one."""

import keras
import numpy as np
import pytest
from helpers import randomize, run_python
from keras import ops

from keras_flexast import PackedAST
from keras_flexast.inference.scoring import PackedPredictor
from keras_flexast.layers import MaskedSelfAttention
from keras_flexast.layers.kernels import KERNELS, Site, choose_kernel, current_site
from keras_flexast.training import compile_packed

BY_CLIP = {"tensorflow": "clip_loop", "jax": "clip_tiles"}[keras.backend.backend()]

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
    results = []
    for attention in ("dense", BY_CLIP):
        layer = MaskedSelfAttention(3, scale, attention=attention)
        layer.build(tokens.shape)
        randomize(layer)
        results.append(value_and_gradients(layer, tokens, ids, slope))
    (dense, dense_slopes), (ours, our_slopes) = results
    np.testing.assert_allclose(ours, dense, rtol=0, atol=1e-5)
    assert len(our_slopes) == 9
    for ours, dense in zip(our_slopes, dense_slopes, strict=True):
        ours, dense = np.asarray(ours), np.asarray(dense)
        np.testing.assert_allclose(ours, dense, rtol=0, atol=1e-4 * max(1, np.abs(dense).max()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("attention", ["dense", BY_CLIP])
def test_clips_never_mix(attention, bad):
    """Another clip's NaN stays there; so does an infinity, and what overflows."""
    ids = segments(ROWS["random"])
    layer = MaskedSelfAttention(3, attention=attention)
    tokens = np.random.default_rng(0).normal(size=(2, LENGTH, 12)).astype("float32")
    layer.build(tokens.shape)
    randomize(layer)
    before = ops.convert_to_numpy(layer(tokens, ids))
    tokens[0, 101:108] = bad  # the second clip of the first row
    after = ops.convert_to_numpy(layer(tokens, ids))
    others = np.ones(ids.shape, bool)
    others[0, 101:108] = False
    real = ids > 0
    np.testing.assert_array_equal(after[others & real], before[others & real])
    assert not np.isfinite(after[~others]).all() or bad == 1e30


SITE = Site("tensorflow", "cpu", False, length=512, dtype="float32", xla=False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "clip_loop"),
        ({"length": 511}, "dense"),
        ({"length": None}, "dense"),
        ({"xla": True}, "dense"),
        ({"device": "gpu"}, "dense"),
        ({"distributed": True}, "dense"),
        ({"backend": "jax", "xla": True}, "clip_tiles"),
        ({"backend": "jax", "xla": True, "length": None}, "dense"),
        ({"backend": "jax", "xla": True, "device": "gpu"}, "dense"),
        ({"backend": "torch"}, "dense"),
    ],
)
def test_auto_takes_the_fastest_that_works(change, name):
    assert choose_kernel("auto", SITE._replace(**change)) is KERNELS[name]


def test_a_named_kernel_that_does_not_work_is_refused():
    for name, site in (("clip_loop", SITE._replace(xla=True)), ("clip_tiles", SITE)):
        with pytest.raises(RuntimeError, match=f"attention='{name}' does not work here .*'dense'"):
            choose_kernel(name, site)
    with pytest.raises(ValueError, match=r"attention='fast' is unknown.*'auto', 'clip_loop'"):
        MaskedSelfAttention(3, attention="fast")
    assert not MaskedSelfAttention(3, attention="clip_loop").supports_jit
    assert MaskedSelfAttention(3).supports_jit


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a matter of TensorFlow")
def test_the_site_knows_whether_xla_compiles():
    import tensorflow as tf

    seen = {}
    for jit in (False, True):

        @tf.function(jit_compile=jit)
        def trace(x, jit=jit):
            seen[jit] = current_site(7)
            return tf.cond(x > 0, lambda: x + current_site(7).xla, lambda: x)

        trace(tf.constant(1.0))
    assert seen[True] == seen[False]._replace(xla=True) and not seen[False].xla


def packed(length):
    """Two rows of three clips: inputs, labels and weights."""
    rng, ids = np.random.default_rng(0), np.zeros((2, length), "int32")
    ids[0, :500], ids[1, :77] = np.repeat([1, 2], [310, 190]), 1
    inputs = {
        "tokens": rng.normal(size=(2, length, 256)).astype("float32"),
        "positions": np.ones((2, length, 4), "float32"),
        "segment_ids": ids,
    }
    return inputs, np.zeros((2, 2), "int32"), np.float32([[1, 1], [1, 0]])


def test_training_learns_the_same_with_every_kernel():
    inputs, labels, weights = packed(512)
    losses = {}
    for attention in ("auto", "dense"):
        model = PackedAST(3, dim=16, depth=1, num_heads=2, segments=2, attention=attention)
        compile_packed(randomize(model, scale=0.1), 1e-2, row_length=512)
        losses[attention] = [
            model.train_on_batch(inputs, labels, sample_weight=weights)[0] for _ in range(3)
        ]
    for values in losses.values():
        np.testing.assert_allclose(values, losses["dense"], atol=1e-4)


@pytest.mark.parametrize("row_length", [None, 512][keras.backend.backend() == "jax" :])
def test_fit_and_prediction_in_any_order_and_at_any_row_length(row_length):
    """Nothing that reads a model changes it: the same losses with predictions in between."""
    losses = []
    for between in (False, True):
        model = PackedAST(3, dim=16, depth=1, num_heads=2, segments=2)
        compile_packed(randomize(model, scale=0.1), 1e-2, row_length=row_length)
        found = []
        for length in (512, 640):
            inputs, labels, weights = packed(length)
            if between:
                PackedPredictor(model)(packed(length)[0])
                model.predict_on_batch(packed(576)[0])
            history = model.fit(
                inputs, labels, sample_weight=weights, batch_size=2, epochs=2, verbose=0,
                shuffle=False,
            )  # fmt: skip
            found += history.history["loss"]
        losses.append(found)
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_pytorch_predicts_with_the_dense_mask(tmp_path):
    pytest.importorskip("torch")
    model = randomize(PackedAST(3, dim=16, depth=1, num_heads=2, segments=2))
    inputs, _, weights = packed(512)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "inputs.npz", **inputs)
    code = """
        import sys
        import keras, keras_flexast, numpy as np
        model = keras.saving.load_model(f"{sys.argv[1]}/model.keras")
        output = model.predict_on_batch(dict(np.load(f"{sys.argv[1]}/inputs.npz")))
        np.save(f"{sys.argv[1]}/output.npy", output)
    """
    run_python(code, tmp_path, backend="torch")
    real = weights > 0
    ours = model.predict_on_batch(inputs)[real]
    np.testing.assert_allclose(np.load(tmp_path / "output.npy")[real], ours, rtol=0, atol=1e-5)
