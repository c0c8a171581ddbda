"""Models: one model with two faces, training and round trips."""

import itertools

import keras
import numpy as np
import pytest
from helpers import ONCE, pack_rows, randomize, run_python

from keras_flexast import FlexiAST, PackedAST, fixed_model
from keras_flexast.inference.scoring import PackedPredictor
from keras_flexast.losses import PackedLoss
from keras_flexast.models import embedding_model
from keras_flexast.training import compile_packed
from tf_data_pipelines.patches import patch_tokens
from tf_data_pipelines.settings import PatchSettings

GRID = (3, 5)  # of 48 mel bins by 80 frames
POOLINGS = {"attention": 0, "cls": 1, "cls_distillation": 2, "mean": 2}
POLICIES = [(r, p) for r in ("crop", "pad", "cover") for p in ("grid", "physical")]
PATCH_SIZES = [((16, 16), (13, 19)), ((24, 11), (16, 16)), ((13, 19), (24, 11))]
OTHER_BACKEND = {"tensorflow": "jax", "jax": "tensorflow"}[keras.backend.backend()]


def build(pooling="attention", **options):
    table = "factorized" if pooling == "attention" else "joint"
    options = {"mlp_ratio": 3, "table": table, "grid": GRID, "segments": 3, **options}
    options.setdefault("prefix_tokens", POOLINGS[pooling])
    return PackedAST(5, dim=22, depth=1, num_heads=2, pooling=pooling, **options)


def spectrogram(frames, seed=0, mel_bins=48):
    return np.random.default_rng(seed).normal(size=(frames, mel_bins)).astype("float32")


def cut(features, patch_size, **options):
    """A clip's (tokens, positions) as the pipeline makes them."""
    settings = PatchSettings((patch_size,), **{"grid": GRID, **options})
    return tuple(x.numpy() for x in patch_tokens(features, settings))


def fixed_logits(model, features, patch_size, **options):
    fixed = fixed_model(model, patch_size, features.shape[0], **options)
    return fixed.predict_on_batch(features[None])[0]


def clips_and_targets():
    """Two rows of mixed patch sizes and the labels and weights of their five clips."""
    sizes = [(16, 16), (8, 8), (24, 30), (12, 20), (16, 40)]
    clips = [cut(spectrogram(31 + 11 * i, i), size) for i, size in enumerate(sizes)]
    batch = pack_rows([clips[:3], clips[3:]], 64, 3)
    labels = np.array([[0, 3, 2], [4, 1, 0]], "int32")
    weights = np.array([[1, 1, 1], [1, 1, 0]], "float32")
    return batch, labels, weights, clips


# === Two faces ===


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_packed_face_equals_the_fixed_face(pooling):
    model = randomize(build(pooling))
    prefix = {"prefix_tokens": POOLINGS[pooling]}
    features = spectrogram(53)
    cases = [
        {"patch_size": size, "remainder": remainder, "position": position}
        for (remainder, position), sizes in zip(
            POLICIES, itertools.cycle(PATCH_SIZES), strict=False
        )
        for size in sizes
    ]
    rows = [[cut(features, **case, **prefix)] for case in cases]
    packed = model.predict_on_batch(pack_rows(rows, 31, 3))[:, 0]
    for case, logits in zip(cases, packed, strict=True):
        fixed = fixed_logits(model, features, **case)
        np.testing.assert_allclose(fixed, logits, rtol=0, atol=2e-5, err_msg=str(case))


@pytest.mark.parametrize("position", ["grid", "physical"])
@pytest.mark.parametrize("remainder", ["crop", "pad", "cover"])
def test_any_base_patch_and_stride_in_both_faces(remainder, position):
    geometry = {"base_patch": (12, 20), "stride": (5, 11), "mel_bins": 48, "grid": (8, 7)}
    model = randomize(build("cls", remainder=remainder, position=position, **geometry))
    assert model.input["tokens"].shape == (None, None, 240)
    features, sizes = spectrogram(97), [(12, 20), (8, 8), (16, 24), (12, 40)]
    rows = []
    for size in sizes:
        settings = model.patch_settings([size])
        rows.append([tuple(part.numpy() for part in patch_tokens(features, settings))])
    length = max(len(row[0][0]) for row in rows)
    packed = model.predict_on_batch(pack_rows(rows, length))[:, 0]
    for size, logits in zip(sizes, packed, strict=True):
        fixed = fixed_logits(model, features, size)
        np.testing.assert_allclose(fixed, logits, rtol=0, atol=3e-5, err_msg=str(size))


