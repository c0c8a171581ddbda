"""Losses, schedules and optimizers by their formulas; parts of a model; averages of weights."""

import dataclasses
import types

import keras
import numpy as np
import pytest
from helpers import ONCE

from keras_flexast import PackedAST
from keras_flexast.callbacks import Averages, KeepBest, StopDiverged
from keras_flexast.fine_tuning import tune_part
from keras_flexast.losses import PackedLoss, class_factors, packed_accuracy
from keras_flexast.optimizers import PackedAdam, PackedMuon, compile_packed
from keras_flexast.schedules import WarmupCosine, WarmupStep, schedule_of
from keras_flexast.settings import TrainSettings
from tf_data_pipelines.clips import Clip, Source

LABELS, WEIGHTS = np.int32([[0, 2], [1, 0]]), np.float32([[1, 1], [1, 0]])
CLIPS = WEIGHTS > 0


def logits():
    return np.random.default_rng(0).normal(size=(2, 2, 3)).astype("float32")


def one_hot(labels):
    return np.eye(3, dtype="float32")[labels]


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def loss_of(labels, **options):
    return float(PackedLoss(**options)(labels, logits(), WEIGHTS))


def build(depth=1, **options):
    keras.utils.set_random_seed(0)
    model = PackedAST(3, dim=16, depth=depth, num_heads=2, segments=2, **options)
    ids = np.repeat([[1] * 20 + [2] * 11 + [0]], 4, 0).astype("int32")
    rng = np.random.default_rng(0)
    inputs = {
        "tokens": rng.normal(size=(4, 32, 256)).astype("float32"),
        "positions": np.ones((4, 32, 4), "float32"),
        "segment_ids": ids,
    }
    return model, (inputs, rng.integers(0, 3, (4, 2)), np.ones((4, 2), "float32"))


@pytest.mark.parametrize("kind", ["cross_entropy", "binary"])
def test_a_loss_takes_hard_and_soft_labels_smoothing_and_class_weights(kind):
    x, share = logits(), 0.25

    def each(targets):
        if kind == "cross_entropy":
            return -(targets * log_softmax(x)).sum(-1)
        return (np.logaddexp(0, x) - targets * x).mean(-1)

    def expected(targets, factor=1.0):
        return (each(targets) * factor)[CLIPS].sum() / CLIPS.sum()

    hard, soft = one_hot(LABELS), np.float32(0.7 * one_hot(LABELS) + 0.3 * one_hot(LABELS[::-1]))
    assert loss_of(LABELS, kind=kind) == pytest.approx(expected(hard), rel=1e-5)
    assert loss_of(hard, kind=kind) == pytest.approx(expected(hard), rel=1e-5)
    assert loss_of(soft, kind=kind) == pytest.approx(expected(soft), rel=1e-5)
    smooth = hard * (1 - share) + share / (3 if kind == "cross_entropy" else 2)
    found = loss_of(LABELS, kind=kind, label_smoothing=share)
    assert found == pytest.approx(expected(smooth), rel=1e-5) != expected(hard)
    weights = np.float32([1, 2, 5])
    for labels, targets in ((LABELS, hard), (soft, soft)):
        found = loss_of(labels, kind=kind, class_weights=weights)
        assert found == pytest.approx(expected(targets, targets @ weights), rel=1e-5)


@ONCE
def test_losses_and_metrics_are_made_again_from_their_configs():
    loss = PackedLoss(True, kind="binary", label_smoothing=0.1, class_weights=[1, 2, 5])
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()
    assert float(again(one_hot(LABELS), logits(), WEIGHTS)) == pytest.approx(
        float(loss(one_hot(LABELS), logits(), WEIGHTS))
    )
    with pytest.raises(ValueError, match="kind='mse' is unknown"):
        PackedLoss(kind="mse")
    clips = [Clip("a", (0,), "train")] * 3 + [Clip("b", (1,), "train")]
    assert class_factors(Source(clips, ("a", "b", "c"), False)) == (4 / 6, 2.0, 1.0)


def test_accuracy_takes_soft_labels():
    right = [[1, 1], [1, 0]]
    scores = one_hot(LABELS) * 3 + one_hot(np.int32([[1, 1], [0, 1]])) * [
        [[0, 0, 0], [0, 0, 0]],
        [[0, 0, 0], [9, 9, 9]],
    ]
    for labels in (LABELS, 0.6 * one_hot(LABELS) + 0.4 * one_hot((LABELS + 1) % 3)):
        found = keras.ops.convert_to_numpy(packed_accuracy(labels, scores.astype("float32")))
        assert found.tolist() == right


