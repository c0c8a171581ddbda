"""Kernels: each computes what the dense mask does, forward and backward; "auto" chooses one."""

import functools

import keras
import numpy as np
import pytest
from helpers import randomize, run_python
from keras import ops

from keras_flexast import PackedAST
from keras_flexast.inference.scoring import PackedPredictor
from keras_flexast.layers import MaskedSelfAttention
from keras_flexast.layers.clip_ranges import tile_ranges, token_ranges
from keras_flexast.layers.kernels import KERNELS, Site, choose_kernel, current_site
from keras_flexast.training import compile_packed

LENGTH = 450  # more than two of the tiles that JAX takes
BY_CLIP = [
    name for name, kernel in KERNELS.items()
    if name != "dense" and kernel.works(current_site(LENGTH, width=4))
]  # fmt: skip
ON_GPU = [name for name in ("clip_triton", "clip_bands") if name in BY_CLIP]
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


@functools.cache
def compiled(attention, width, heads, scale=None, dtype="float32"):
    """Function of tokens, segment ids and slopes, compiled once for all layouts of rows.

    It returns the output at real tokens, and the gradients of its product with the slopes.
    """
    layer = MaskedSelfAttention(heads, scale, attention=attention, dtype=dtype)
    layer.build((2, LENGTH, width))
    randomize(layer)

    def loss(x, weights, ids, slope):
        output = layer.stateless_call(weights, [], x, ids)[0]
        output = ops.cast(ops.where((ids > 0)[..., None], output, 0.0), "float32")
        return ops.sum(output * slope), output

    weights = [w.value for w in layer.trainable_weights]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function
        def run(x, ids, slope):
            with tf.GradientTape() as tape:
                tape.watch([x, *weights])
                total, output = loss(x, weights, ids, slope)
            return output, tape.gradient(total, [x, *weights])

        return lambda *arrays: run(*map(tf.constant, arrays))
    import jax

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    def values(x, ids, slope):
        (_, output), (dx, dw) = run(x, weights, ids, slope)
        return output, [dx, *dw]

    return values


@pytest.mark.parametrize("kernel", BY_CLIP)
@pytest.mark.parametrize("name, scale", [*((name, None) for name in ROWS), ("random", 1.0)])
def test_equal_to_the_dense_mask(name, scale, kernel):
    rng, ids = np.random.default_rng(0), segments(ROWS[name])
    tokens, slope = (rng.normal(size=(2, LENGTH, 12)).astype("float32") for _ in range(2))
    results = [
        compiled(attention, 12, 3, scale)(tokens, ids, slope) for attention in ("dense", kernel)
    ]
    (dense, dense_slopes), (ours, our_slopes) = results
    np.testing.assert_allclose(ours, dense, rtol=0, atol=1e-5)
    assert len(our_slopes) == 9
    for ours, dense in zip(our_slopes, dense_slopes, strict=True):
        ours, dense = np.asarray(ours), np.asarray(dense)
        np.testing.assert_allclose(ours, dense, rtol=0, atol=1e-4 * max(1, np.abs(dense).max()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("attention", ["dense", *BY_CLIP])
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


@pytest.mark.parametrize("kernel", BY_CLIP)
def test_huge_values_of_a_neighbor_change_nothing(kernel):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 128, 2, 16)).astype("float32") for _ in range(3))
    ids = np.repeat([1, 2, 0], [70, 50, 8])[None].astype("int32")
    attend = KERNELS[kernel].function
    before = ops.convert_to_numpy(attend(query, key, value, ids))
    value[0, :70] = 2e37
    after = ops.convert_to_numpy(attend(query, key, value, ids))
    np.testing.assert_array_equal(after[0, 70:120], before[0, 70:120])


