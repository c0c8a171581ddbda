"""Options of a training: what it computes with, and how it spares memory."""

import dataclasses
import os
import pathlib

import keras
import numpy as np
import pytest
from helpers import run_python, write_tones

from keras_flexast import PackedAST
from keras_flexast.inference import load_classifier
from keras_flexast.inference.scoring import check_finite, fixed_scores
from keras_flexast.runs import Run, load_run
from keras_flexast.settings import TrainSettings
from keras_flexast.training import compile_packed, train_run
from tf_data_pipelines import evaluation_batches, read_data
from tf_data_pipelines.settings import DataWarning, FbankSettings, PackSettings

NANO = {"size": None, "dim": 16, "depth": 1, "num_heads": 2}
WEIGHTS = np.float32([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]])


def batch(length=512):
    """Four rows of two clips, by which the blocks may attend clip by clip."""
    rng, ids = np.random.default_rng(0), np.zeros((4, length), "int32")
    ids[:, :50] = np.repeat([1, 2], [29, 21])
    inputs = {
        "tokens": rng.normal(size=(4, length, 256)).astype("float32"),
        "positions": np.ones((4, length, 4), "float32"),
        "segment_ids": ids,
    }
    return inputs, rng.integers(0, 3, (4, 3))


def build(**options):
    keras.utils.set_random_seed(0)
    return PackedAST(3, dim=16, depth=1, num_heads=2, segments=3, **options)


def losses(model, inputs, labels, steps=4):
    found = []
    for _ in range(steps):
        model.reset_metrics()
        found.append(float(model.train_on_batch(inputs, labels, sample_weight=WEIGHTS)[0]))
    return found


@pytest.mark.parametrize("length", [64, 512], ids=["dense", "by clip"])
def test_gradient_checkpointing_learns_the_same(length, tmp_path):
    results = []
    for remat in (False, True):
        model = build(remat=remat)
        compile_packed(model, 1e-2, row_length=length)
        results.append(losses(model, *batch(length)))
    np.testing.assert_allclose(*results, rtol=0, atol=1e-5)
    assert results[0][-1] < results[0][0]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    expected, found = (one.predict_on_batch(batch(length)[0])[:, :2] for one in (model, loaded))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_gradient_checkpointing_with_dropout_is_refused():
    with pytest.raises(ValueError, match=r"dropout=0\.1 would be drawn anew when remat=True"):
        build(dropout=0.1, remat=True)