@ONCE
def test_schedules_by_hand():
    def rates(schedule, steps):
        return [round(float(schedule(step)), 6) for step in steps]

    ast = TrainSettings(
        6, 1.0, schedule="step", warmup_steps=4, decay_start=2, decay_every=1, decay_factor=0.5
    )
    schedule = schedule_of(ast, steps=10)
    assert rates(schedule, (0, 1, 3, 19, 20, 29, 30, 59)) == [
        0.25, 0.5, 1, 1, 0.5, 0.5, 0.25, round(0.5**4, 6)
    ]  # fmt: skip
    never = dataclasses.replace(ast, decay_start=10**6, decay_every=10**6)
    assert rates(schedule_of(never, steps=2148), (3, 10**6)) == [1, 1]  # beyond an int32
    constant = schedule_of(TrainSettings(2, 1.0, schedule="constant", warmup=0.1), steps=10)
    assert rates(constant, (0, 1, 2, 19)) == [0.5, 1, 1, 1]
    cosine = schedule_of(TrainSettings(2, 1.0, warmup_steps=5), steps=10)
    assert rates(cosine, (0, 4, 5, 20)) == [0.2, 1, 1, 0]
    for one in (schedule, constant, cosine):
        again = type(one).from_config(one.get_config())
        assert rates(again, range(20)) == rates(one, range(20))
    assert isinstance(cosine, WarmupCosine) and isinstance(schedule, WarmupStep)


def steps_of(model, gradient, **options):
    """{path: change of the weights, and they before} in one step of PackedAdam."""
    variables = model.trainable_variables
    before = [keras.ops.convert_to_numpy(one) + 0.0 for one in variables]
    optimizer = PackedAdam(0.1, **options)
    optimizer.build(variables)
    optimizer.apply([keras.ops.full(one.shape, gradient) for one in variables])
    after = [keras.ops.convert_to_numpy(one) for one in variables]
    changes = {
        one.path: (new - old, old) for one, new, old in zip(variables, after, before, strict=True)
    }
    for one, old in zip(variables, before, strict=True):
        one.assign(old)
    return changes


def test_muon_moves_every_direction_of_the_encoders_matrices_alike():
    model, _ = build(depth=2)
    gradients = [np.random.default_rng(0).normal(size=one.shape) for one in model.trainable_weights]
    gradients = [one + np.sign(one) for one in gradients]
    before = [keras.ops.convert_to_numpy(one) + 0.0 for one in model.trainable_weights]
    optimizer = PackedMuon(0.1, layer_decay=0.5, weight_decay=0.2, decay_all=False)
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.convert_to_tensor(one, "float32") for one in gradients])
    matrices, above = 0, {"block_1": 1, "block_0": 2, "embed": 3}
    for weight, old, gradient in zip(model.trainable_weights, before, gradients, strict=True):
        rate = 0.1 * 0.5 ** next((n for name, n in above.items() if name in weight.path), 0)
        change = keras.ops.convert_to_numpy(weight) - old
        if weight.name == "kernel" and "position" not in weight.path:
            change = change + 0.2 * rate * old
        if "block" in weight.path and weight.name == "kernel":
            matrices += 1
            values = np.linalg.svd(change, compute_uv=False) / rate
            values /= 0.2 * max(change.shape) ** 0.5
            assert values.min() > 0.4 and values.max() < 1.3, weight.path
            assert np.sum(change * gradient) < 0
        else:  # as AdamW
            np.testing.assert_allclose(change, -rate * np.sign(gradient), rtol=1e-3, atol=1e-5)
    assert matrices == 12
    again = PackedMuon.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    found = compiled_optimizer(model, optimizer="muon", betas=(0.8, 0.9), weight_decay=0.3, ema=0.9)
    assert isinstance(found, PackedMuon) and found.use_ema
    assert (found.adam_beta_1, found.adam_beta_2, found.decay) == (0.8, 0.9, 0.3)


def compiled_optimizer(model, **settings):
    compile_packed(model, 0.1, **settings)
    return model.optimizer


def test_the_learning_rate_falls_from_block_to_block():
    model, _ = build(depth=2)
    for path, (change, _) in steps_of(model, 1.0, layer_decay=0.5).items():
        above = {"block_1": 1, "block_0": 2, "patch_embed": 3, "position_embed": 3}
        above = next((n for name, n in above.items() if name in path), 0)
        np.testing.assert_allclose(change, -0.1 * 0.5**above, rtol=1e-4, err_msg=path)


def test_weight_decay_spares_what_is_no_kernel():
    model, _ = build(pooling="cls")
    decoupled = {"weight_decay": 0.5, "decoupled": True}
    found = steps_of(model, 0.0, decay_all=False, **decoupled)
    spared = {path for path, (change, _) in found.items() if not np.any(change)}
    kernels = {path for path in found if path.endswith("kernel")}
    assert kernels and not spared & kernels and spared | kernels == set(found)
    for path, (change, old) in steps_of(model, 0.0, **decoupled).items():
        np.testing.assert_allclose(change, -0.1 * 0.5 * old, rtol=1e-4, atol=1e-7, err_msg=path)
    # Added to the gradient, it decides the direction of Adam's first step alone.
    for path, (change, old) in steps_of(model, 0.0, weight_decay=0.5).items():
        big = np.abs(old) > 1e-3
        np.testing.assert_allclose(change[big], -0.1 * np.sign(old[big]), rtol=1e-2, err_msg=path)
    again = PackedAdam.from_config(PackedAdam(0.1, layer_decay=0.5, **decoupled).get_config())
    assert (again.decay, again.decoupled, again.layer_decay) == (0.5, True, 0.5)


