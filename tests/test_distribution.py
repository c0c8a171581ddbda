"""Two devices learn what one does: the same losses, step by step, and the same answers."""

import os

import keras
import pytest
from helpers import ONCE, run_python, write_tones

from keras_flexast import distribution, load_run
from keras_flexast.distribution import data_parallel
from tf_data_pipelines.settings import PackSettings

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

    def losses(attention="dense"):
        keras.utils.set_random_seed(0)
        model = PackedAST(3, dim=16, depth=2, num_heads=2, segments=2, attention=attention)
        compile_packed(model, 1e-2, row_length=32)
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

UNEQUAL = """
    import pytest
    from keras_flexast.distribution import batch_devices
    from keras_flexast.inference.scoring import PackedPredictor
    from keras_flexast.losses import PackedLoss

    def step(clips, multi_label, accumulate=None):
        weights = np.float32([[slot < count for slot in range(2)] for count in clips])
        targets = np.eye(3, dtype="float32")[labels] if multi_label else labels
        keras.utils.set_random_seed(0)
        model = PackedAST(3, dim=16, depth=1, num_heads=2, segments=2)
        model.compile(
            keras.optimizers.SGD(1.0, gradient_accumulation_steps=accumulate),
            PackedLoss(multi_label),
            weighted_metrics=[] if multi_label else ["accuracy"],
        )
        logs = model.fit(
            inputs, targets, sample_weight=weights, batch_size=4, shuffle=False, verbose=0,
            epochs=accumulate or 1,
        ).history
        odd = {name: value[:3] for name, value in inputs.items()}
        return [*model.get_weights(), PackedPredictor(model)(odd), *logs.values()]

    def steps():
        found = [step([2, 2, 1, 0], False), step([2, 0, 0, 0], True)]
        if keras.backend.backend() == "jax":
            return [*found, step([2, 2, 1, 0], False, accumulate=2)]
        if batch_devices() == 2:
            model = PackedAST(3, dim=16, depth=1, num_heads=2, segments=2)
            with pytest.raises(ValueError, match="accumulate=2: Keras cannot"):
                compile_packed(model, 1e-3, accumulate=2)
        return found
"""
SAME = """
    for ours, theirs in zip(two, one, strict=True):
        for here, there in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)
"""
TOGETHER = """
    for ours, theirs in zip(two, one, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
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

TASK = """
    import keras, numpy as np
    from keras_flexast.hub import AudioClassifier
    from keras_flexast import ElasticAST, Run
    from tf_data_pipelines import FbankSettings, PackSettings
    rng = np.random.default_rng(0)
    clips = [rng.normal(0, 0.1, 3000 + 500 * number).astype("float32") for number in range(7)]
    labels = [0, 1, 2, 0, 1, 2, 0]

    def losses():
        keras.utils.set_random_seed(0)
        fbank = FbankSettings(sample_rate=8000, mel_bins=64, mean=-6.0, std=3.0)
        model = ElasticAST(3, dim=16, depth=1, num_heads=2, grid=(4, 64), segments=4)
        classifier = AudioClassifier.from_run(Run(
            model, fbank, patches=model.patch_settings((8, 16, 24)),
            packing=PackSettings(2, 128, 4), classes=("a", "b", "c"),
        ))
        classifier.compile(keras.optimizers.Adam(1e-2), jit_compile=False)
        history = classifier.fit(clips, labels, epochs=2, batch_size=5, verbose=0).history
        return [*history["loss"], classifier.predict(clips)]
"""


def on_two_devices(monkeypatch):
    """Code that sets `one` to the losses on one device and `two` to those on two."""
    if keras.backend.backend() != "jax":
        return TENSORFLOW
    force_two_devices(monkeypatch)
    return JAX


def force_two_devices(monkeypatch):
    """Two devices of JAX for a process to come, with threads enough to wait for each other.

    On two cores XLA had two threads for both, and stopped the process after 40 s of waiting.
    """
    monkeypatch.setenv("NPROC", "8")  # threads of XLA on CPUs
    flags = [
        os.environ.get("XLA_FLAGS", ""),  # conftest's: compile fast
        "--xla_force_host_platform_device_count=2",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    ]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))


def test_two_devices_have_the_losses_of_one(monkeypatch):
    """With the attention that several GPUs take, beside the dense mask on one device."""
    code = on_two_devices(monkeypatch).replace("two = losses()", 'two = losses("clip_bands")')
    assert "clip_bands" in code
    out = run_python(
        COMMON + code + '\n    print("LOSSES", *one, *two)\n',
        backend=keras.backend.backend(),
    )
    (line,) = (line for line in out.splitlines() if line.startswith("LOSSES"))
    values = [float(value) for value in line.split()[1:]]
    assert values[0] > values[2] and values[:3] == pytest.approx(values[3:], abs=1e-4)


def test_every_clip_counts_alike_on_two_devices(monkeypatch):
    """However many clips a device has: gradient, loss, accuracy and predictions."""
    code = on_two_devices(monkeypatch).replace("losses()", "steps()")
    run_python(COMMON + UNEQUAL + code + SAME, backend=keras.backend.backend())


def test_the_task_of_kerashub_learns_the_same_on_two_devices(monkeypatch):
    pytest.importorskip("keras_hub")
    code = TASK + on_two_devices(monkeypatch) + TOGETHER
    run_python(code, backend=keras.backend.backend())


def test_rows_that_devices_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(distribution, "batch_devices", lambda: 3)
    distribution.check_devices(PackSettings(rows=6))
    with pytest.raises(
        ValueError, match=r"devices=3 cannot share the 4 rows .* number that divides"
    ):
        distribution.check_devices(PackSettings(rows=4))
    with (
        pytest.raises(ValueError, match=r"devices=1\.0 must be an int"),
        distribution.data_parallel(1.0),
    ):
        pass


TRAINED = """
    import sys
    import keras
    from keras_flexast import cli
    sys.argv = ["flexast", "train", sys.argv[1], "--out", sys.argv[2], "--devices", "2",
                "--epochs", "2", "--patch-sizes", "32", "--batch-clips", "8"]
    cli.main()
"""
VIRTUAL = """
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""


def test_train_shares_its_batches_among_devices(tmp_path, monkeypatch):
    """The run is an ordinary one; a third device is refused in one sentence."""
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write_tones(data)
    if keras.backend.backend() == "jax":
        force_two_devices(monkeypatch)
    code = (VIRTUAL if keras.backend.backend() == "tensorflow" else "") + TRAINED
    shown = run_python(code, data, out, backend=keras.backend.backend())
    assert "The run is in" in shown
    run = load_run(out)
    assert run.packing.rows % 2 == 0
    assert keras.distribution.distribution() is None and run.classes == ("high", "low")
    with (
        pytest.raises(
            ValueError, match=r"devices=9 must be an int from 1 to \d+, the number of devices"
        ),
        data_parallel(9),
    ):
        pass


@ONCE
def test_a_model_spread_over_two_devices_has_the_losses_of_one(monkeypatch):
    force_two_devices(monkeypatch)
    out = run_python(COMMON + SPREAD + '\n    print("LOSSES", *one, *two)\n', backend="jax")
    (line,) = (line for line in out.splitlines() if line.startswith("LOSSES"))
    values = [float(value) for value in line.split()[1:]]
    assert values[0] > values[2] and values[:3] == pytest.approx(values[3:], abs=1e-4)
