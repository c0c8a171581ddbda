"""Packed models in ordinary Keras: what any other functional model can do."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import pack_rows

from keras_flexast import (
    ElasticAST,
    MaskAttentionPooling,
    MaskedSelfAttention,
    PIResizePatchEmbed,
    compile_packed,
)

ROWS, LENGTH, SEGMENTS = 8, 16, 2


def build(**options):
    keras.utils.set_random_seed(0)
    return ElasticAST(
        3, dim=16, depth=1, num_heads=2, grid=(4, 16), segments=SEGMENTS, **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    """Packed inputs, labels and weights of two clips in each row, whose mean tells the class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (ROWS, SEGMENTS)).astype("int32")
    rows = [
        [(rng.normal(2 * label - 2, 0.3, (6, 256)).astype("float32"), np.ones((6, 4), "float32"))
         for label in row]
        for row in labels
    ]  # fmt: skip
    return pack_rows(rows, LENGTH, SEGMENTS), labels, np.ones((ROWS, SEGMENTS), "float32")


def loss_of(history):
    return history.history["loss"]


def test_a_summary_names_the_parts_and_a_plot_has_them():
    pydot = pytest.importorskip("pydot")
    model, lines = build(), []
    model.summary(print_fn=lines.append)
    assert "pooling" in "\n".join(lines) and "MaskAttention" in "\n".join(lines)
    graph = keras.utils.model_to_dot(model, show_shapes=True, expand_nested=True)
    assert isinstance(graph, pydot.Graph | pydot.Dot | pydot.Cluster)
    assert "MaskAttentionPooling" in graph.to_string()


def test_it_learns_from_numpy_tf_data_and_grain(batch):
    inputs, labels, weights = batch
    grain = pytest.importorskip("grain")

    def element(row):
        return {name: one[row] for name, one in inputs.items()}, labels[row], weights[row]

    numpy = {"x": inputs, "y": labels, "sample_weight": weights, "batch_size": 4}
    tf_data = {"x": tf.data.Dataset.from_tensor_slices(batch).batch(4)}
    mapped = grain.MapDataset.range(ROWS).map(element).batch(4)
    for data in (numpy, tf_data, {"x": mapped.to_iter_dataset()}):
        model = build()
        compile_packed(model, 0.01)
        losses = [loss_of(model.fit(**data, shuffle=False, verbose=0)) for _ in range(4)]
        assert losses[-1] < losses[0]
        if data is numpy:
            expected = losses
        np.testing.assert_allclose(losses, expected, rtol=0.1)  # the same batches


def test_it_learns_from_a_dataloader_of_pytorch(batch):
    torch = pytest.importorskip("torch")
    inputs, labels, weights = batch
    rows = [({k: v[i] for k, v in inputs.items()}, labels[i], weights[i]) for i in range(ROWS)]
    model = build()
    compile_packed(model, 0.01)
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    assert loss_of(model.fit(loader, epochs=4, verbose=0))[-1] < 1.0


def test_callbacks_of_keras_see_the_training(batch, tmp_path):
    inputs, labels, weights = batch
    model = build()
    compile_packed(model, 0.01)
    best = keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "loss", save_best_only=True)
    stop = keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=1)
    history = model.fit(
        inputs, labels, sample_weight=weights, epochs=9, verbose=0, callbacks=[best, stop]
    )
    assert len(loss_of(history)) == 2
    loaded = keras.models.load_model(tmp_path / "best.keras")
    assert isinstance(loaded, type(model))
    np.testing.assert_allclose(loaded.predict(inputs, verbose=0), model.predict(inputs, verbose=0))


def test_a_training_loop_of_ones_own(batch):
    inputs, labels, weights = batch
    model = build()
    compile_packed(model, 0.01)  # for its loss
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    losses = []
    if keras.backend.backend() == "tensorflow":
        for _ in range(5):
            with tf.GradientTape() as tape:
                loss = model.loss(labels, model(inputs, training=True), weights)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            losses.append(float(loss))
    else:
        import jax

        @jax.jit
        def step(trainable, other, state):
            def loss_of(trainable):
                logits, _ = model.stateless_call(trainable, other, inputs, training=True)
                return model.loss(labels, logits, weights)

            loss, gradients = jax.value_and_grad(loss_of)(trainable)
            return loss, *optimizer.stateless_apply(state, gradients, trainable)

        trainable = [one.value for one in model.trainable_variables]
        other = [one.value for one in model.non_trainable_variables]
        state = [one.value for one in optimizer.variables]
        for _ in range(5):
            loss, trainable, state = step(trainable, other, state)
            losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_the_layers_make_a_subclassed_model(batch):
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.embed = PIResizePatchEmbed(16)
            self.attention = MaskedSelfAttention(2)
            self.pooling = MaskAttentionPooling(2, SEGMENTS)
            self.head = keras.layers.Dense(3)

        def call(self, inputs):
            x, ids = self.embed(inputs["tokens"]), inputs["segment_ids"]
            return self.head(self.pooling(x + self.attention(x, ids), ids))

    inputs, labels, weights = batch
    model = Mine()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, weighted_metrics=["accuracy"], jit_compile=False)
    losses = loss_of(model.fit(inputs, labels, sample_weight=weights, epochs=4, verbose=0))
    assert losses[-1] < losses[0]


def test_a_new_head_on_a_part_of_it(batch):
    inputs, labels, weights = batch
    old = build()
    old.backbone.trainable = False
    outputs = keras.layers.Dense(2, name="new_head")(old.pooling.output)
    model = keras.Model(old.input, outputs)
    compile_packed(model, 0.01)
    before = old.backbone.get_weights()
    model.fit(inputs, labels % 2, sample_weight=weights, epochs=2, verbose=0)
    assert model.output_shape == (None, SEGMENTS, 2)
    for new, one in zip(old.backbone.get_weights(), before, strict=True):
        np.testing.assert_array_equal(new, one)
    assert len(model.trainable_weights) == len(old.pooling.weights) + 2


def test_a_policy_of_mixed_precision(batch):
    inputs, labels, weights = batch
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        model = build()
    finally:
        keras.config.set_dtype_policy(policy)
    assert model.backbone.blocks[0].compute_dtype == "bfloat16"
    assert (model.head.compute_dtype, model.weights[0].dtype) == ("float32", "float32")
    compile_packed(model, 0.01)
    losses = loss_of(model.fit(inputs, labels, sample_weight=weights, epochs=4, verbose=0))
    assert losses[-1] < losses[0]
