"""Two devices learn what one does: the same losses, step by step."""

import keras
import pytest
from helpers import ONCE, run_python

COMMON = """
    import keras, numpy as np
    from keras_flexast import PackedAST
    from keras_flexast.training import compile_packed
    rng = np.random.default_rng(0)
    ids = np.repeat([[1] * 20 + [2] * 11 + [0]], 4, 0).astype("int32")
    inputs = {
        "tokens": rng.normal(size=(4, 32, 256)).astype("float32"),
        "positions": np.ones((4, 32, 4), "float32"),
        "segment_ids": ids,
    }
    labels, weights = rng.integers(0, 3, (4, 2)), np.ones((4, 2), "float32")

    def losses():
        keras.utils.set_random_seed(0)
        model = PackedAST(3, dim=16, depth=2, num_heads=2, segments=2)
        compile_packed(model, 1e-2)
        return [
            float(model.fit(inputs, labels, sample_weight=weights, batch_size=4, shuffle=False,
                            verbose=0).history["loss"][0])
            for _ in range(3)
        ]
"""
JAX = """
    one = losses()
    devices = keras.distribution.list_devices()
    assert len(devices) == 2, devices
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    two = losses()
"""
TENSORFLOW = """
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    one = losses()
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        two = losses()
"""

SPREAD = """
    from keras_flexast.distribution import layout_map
    one = losses()
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(layout_map=layout_map(mesh), batch_dim_name="batch")
    )
    two = losses()
    model = PackedAST(3, dim=16, depth=2, num_heads=2, segments=2)
    split = {w.path for w in model.weights if not w.value.sharding.is_fully_replicated}
    # A block: query, key, value and hidden, kernels and biases, and two kernels of outputs.
    assert len(split) == 2 * (2 * 4 + 2), sorted(split)
"""


def test_two_devices_have_the_losses_of_one(monkeypatch):
    jax = keras.backend.backend() == "jax"
    if jax:
        monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    out = run_python(
        COMMON + (JAX if jax else TENSORFLOW) + '\n    print("LOSSES", *one, *two)\n',
        backend=keras.backend.backend(),
    )
    (line,) = (line for line in out.splitlines() if line.startswith("LOSSES"))
    values = [float(value) for value in line.split()[1:]]
    assert values[0] > values[2] and values[:3] == pytest.approx(values[3:], abs=1e-4)


@ONCE
def test_a_model_spread_over_two_devices_has_the_losses_of_one(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    out = run_python(COMMON + SPREAD + '\n    print("LOSSES", *one, *two)\n', backend="jax")
    (line,) = (line for line in out.splitlines() if line.startswith("LOSSES"))
    values = [float(value) for value in line.split()[1:]]
    assert values[0] > values[2] and values[:3] == pytest.approx(values[3:], abs=1e-4)