def test_two_half_batches_are_one_whole():
    """Of the same number of clips: the mean of means is the mean."""
    (inputs, labels), outputs = batch(64), {}
    for accumulate in (1, 2):
        model = build()
        before = model.head.kernel.numpy()
        compile_packed(model, 1e-3, accumulate=accumulate)
        for _ in range(3):
            for rows in np.split(np.arange(4), accumulate):
                part = {name: value[rows] for name, value in inputs.items()}
                model.train_on_batch(part, labels[rows], sample_weight=WEIGHTS[rows])
        assert int(model.optimizer.iterations) == 3
        # Not the weights: the key's bias has no effect, and Adam moves it by rounding errors.
        outputs[accumulate] = model.predict_on_batch(inputs)[:, :2]
    assert np.abs(model.head.kernel.numpy() - before).max() > 1e-3
    np.testing.assert_allclose(outputs[2], outputs[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_learns(dtype):
    if dtype == "mixed_float16" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float16 products on a CPU")
    model = build(dtype=dtype)
    compile_packed(model, 1e-2, accumulate=2)
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (dtype == "mixed_float16")
    found = losses(model, *batch(64), steps=16)
    assert np.isfinite(found).all() and found[-1] < 0.7 * found[0], found


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_tones(tmp_path_factory.mktemp("sounds"))


def test_a_run_trained_with_every_option_is_float32(sounds, tmp_path):
    settings = TrainSettings(
        epochs=2, batch_tokens=256, row_length=64, dtype="mixed_bfloat16", remat=True, accumulate=3,
        schedule="step", warmup_steps=2, loss="binary", class_weights="balanced", keep="last",
        lora_rank=2, average_epochs=2, layer_decay=0.9, clip_norm=1.0,
    )  # fmt: skip
    with pytest.warns(DataWarning, match=r"6 of 6 clips .*\(6 not from 8\)"):  # and validation
        run, history = train_run(
            sounds, tmp_path / "run", patch_sizes=(8, 16, 32), settings=settings,
            model_options=NANO, fbank=FbankSettings(noise_floor_dbfs=-50.0),
            patch_options={"patch_weights": (1, 1, 2), "clips_per_draw": 2, "pool_frames": (1, 2)},
        )  # fmt: skip
    assert (run.patches.patch_weights, run.patches.clips_per_draw) == ((1, 1, 2), 2)
    assert load_run(tmp_path / "run").patches == run.patches and run.patches.pool_frames == (1, 2)
    assert history.params["steps"] % 3 == 0
    assert load_run(tmp_path / "run").fbank == run.fbank and run.fbank.noise_floor_dbfs == -50
    assert -8 < run.fbank.mean < 0  # measured with the floor
    loaded = load_run(tmp_path / "run").model
    for model in (run.model, loaded):
        assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
        assert not any(weight.name.startswith("lora") for weight in model.weights)
    for ours, theirs in zip(run.model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("error:Your input ran out of data")
def test_the_validation_loss_is_that_of_its_clips(sounds, tmp_path):
    """Rows of 512: TensorFlow attends clip by clip, without XLA."""
    settings = TrainSettings(1, batch_tokens=1024, row_length=512)
    how = {"patch_sizes": (8, 16), "settings": settings, "model_options": NANO}
    run, history = train_run(sounds, tmp_path / "run", **how)
    batches = evaluation_batches(
        read_data(sounds, run.fbank, split="validation"), run.fbank, patches=run.patches,
        packing=run.packing, seed=settings.seed,
    )  # fmt: skip
    losses = [
        run.model.test_on_batch(inputs, labels, sample_weight=weights)[0]
        for inputs, labels, weights, _ in batches.as_numpy_iterator()
    ]
    assert history.history["val_loss"] == pytest.approx([np.mean(losses)], rel=1e-5)


def test_a_diverged_training_stops_and_keeps_what_is_finite(sounds, tmp_path):
    settings = TrainSettings(9, 1e30, batch_tokens=256)
    message = r"the loss is (nan|inf) in .* epoch \d, at a learning rate of .*\(learning_rate"
    with pytest.raises(ValueError, match=message + r".*out\.partial holds the"):
        train_run(sounds, tmp_path / "out", patch_sizes=[16], settings=settings, model_options=NANO)
    assert not (tmp_path / "out").exists()
    load_run(tmp_path / "out.partial")  # refuses NaN


def test_nan_outputs_are_an_error():
    outputs = np.zeros((3, 2))
    check_finite(outputs)
    outputs[1, 0] = np.nan
    with pytest.raises(ValueError, match="gives NaN or infinity for 1 of 3 clips: its training"):
        check_finite(outputs)


def test_the_position_table_follows_base_patch_and_stride(sounds, tmp_path):
    settings = TrainSettings(1, batch_tokens=256)
    options = {**NANO, "base_patch": (8, 16), "stride": (8, 10)}
    how = {"patch_sizes": [16], "settings": settings}
    run, _ = train_run(sounds, tmp_path / "run", model_options=options, **how)
    assert run.model.backbone.grid[0] == 16 and run.model.mel_bins == 128
    waves = np.random.default_rng(0).normal(0, 0.1, (2, 8000)).astype("float32")
    packed = load_classifier(run, 16).predict(list(waves))
    np.testing.assert_allclose(fixed_scores(run, 16, waves), packed, rtol=0, atol=1e-5)
    for wrong, message in (
        ({"base_patch": 200}, r"base_patch=\(200, 200\) is larger than the 128 mel bins"),
        ({"mel_bins": 64}, "fbank.mel_bins is 128, but the model has 64"),
        ({"dropout": float("nan")}, r"dropout=nan must be a number from 0 to 0\.9"),
        ({"dtype": "bfloat16"}, r"dtype='bfloat16' is unknown\. Choose one of 'float32', 'mixed"),
    ):
        with pytest.raises(ValueError, match=message):
            train_run(sounds, tmp_path / "new", model_options={**NANO, **wrong}, **how)
    assert not (tmp_path / "new.partial").exists()


def test_a_class_without_training_clips_stops_a_training(sounds, tmp_path):
    data = read_data(sounds, FbankSettings())
    clips = [
        dataclasses.replace(one, split="test") if one.labels == (0,) else one
        for one in data.source.clips
    ]
    source = dataclasses.replace(data.source, clips=tuple(clips))
    with pytest.raises(ValueError, match="no training clip of 'high'"):
        train_run(dataclasses.replace(data, source=source), tmp_path / "run")


def test_a_run_that_starts_from_another_keeps_its_options(sounds, tmp_path):
    keras.utils.set_random_seed(1)
    model = PackedAST(2, dim=16, depth=1, num_heads=2, remainder="crop", position="grid")
    start = Run(
        model, FbankSettings(), patches=model.patch_settings(), packing=PackSettings(),
        classes=("high", "low"), made_by={"command": "convert"},
    )  # fmt: skip
    how = {"settings": TrainSettings(1, 1e-9), "patch_sizes": [16, 32], "init": start}
    run, _ = train_run(sounds, tmp_path / "run", model_options={"resize": "bilinear"}, **how)
    assert (run.model.remainder, run.model.position) == ("crop", "grid")
    assert (run.patches.remainder, run.patches.resize) == ("crop", "bilinear")
    assert run.made_by["init"] == {"name": None, "command": "convert"}
    for ours, theirs in zip(run.model.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    with pytest.raises(ValueError, match=r"model_options: depth, size cannot change"):
        train_run(sounds, tmp_path / "new", model_options={"size": "base", "depth": 2}, **how)
    with pytest.raises(ValueError, match="fbank cannot change in window_ms"):
        train_run(sounds, tmp_path / "new", fbank=FbankSettings(window_ms=30.0), **how)
    assert not (tmp_path / "new.partial").exists()
    cut = dataclasses.replace(start.fbank, clip_ms=300.0)
    run, _ = train_run(sounds, tmp_path / "cut", fbank=cut, **how)
    assert run.fbank.clip_ms == 300.0
    assert run.clip_seconds == pytest.approx(0.315)  # what a buffer for phones must hold
    assert run.fbank.mean != start.fbank.mean  # of the new clips


def test_few_validation_clips_are_warned_of(sounds, tmp_path):
    few = read_data(sounds, FbankSettings())
    count = sum(few.source.split_names == "validation")
    how = {
        "settings": TrainSettings(1, batch_tokens=256),
        "patch_sizes": [32],
        "model_options": NANO,
    }
    with pytest.warns(DataWarning, match=f"chosen on {count} validation clips.*at least 10"):
        train_run(few, tmp_path / "run", **how)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is unknown.*'mixed_bfloat16'"),
        ({"accumulate": 0}, "accumulate=0 must be a positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a positive"),
        ({"learning_rate": -1e-3}, r"learning_rate=-0\.001 must be a positive"),
        ({"epochs": True}, "epochs=True must be a positive"),
        ({"warmup": 1.5}, r"warmup=1\.5 must be a number from 0 to 1"),
        ({"weight_decay": -1}, "weight_decay=-1 must be a number from 0 to 1"),
        ({"seed": -1}, r"seed=-1 must be a whole number from 0 to 4,294,967,295"),
        ({"overlong": "split"}, "overlong='split' is unknown"),
        ({"remat": "no"}, "remat='no' must be True or False"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TrainSettings(), **options)


def test_the_next_process_finds_what_was_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("JAX_COMPILATION_CACHE_DIR", "TF_XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a tiny model's
    code = """
        import sys
        sys.argv = ["flexast", "--help"]
        from keras_flexast import cli
        try:
            cli.main()
        except SystemExit:
            pass
        import keras, numpy as np
        from keras_flexast.models import PackedAST
        from keras_flexast.training import compile_packed
        keras.utils.set_random_seed(0)
        model = PackedAST(3, dim=16, depth=1, num_heads=2, segments=2)
        compile_packed(model, 1e-2, row_length=32)
        inputs = {
            "tokens": np.ones((2, 32, 256), "float32"),
            "positions": np.ones((2, 32, 4), "float32"),
            "segment_ids": np.ones((2, 32), "int32"),
        }
        model.train_on_batch(inputs, np.zeros((2, 2), "int32"), sample_weight=np.ones((2, 2)))
    """
    kept = []
    for _ in range(2):
        run_python(code, backend=keras.backend.backend())
        files = [path for path in pathlib.Path(tmp_path).rglob("*") if path.is_file()]
        kept.append({path: os.stat(path).st_mtime_ns for path in files if "atime" not in path.name})
    assert kept[0] and kept[0] == kept[1]  # the second process compiled nothing new