@pytest.mark.parametrize("kernel", ON_GPU)
def test_output_and_gradients_in_bfloat16_are_near_those_in_float32(kernel):
    """bfloat16 has 8 bits: the largest numbers differ in the last two or three of them."""
    rng, ids = np.random.default_rng(0), segments(ROWS["random"])
    tokens, slope = (rng.normal(size=(2, LENGTH, 32)).astype("float32") for _ in range(2))
    results = []
    for attention, dtype in (("dense", "float32"), (kernel, "mixed_bfloat16")):
        output, slopes = compiled(attention, 32, 2, 0.05, dtype)(tokens, ids, slope)
        results.append([np.asarray(x) for x in (output, slopes[0])])
    for ours, dense in zip(results[1], results[0], strict=True):
        assert np.abs(ours - dense).max() < 0.05 * np.abs(dense).max()


@pytest.mark.parametrize("kernel, most", [("clip_triton", 2), ("clip_bands", 4)])
def test_long_rows_cost_no_more_for_each_clip(kernel, most):
    """The pairs of tokens that are computed grow with the clips, not with the square of a row."""
    tile = pytest.importorskip(f"keras_flexast.layers.{kernel}").TILE
    costs = []
    for clips in (5, 10, 20):
        ids = np.zeros((1, 400 * clips // tile * tile + tile), "int32")
        ids[0, : 400 * clips] = np.repeat(np.arange(1, clips + 1), 400)
        begin, end = tile_ranges(ids, *token_ranges(ids), tile)
        visited = ops.convert_to_numpy(-(-end // tile) - begin // tile)
        if kernel == "clip_bands":  # every tile goes as long as the one with most to visit
            visited = np.full_like(visited, ops.convert_to_numpy(-((begin - end) // tile)).max())
        costs.append(visited.sum() * tile**2 / (clips * 400**2))
    assert max(costs) < min(most, 1.1 * min(costs))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="XLA is JAX's own way")
def test_bands_under_xla():
    import tensorflow as tf

    rng, ids = np.random.default_rng(0), segments(ROWS["random"])
    heads = tf.constant(rng.normal(size=(3, 2, LENGTH, 3, 4)), tf.float32)

    def slopes(kernel, heads):
        with tf.GradientTape() as tape:
            tape.watch(heads)
            output = KERNELS[kernel].function(*tf.unstack(heads), ids)
            total = tf.reduce_sum(tf.where((ids > 0)[..., None, None], output, 0.0) ** 2)
        return total, tape.gradient(total, heads)

    ours = tf.function(slopes, jit_compile=True)("clip_bands", heads)
    for one, other in zip(ours, slopes("dense", heads), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("attention", [name for name in BY_CLIP if KERNELS[name].supports_jit])
def test_blocks_that_are_computed_again_learn_the_same(attention):
    """Gradient checkpointing, also where the tiles are made inside of it."""
    inputs, labels, weights = packed(512)
    losses = {}
    for kind in ("dense", attention):
        model = PackedAST(
            3, dim=16, depth=1, num_heads=2, segments=2, attention=kind, remat=kind != "dense"
        )
        compile_packed(randomize(model, scale=0.1), 1e-2, row_length=512)
        losses[kind] = [
            float(model.train_on_batch(inputs, labels, sample_weight=weights)[0]) for _ in range(2)
        ]
    np.testing.assert_allclose(losses[attention], losses["dense"], atol=1e-4)


@pytest.mark.parametrize("kernel", ON_GPU)
def test_gradients_that_cancel_do_so_in_bfloat16(kernel):
    """A clip of one token attends to itself alone: nothing moves with query and key."""
    rng, ids = np.random.default_rng(0), np.arange(1, 33, dtype="int32")[None]
    query, key, value, slope = rng.normal(size=(4, 1, 32, 2, 64))
    value += 2

    def loss(query, key):
        output = KERNELS[kernel].function(query, key, ops.cast(value, "bfloat16"), ids)
        return ops.sum(ops.cast(output, "float32") * slope.astype("float32"))

    given = [ops.cast(x, "bfloat16") for x in (query, key)]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(given)
            total = loss(*given)
        found = tape.gradient(total, given)
    else:
        import jax

        found = jax.grad(loss, (0, 1))(*given)
    for one in found:
        assert np.abs(ops.convert_to_numpy(ops.cast(one, "float32"))).max() < 0.03


@pytest.mark.parametrize("kernel", ON_GPU)
def test_no_rows(kernel):
    empty, ids = np.zeros((0, 70, 2, 4), "float32"), np.zeros((0, 70), "int32")
    assert KERNELS[kernel].function(empty, empty, empty, ids).shape == empty.shape


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Triton is JAX's")
def test_a_training_step_becomes_triton_code_without_a_gpu():
    import jax

    model = PackedAST(
        3, dim=32, depth=1, num_heads=2, segments=2, attention="clip_triton",
        dtype="mixed_bfloat16",
    )  # fmt: skip
    inputs, _, weights = packed(512)

    def loss(trainable, inputs):
        scores, _ = model.stateless_call(trainable, frozen, inputs, training=True)
        return ops.sum(ops.cast(scores, "float32") * weights[..., None])

    values = [[v.value for v in vs] for vs in (model.trainable_variables,
                                               model.non_trainable_variables)]  # fmt: skip
    trainable, frozen = values
    allowed = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    step = jax.export.export(
        jax.jit(jax.value_and_grad(loss)), platforms=["cuda"], disabled_checks=allowed
    )(trainable, inputs)
    names = "output_kernel", "query_kernel", "key_kernel"
    assert all(name in step.mlir_module() for name in names)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Triton is JAX's")
def test_a_gpu_without_triton_takes_the_bands_and_says_so(monkeypatch, caplog):
    from keras_flexast.layers import clip_triton

    gpu = SITE._replace(backend="jax", device="gpu", length=4096, xla=True)
    trials = (
        (lambda *_: 1e-6, "clip_triton"), (lambda *_: 1.0, "clip_bands"),
        (lambda *_: 1 / 0, "clip_bands"),
    )  # fmt: skip
    for error, name in trials:
        clip_triton.works_here.cache_clear()
        monkeypatch.setattr(clip_triton, "largest_error", error)
        for _ in range(2):
            assert choose_kernel("auto", gpu) is KERNELS[name]
        assert choose_kernel("auto", gpu._replace(length=511)) is KERNELS["dense"]  # nothing tried
    clip_triton.works_here.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        f"'clip_triton' fails on this GPU and is left out: {problem}."
        for problem in ("float32 numbers differ by 1.0e+00", "division by zero")
    ]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Triton is JAX's")
def test_the_trial_of_triton_runs_while_a_model_is_traced():
    import jax

    from keras_flexast.layers import clip_triton

    clip_triton.works_here.cache_clear()
    works = clip_triton.works_here
    assert jax.jit(lambda x: x + works(KERNELS["dense"].function, 8, "float32"))(1) == 2


SITE = Site("tensorflow", "cpu", False, length=512, width=64, dtype="float32", xla=False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "clip_loop"),
        ({"length": 511}, "dense"),
        ({"length": None}, "dense"),
        ({"xla": True}, "dense"),
        ({"device": "gpu", "length": 4096}, "clip_bands"),
        ({"device": "gpu", "length": 4096, "xla": True}, "clip_bands"),
        ({"device": "gpu", "length": 4095}, "dense"),
        ({"distributed": True}, "dense"),
        ({"backend": "jax", "xla": True}, "clip_tiles"),
        ({"backend": "jax", "xla": True, "length": None}, "dense"),
        (
            {"backend": "jax", "xla": True, "device": "gpu", "length": 4096, "distributed": True},
            "clip_bands",
        ),
        ({"backend": "jax", "xla": True, "device": "tpu"}, "dense"),
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
            seen[jit] = current_site(7, 8)
            return tf.cond(x > 0, lambda: x + current_site(7, 8).xla, lambda: x)

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
    for attention in ("dense", *BY_CLIP):
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