def test_a_part_of_a_model_learns_and_is_saved_as_an_ordinary_one(tmp_path):
    for part in ({"frozen": True}, {"lora_rank": 2}):
        model, (inputs, labels, weights) = build()
        plain = len(model.weights)
        backbone = [np.array(one) for one in model.backbone.get_weights()]
        head = model.head.get_weights()[0]
        tune_part(model, TrainSettings(**part))
        compile_packed(model, 1e-2, clip_norm=1.0)
        for _ in range(3):
            model.train_on_batch(inputs, labels, sample_weight=weights)
        assert np.abs(model.head.get_weights()[0] - head).max() > 1e-3
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
        assert len(loaded.weights) == plain
        expected, found = (one.predict_on_batch(inputs) for one in (model, loaded))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        changed = {
            one.path
            for one, old in zip(loaded.backbone.weights, backbone, strict=True)
            if not np.array_equal(keras.ops.convert_to_numpy(one), old)
        }
        low_rank = ("query/kernel", "value/kernel", "output/kernel")
        expected = {path for path in changed if path.endswith(low_rank)}
        assert changed == expected and len(changed) == (3 if "lora_rank" in part else 0)


@pytest.mark.parametrize("ema", [0.5, None])
def test_averaged_weights_are_validated_and_saved(tmp_path, ema):
    model, batch = build()
    compile_packed(model, 1e-2, ema=ema)
    averages, ends, validated = Averages(None if ema else 1), [], []

    def ends_of(epoch, logs):
        ends.append([np.array(one) for one in map(keras.ops.convert_to_numpy, model.weights)])
        validated.append(logs["val_loss"])

    model.fit(
        *batch[:2], sample_weight=batch[2], validation_data=batch, batch_size=4, epochs=3,
        shuffle=False, verbose=0,
        callbacks=[
            KeepBest(tmp_path / "model.keras", "val_accuracy", always=True),
            averages, keras.callbacks.LambdaCallback(on_epoch_end=ends_of),
        ],
    )  # fmt: skip
    mean = (ends[1][0] + ends[2][0]) / 2
    if ema:
        mean = ends[0][0]
        for end in ends[1:]:
            mean = 0.5 * mean + 0.5 * end[0]
    saved = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(saved.get_weights()[0], mean, rtol=0, atol=1e-6)
    assert np.abs(mean - ends[2][0]).max() > 1e-4  # it trained on with its own weights
    compile_packed(saved, 1e-2)
    loss = saved.test_on_batch(batch[0], batch[1], sample_weight=batch[2])[0]
    assert validated[-1] == pytest.approx(float(loss), rel=1e-5)


@ONCE
def test_training_stops_where_it_gets_no_better(tmp_path):
    saved, model = [], types.SimpleNamespace(stop_training=False)
    model.save = lambda path: (saved.append(path), path.touch())
    keep = KeepBest(tmp_path / "model.keras", "val_mAP", patience=2)
    keep.set_model(model)
    stops = []
    for epoch, value in enumerate([0.5, float("nan"), 0.6, 0.6, 0.5]):
        keep.on_epoch_end(epoch, {"val_mAP": value})
        stops.append(model.stop_training)
    assert stops == [False, False, False, False, True] and len(saved) == 3
    again = KeepBest(tmp_path / "model.keras", "val_mAP", patience=3)
    again.restore(*keep.state())
    again.set_model(types.SimpleNamespace(stop_training=False))
    again.on_epoch_end(5, {"val_mAP": 0.1})
    assert again.model.stop_training


@ONCE
def test_a_diverged_training_names_step_learning_rate_and_batch():
    stop = StopDiverged("run.partial", steps=10)
    stop.set_model(types.SimpleNamespace(optimizer=types.SimpleNamespace(learning_rate=0.5)))
    stop.on_epoch_begin(2)
    stop.on_train_batch_end(3, {"loss": 1.0})
    message = (
        r"in step 4 of epoch 3, at a learning rate of 0\.5, .*training_batches\(.*, start=23\)"
    )
    with pytest.raises(ValueError, match=f"the loss is nan {message}"):
        stop.on_train_batch_end(3, {"loss": float("nan")})
    with pytest.raises(ValueError, match="the loss is inf in the validation after epoch 3"):
        stop.on_epoch_end(2, {"val_loss": float("inf")})


def test_what_is_no_setting_of_a_compilation_is_refused():
    model, _ = build()
    with pytest.raises(ValueError, match="compile_packed has no setting epochs; it has optimizer"):
        compile_packed(model, 1e-3, epochs=3)


def test_the_loss_of_scores_is_that_of_their_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 3, 4)), rng.integers(0, 4, (2, 3))
    sigmoid, softmax = keras.ops.sigmoid(logits), keras.ops.softmax(logits)
    for kind, scores in (("binary", sigmoid), ("cross_entropy", softmax)):
        expected = PackedLoss(kind=kind)(labels, logits)
        found = PackedLoss(kind=kind, from_logits=False)(labels, scores)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