@pytest.mark.parametrize("resize", ["pi", "bilinear"])
def test_the_fixed_face_follows_the_training_and_its_frame_shift(resize):
    policies = {"resize": resize, "remainder": "pad", "position": "physical"}
    model = randomize(build(**policies))
    features = spectrogram(37)
    settings = PatchSettings((19,), grid=GRID, **policies)
    clip = tuple(x.numpy() for x in patch_tokens(features, settings, frame_shift_scale=2.0))
    packed = model.predict_on_batch(pack_rows([[clip]], 31, 3))[0, 0]
    fixed = fixed_logits(model, features, 19, frame_shift_scale=2.0)
    np.testing.assert_allclose(fixed, packed, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_clip_does_not_care_about_its_neighbors(pooling):
    model = randomize(build(pooling))
    prefix = POOLINGS[pooling]
    sizes = [(16, 16), (8, 12), (24, 30), (12, 20)]  # mixed in one row
    clips = [
        cut(spectrogram(41 + 7 * i, i), size, prefix_tokens=prefix) for i, size in enumerate(sizes)
    ]
    layouts = [[[0], [1], [2], [3]], [[0, 1], [2], [3], []], [[3, 0], [], [2, 1], []],
               [[1, 3, 2], [0], [], []]]  # fmt: skip
    seen = []
    for layout in layouts:
        batch = pack_rows([[clips[i] for i in row] for row in layout], 71, 3)
        output = model.predict_on_batch(batch)
        assert np.isfinite(output).all()
        seen.append({i: output[r, s] for r, row in enumerate(layout) for s, i in enumerate(row)})
    for logits in seen:
        for clip in range(4):
            np.testing.assert_allclose(logits[clip], seen[0][clip], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["attention", "cls", "mean"])
def test_what_is_not_finite_in_one_clip_reaches_no_other(pooling):
    model, prefix = randomize(build(pooling)), POOLINGS[pooling]
    clips = [cut(spectrogram(41 + 7 * i, i), 16, prefix_tokens=prefix) for i in range(3)]
    predict = PackedPredictor(model)
    for length in (64, 512):  # under the dense mask, and clip by clip
        batch = pack_rows([clips, clips[:2]], length, 3)
        before = predict(batch)
        for bad in (np.nan, np.inf, 1e30):
            batch["tokens"][0, prefix : len(clips[0][0])] = bad  # the first clip of the first row
            after = predict(batch)
            np.testing.assert_array_equal(after[0, 1:], before[0, 1:])
            np.testing.assert_array_equal(after[1], before[1])
            assert bad == 1e30 or not np.isfinite(after[0, 0]).any()


@pytest.mark.parametrize("pooling", ["attention", "cls"])
def test_mixed_precision_gives_float32_logits(pooling):
    batch = pack_rows([[cut(spectrogram(53), 16, prefix_tokens=POOLINGS[pooling])]], 31, 3)
    half, full = (build(pooling, dtype=dtype) for dtype in ("mixed_bfloat16", "float32"))
    half.set_weights(full.get_weights())
    assert {w.dtype for w in half.weights} == {"float32"}
    logits = half.predict_on_batch(batch)
    fixed = fixed_logits(half, spectrogram(53), 16)
    assert logits.dtype == fixed.dtype == np.float32
    np.testing.assert_allclose(logits, full.predict_on_batch(batch), atol=0.1)
    np.testing.assert_allclose(fixed, logits[0, 0], atol=0.1)


# === Training ===


def test_the_loss_divides_by_clips():
    _, labels, weights, _ = clips_and_targets()
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype("float32")
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(log_softmax, labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        PackedLoss()(labels, logits, weights), each[weights > 0].mean(), rtol=1e-6
    )
    targets = (np.random.default_rng(1).random((2, 3, 5)) < 0.4).astype("float32")
    each = np.mean(np.logaddexp(0, logits) - targets * logits, -1)
    np.testing.assert_allclose(
        PackedLoss(multi_label=True)(targets, logits, weights), each[weights > 0].mean(), rtol=1e-6
    )
    for more in ([0, 7], [3, 0], [2, 5]):  # empty rows and slots
        padding = [[0, m] for m in more]
        np.testing.assert_allclose(
            PackedLoss()(
                np.pad(labels, padding),
                np.pad(logits, [*padding, [0, 0]], constant_values=9),
                np.pad(weights, padding),
            ),
            PackedLoss()(labels, logits, weights),
            rtol=1e-6,
        )


def test_the_packed_gradient_is_the_mean_of_the_clips():
    batch, labels, weights, clips = clips_and_targets()
    model = randomize(build(), scale=0.1)
    model.compile(keras.optimizers.SGD(1.0), PackedLoss())
    start = model.get_weights()

    def gradients(batch, labels, weights):
        model.set_weights(start)
        model.train_on_batch(batch, labels, sample_weight=weights)
        return [before - after for before, after in zip(start, model.get_weights(), strict=True)]

    packed = gradients(batch, labels, weights)
    alone = []
    for clip, label in zip(clips, labels[weights > 0], strict=True):
        single = np.array([[label, 0, 0], [0, 0, 0]], "int32")
        weight = np.array([[1, 0, 0], [0, 0, 0]], "float32")
        alone.append(gradients(pack_rows([[clip], []], 64, 3), single, weight))
    for together, each in zip(packed, zip(*alone, strict=True), strict=True):
        np.testing.assert_allclose(together, np.mean(each, 0), rtol=0, atol=1e-5)


def test_one_compilation_trains_every_patch_size():
    keras.utils.set_random_seed(0)
    batch, labels, weights, _ = clips_and_targets()
    model, traces = build(), []
    compile_packed(model, 3e-3)
    compute_loss = model.compute_loss

    def counted(*args, **kwargs):
        traces.append(1)
        return compute_loss(*args, **kwargs)

    model.compute_loss = counted
    first = model.train_on_batch(batch, labels, sample_weight=weights)[0]
    count, firsts = len(traces), np.float32([[1, 0, 0], [1, 0, 0]])
    for size in [(16, 16), (8, 8), (24, 30), (12, 20), (48, 48)]:
        clips = [cut(spectrogram(frames), size) for frames in (41, 53)]
        other = pack_rows([clips[:1], clips[1:]], 64, 3)
        model.train_on_batch(other, labels, sample_weight=firsts)
    for _ in range(40):
        last = model.train_on_batch(batch, labels, sample_weight=weights, return_dict=True)
        model.reset_metrics()
    assert len(traces) == count
    assert last["loss"] < first / 3
    assert last["accuracy"] == 1


@ONCE
def test_jax_trains_without_tensorflow(tmp_path):
    batch, labels, weights, _ = clips_and_targets()
    np.savez(tmp_path / "batch.npz", labels=labels, weights=weights, **batch)
    code = """
        import sys
        import keras_flexast
        assert not [name for name in sys.modules if name.partition(".")[0] == "tensorflow"]
        sys.modules["tensorflow"] = None
        import numpy as np
        from keras_flexast.training import compile_packed
        data = dict(np.load(sys.argv[1]))
        labels, weights = data.pop("labels"), data.pop("weights")
        model = keras_flexast.PackedAST(5, dim=22, depth=1, num_heads=2, grid=(3, 5), segments=3)
        compile_packed(model, 1e-3)
        history = model.fit(data, labels, sample_weight=weights, batch_size=2, verbose=0)
        print(history.history["loss"][0])
    """
    assert np.isfinite(float(run_python(code, tmp_path / "batch.npz", backend="jax")))


# === Round trips ===


def test_saved_on_one_backend_and_loaded_on_the_other(tmp_path):
    models = {}
    for pooling, prefix in POOLINGS.items():
        model = randomize(build(pooling, attention_scale=0.5, norm_epsilon=1e-4))
        batch = pack_rows([[cut(spectrogram(53), 13, prefix_tokens=prefix)]], 31, 3)
        logits = model.predict_on_batch(batch)
        models[pooling] = model, logits
        model.save(tmp_path / f"{pooling}.keras")
        np.savez(tmp_path / f"{pooling}.batch.npz", **batch)

        again = keras.saving.load_model(tmp_path / f"{pooling}.keras")
        assert again.get_config() == model.get_config()
        for ours, theirs in zip(again.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(again.predict_on_batch(batch), logits)

    code = """
        import pathlib, sys
        import keras, numpy as np
        import keras_flexast
        assert keras.backend.backend() == sys.argv[2]
        for path in pathlib.Path(sys.argv[1]).glob("*.keras"):
            model = keras.saving.load_model(path)
            logits = model.predict_on_batch(dict(np.load(path.with_suffix(".batch.npz"))))
            np.savez(path.with_suffix(".other.npz"), logits, *model.get_weights())
    """
    run_python(code, tmp_path, OTHER_BACKEND, backend=OTHER_BACKEND)
    for pooling, (model, logits) in models.items():
        with np.load(tmp_path / f"{pooling}.other.npz") as other:
            other_logits, *weights = other.values()
        for ours, theirs in zip(model.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(other_logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [{"tensorflow": "int4", "jax": "int8"}[keras.backend.backend()]])
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantized_models_come_back(tmp_path, mode):
    model, (batch, *_) = randomize(build(), scale=0.1), clips_and_targets()
    before = model.predict_on_batch(batch)
    model.quantize(mode)
    logits = model.predict_on_batch(batch)
    assert 0 < np.abs(logits - before).max() < (0.1 if mode == "int8" else 1.5)
    for _ in range(2):
        model.save(tmp_path / "model.keras")
        model = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model.predict_on_batch(batch), logits)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sze'"):
        PackedAST(3, dim=16, depth=1, num_heads=2, sze="nano")


def test_parts_of_a_model_are_models(tmp_path):
    model, (batch, *_) = randomize(build("cls")), clips_and_targets()
    backbone, embedding = model.backbone, embedding_model(model)
    tokens, vectors = backbone.predict_on_batch(batch), embedding.predict_on_batch(batch)
    assert (tokens.shape, vectors.shape) == ((2, 64, 22), (2, 3, 22))
    logits = model.head(model.head_norm(vectors))
    np.testing.assert_allclose(logits, model.predict_on_batch(batch), rtol=0, atol=1e-5)
    for part, expected in ((backbone, tokens), (embedding, vectors)):
        part.save(tmp_path / "part.keras")
        again = keras.saving.load_model(tmp_path / "part.keras")
        np.testing.assert_array_equal(again.predict_on_batch(batch), expected)
    assert len(backbone.blocks) == model.backbone.depth and backbone.prefix.count == 1


def test_a_clone_trains_and_says_what_it_is():
    clone, (batch, labels, weights, _) = keras.models.clone_model(build()), clips_and_targets()
    compile_packed(clone, 1e-3)
    assert np.isfinite(clone.train_on_batch(batch, labels, sample_weight=weights)[0])
    for use in (embedding_model, lambda model: fixed_model(model, 16, 53)):
        with pytest.raises(ValueError, match=r"model is a Functional; expected a PackedAST"):
            use(clone)


# === Arguments ===


def test_sizes_and_names():
    model = FlexiAST(7, "nano", depth=2)
    assert (
        model.backbone.dim,
        model.backbone.depth,
        model.backbone.num_heads,
        model.backbone.prefix_tokens,
    ) == (96, 2, 4, 1)
    assert (model.mel_bins, model.backbone.table, model.head_norm_epsilon) == (128, "joint", 1e-5)
    shallow = PackedAST(7, size="tiny", depth=1)
    assert (shallow.backbone.dim, shallow.backbone.depth, shallow.backbone.num_heads) == (192, 1, 3)
    assert model.output_shape == (None, 16, 7)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": "huge"}, "size='huge' is unknown.*'nano', 'tiny', 'small', 'base'"),
        ({"dim": None}, "dim=None, depth=1, num_heads=2: give all three, or size="),
        ({"pooling": "max"}, "pooling='max' is unknown.*'cls_distillation', 'mean'"),
        ({"pooling": "cls", "prefix_tokens": 2}, "prefix_tokens=2 does not fit pooling='cls'"),
        ({"stride": (8, 17)}, r"stride=\(8, 17\) is larger than base_patch=\(16, 16\)"),
        ({"base_patch": 1.5}, "base_patch=1.5 must be one whole number from 1"),
        ({"remainder": "drop"}, "remainder='drop' is unknown.*'crop', 'pad', 'cover'"),
        ({"position": "time"}, "position='time' is unknown.*'grid', 'physical'"),
        ({"table": "sine"}, "table='sine' is unknown"),
        ({"resize": "cubic"}, "resize='cubic' is unknown"),
        ({"num_heads": 3}, "dim=22 is not a multiple of num_heads=3"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        PackedAST(**{"num_classes": 5, "dim": 22, "depth": 1, "num_heads": 2, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": 49}, "49 along frequency, larger than the spectrogram's 48"),
        ({"patch_size": (16, 54)}, "54 along time, larger than the spectrogram's 53"),
        ({"patch_size": (16, 16, 16)}, "patch_size="),
        ({"remainder": "drop"}, "remainder='drop' is unknown"),
        ({"position": "time"}, "position='time' is unknown"),
    ],
)
def test_fixed_model_errors(options, message):
    with pytest.raises(ValueError, match=message):
        fixed_model(build(), **{"patch_size": 16, "frames": 53, **options})


def test_keras_exports_a_packed_model_of_any_length(tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = randomize(PackedAST(3, dim=8, depth=1, num_heads=2, segments=2))
    model.export(tmp_path / "packed", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "packed"))
    rng = np.random.default_rng(0)
    for rows, length in ((2, 7), (1, 13)):
        batch = {
            "tokens": rng.normal(size=(rows, length, 256)).astype("float32"),
            "positions": rng.uniform(0.5, 4, (rows, length, 4)).astype("float32"),
            "segment_ids": np.sort(rng.integers(1, 3, (rows, length)), 1).astype("int32"),
        }
        expected = keras.ops.convert_to_numpy(model(batch))
        np.testing.assert_allclose(served.serve(batch), expected, rtol=0, atol=1e-5)
