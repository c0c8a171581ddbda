"""KerasHub's doors: build, fit, dtype, save and preset, on raw waveforms."""

import dataclasses
import json
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import ONCE, ROOT, randomize, run_python

from keras_flexast import load_classifier, load_run
from keras_flexast.models import ElasticAST, FlexiAST
from keras_flexast.optimizers import PackedMuon, compile_packed
from keras_flexast.runs import Run, save_run
from tf_data_pipelines.fbank import features, log_mel
from tf_data_pipelines.settings import AugmentSettings, FbankSettings, PackSettings

keras_hub = pytest.importorskip("keras_hub")
from keras_flexast.hub import (  # noqa: E402
    PRESETS,
    ASTAudioConverter,
    ASTBackbone,
    AudioClassifier,
    AudioClassifierPreprocessor,
    audio_classifier,
)
from keras_flexast.hub.labels import labelled  # noqa: E402

PUBLISHED = pathlib.Path(__file__).parent / "data" / "hf_ast_plain"
RATE, CLASSES = 8000, ("low", "middle", "high")


def make_run(multi_label=False, make=ElasticAST, **options):
    keras.utils.set_random_seed(0)
    fbank = FbankSettings(sample_rate=RATE, mel_bins=64, mean=-6.0, std=3.0)
    model = make(3, "nano", depth=1, grid=(4, 64), segments=4, **options)
    return Run(
        randomize(model, scale=0.1), fbank, patches=model.patch_settings((8, 16, 24)),
        packing=PackSettings(2, 128, 4), classes=CLASSES, multi_label=multi_label,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_xla(monkeypatch):
    """On TensorFlow, XLA takes longer to compile a step than all steps of these tests."""
    monkeypatch.setattr(audio_classifier, "jit_compile", lambda *_: "auto")


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "run"
    folder.mkdir()
    save_run(run, folder)
    return folder


@pytest.fixture
def classifier(run):
    return AudioClassifier.from_run(run)


def clips(count=6, seed=0):
    """Tones of three pitches, of different lengths, and their classes."""
    rng, waveforms, labels = np.random.default_rng(seed), [], []
    for number in range(count):
        times = np.arange(3000 + 700 * number) / RATE
        label = number % 3
        tone = 0.3 * np.sin(2 * np.pi * (300, 900, 2500)[label] * times)
        waveforms.append((tone + rng.normal(0, 0.02, times.size)).astype("float32"))
        labels.append(label)
    return waveforms, labels


def dataset(waveforms, *columns):
    """A tf.data.Dataset of single clips, with labels and weights."""
    spec = (tf.TensorSpec([None]), tf.TensorSpec([], tf.int32), tf.TensorSpec([]))
    spec = spec[: 1 + len(columns)] if columns else spec[0]
    elements = list(zip(waveforms, *columns, strict=True)) if columns else waveforms
    return tf.data.Dataset.from_generator(lambda: iter(elements), output_signature=spec)


# === The backbone, as KerasHub tests its own ===


def test_the_backbone_is_one_of_kerashubs(tmp_path):
    options = {"dim": 16, "depth": 2, "num_heads": 2, "grid": (4, 8), "prefix_tokens": 1}
    backbone = ASTBackbone(**options)
    again = ASTBackbone.from_config(backbone.get_config())
    assert again.get_config() == backbone.get_config()
    assert backbone.count_params() == again.count_params()
    inputs = {
        "tokens": np.random.default_rng(0).normal(size=(2, 5, 256)).astype("float32"),
        "positions": np.ones((2, 5, 4), "float32"),
        "segment_ids": np.ones((2, 5), "int32"),
    }
    expected = keras.ops.convert_to_numpy(backbone(inputs))
    assert expected.shape == (2, 5, 16)
    backbone.save(tmp_path / "model.keras")
    backbone.save_to_preset(str(tmp_path / "preset"))
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        keras_hub.models.Backbone.from_preset(str(tmp_path / "preset")),
        ASTBackbone.from_preset(str(tmp_path / "preset")),
    ):
        assert isinstance(loaded, ASTBackbone)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(loaded(inputs)), expected)
    other = ASTBackbone.from_preset(str(tmp_path / "preset"), load_weights=False)
    assert np.abs(keras.ops.convert_to_numpy(other(inputs)) - expected).max() > 1e-3
    half = ASTBackbone(**options, dtype="bfloat16")
    assert keras.backend.standardize_dtype(half(inputs).dtype) == "bfloat16"
    mixed = ASTBackbone.from_preset(str(tmp_path / "preset"), dtype="mixed_bfloat16")
    assert {layer.dtype_policy.name for layer in mixed.blocks} == {"mixed_bfloat16"}


def test_lora_of_a_backbone_trains_few_weights(run, classifier):
    before = classifier.predict(clips()[0])
    classifier.backbone.enable_lora(2)
    np.testing.assert_allclose(classifier.predict(clips()[0]), before, atol=1e-6)
    trained = classifier.backbone.trainable_variables
    assert {one.name for one in trained} == {"lora_kernel_a", "lora_kernel_b", "bias"}
    assert {one.path.split("/")[-2] for one in trained} == {"query", "value"}
    trained = {one.path for one in trained}
    weights = classifier.backbone.get_weights()
    waveforms, labels = clips()
    classifier.compile(optimizer=keras.optimizers.Adam(0.01))
    classifier.fit(waveforms, labels, epochs=1, verbose=0)
    after = classifier.backbone.get_weights()
    for one, old, new in zip(classifier.backbone.variables, weights, after, strict=True):
        moves = one.path in trained and one.name != "lora_kernel_a"  # b is 0, and so its gradient
        assert np.array_equal(old, new) != moves, one.path
    after = classifier.predict(clips()[0])  # with the adapters
    assert np.abs(after - before).max() > 1e-3
    merged = load_classifier(classifier.to_run()).predict(clips()[0])
    np.testing.assert_allclose(merged, after, atol=1e-5)


@pytest.mark.parametrize("mode", [{"tensorflow": "int8", "jax": "int4"}[keras.backend.backend()]])
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_a_quantized_classifier_comes_back(tmp_path, mode, classifier):
    waveforms, _ = clips()
    before = classifier.predict(waveforms)
    classifier.quantize(mode)
    scores = classifier.predict(waveforms)
    assert 0 < np.abs(scores - before).max() < 0.05
    classifier.save_to_preset(tmp_path / "preset")
    classifier.save(tmp_path / "model.keras")
    for again in (
        AudioClassifier.from_preset(tmp_path / "preset"),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        assert again.output_dense.quantization_mode == mode
        np.testing.assert_array_equal(again.predict(waveforms), scores)
    with pytest.raises(ValueError, match="to_run needs the float weights, and this classifier"):
        classifier.to_run()


def test_an_exported_classifier_gives_the_same(tmp_path, classifier):
    waveforms, _ = clips()
    inputs = keras.tree.map_structure(
        keras.ops.convert_to_numpy, classifier.preprocessor(waveforms)
    )
    classifier.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    for rows in (slice(None), slice(1)):
        some = {name: value[rows] for name, value in inputs.items()}
        expected = keras.ops.convert_to_numpy(classifier(some))
        np.testing.assert_allclose(served.serve(some), expected, atol=1e-5)


def test_a_saved_training_goes_on(tmp_path, classifier):
    waveforms, labels = clips()
    classifier.compile(optimizer=keras.optimizers.AdamW(0.01), metrics=[])
    classifier.fit(waveforms, labels, epochs=2, verbose=0)
    classifier.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again.optimizer, keras.optimizers.AdamW)
    weights = [one.fit(waveforms, labels, verbose=0) and one.get_weights()
               for one in (classifier, again)]  # fmt: skip
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-6)


# === The converter and the preprocessor ===


def test_the_audio_converter_hears_as_the_pipelines(run):
    converter = ASTAudioConverter(run.fbank)
    assert converter.audio_shape() == (None, 64)
    again = ASTAudioConverter.from_config(converter.get_config())
    batch = np.stack([one[:3000] for one in clips()[0]])
    for waveforms in (batch, batch[0]):
        expected = features(waveforms, run.fbank).numpy()
        found = keras.ops.convert_to_numpy(again(waveforms))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    waveforms = clips()[0]
    own = ASTAudioConverter(dataclasses.replace(run.fbank, mean=0.0, std=1.0))
    own.adapt(waveforms)
    values = np.concatenate([log_mel(one, run.fbank).numpy().ravel() for one in waveforms])
    np.testing.assert_allclose((own.fbank.mean, own.fbank.std), (values.mean(), values.std()), 1e-4)
    mapped = tf.data.Dataset.from_tensors(batch).map(converter)
    np.testing.assert_allclose(next(iter(mapped)).numpy(), features(batch, run.fbank), atol=1e-5)


def test_the_preprocessor_packs_a_batch_in_memory_and_in_a_dataset(classifier):
    waveforms, labels = clips()
    inputs, slots, weights = classifier.preprocessor(waveforms, labels, [1, 1, 1, 1, 1, 2])
    scores = keras.ops.convert_to_numpy(classifier(inputs))
    weights, slots = keras.ops.convert_to_numpy(weights), keras.ops.convert_to_numpy(slots)
    assert sorted(weights[weights > 0]) == [1, 1, 1, 1, 1, 2]
    assert sorted(slots[weights > 0]) == sorted(labels)
    expected = classifier.predict(waveforms)
    np.testing.assert_allclose(
        np.sort(scores[weights > 0], 0), np.sort(expected, 0), atol=1e-5
    )  # fmt: skip
    assert set(classifier.preprocessor(waveforms)) == set(inputs)
    batches = dataset(waveforms, labels).ragged_batch(6).map(classifier.preprocessor)
    inputs, slots, real = next(iter(batches.as_numpy_iterator()))
    scores = keras.ops.convert_to_numpy(classifier(inputs))
    np.testing.assert_allclose(np.sort(scores[real > 0], 0), np.sort(expected, 0), atol=1e-5)
    again = AudioClassifierPreprocessor.from_config(classifier.preprocessor.get_config())
    assert again.get_config() == classifier.preprocessor.get_config()


def test_another_patch_size_is_set_on_the_preprocessor(run, classifier):
    waveforms, _ = clips()
    for size in (24, (8, 16), None):
        classifier.preprocessor.patch_size = size
        expected = load_classifier(run, size).predict(waveforms)
        np.testing.assert_allclose(classifier.predict(waveforms), expected, atol=1e-6)


# === The task ===


def test_the_task_learns_tones():
    keras.utils.set_random_seed(1)
    classifier = AudioClassifier.from_run(make_run(), load_weights=False, num_classes=3)
    waveforms, labels = clips(18)
    classifier.compile(optimizer=PackedMuon(0.003))
    history = classifier.fit(
        waveforms, labels, epochs=14, batch_size=6, verbose=0, validation_split=1 / 3
    ).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    assert max(history["val_accuracy"]) > 0.8 and len(history["val_loss"]) == 14
    ragged = tf.ragged.constant([one.tolist() for one in waveforms[:4]])
    classifier.fit(ragged, np.array(labels[:4]), verbose=0, validation_split=0.5)


def test_the_loss_is_that_of_scores_and_of_logits(run):
    waveforms, labels = clips()
    for activation in ("softmax", None):
        classifier = AudioClassifier.from_run(run, activation=activation)
        loss, accuracy = classifier.evaluate(waveforms, labels, verbose=0)
        scores = classifier.predict(waveforms)
        if activation is None:
            scores = keras.ops.convert_to_numpy(keras.ops.softmax(scores))
        assert accuracy == pytest.approx(np.mean(scores.argmax(1) == labels))
        expected = -np.log(scores[range(6), labels]).mean()
        assert loss == pytest.approx(expected, rel=1e-4)  # of one batch


def test_several_labels_have_a_sigmoid(tmp_path):
    run = make_run(multi_label=True)
    classifier = AudioClassifier.from_run(run)
    assert classifier.activation == "sigmoid"
    waveforms, labels = clips()
    expected = load_classifier(run).predict(waveforms)
    np.testing.assert_allclose(classifier.predict(waveforms), expected, atol=1e-6)
    soft = np.eye(3, dtype="float32")[labels]
    before = classifier.evaluate(waveforms, soft, verbose=0)
    targets = np.clip(expected, 1e-7, 1 - 1e-7)
    loss = -(soft * np.log(targets) + (1 - soft) * np.log(1 - targets)).mean()
    assert np.ravel(before)[0] == pytest.approx(loss, rel=1e-4)
    with pytest.raises(ValueError, match=r"y has shape \(6,\); where clips may have several"):
        classifier.fit(waveforms, labels)
    logits = AudioClassifier.from_run(run, activation=None)  # are of several labels still
    found = logits.evaluate(waveforms, soft > 0, verbose=0)
    np.testing.assert_allclose(np.ravel(found)[0], np.ravel(before)[0], rtol=1e-4)
    assert logits.to_run().multi_label
    with pytest.raises(ValueError, match="activation='softmax' contradicts multi_label=True"):
        AudioClassifier.from_run(run, activation="softmax")


def test_every_kind_of_input_gives_the_same(classifier):
    waveforms, labels = clips()
    expected = classifier.predict(waveforms)
    assert expected.shape == (6, 3) and expected.dtype == np.float32
    np.testing.assert_allclose(expected.sum(1), 1, rtol=1e-5)
    ragged = tf.ragged.constant([one.tolist() for one in waveforms])
    batched = dataset(waveforms, labels).ragged_batch(4)
    for x in (ragged, dataset(waveforms), dataset(waveforms, labels), batched):
        np.testing.assert_allclose(classifier.predict(x), expected, atol=1e-5)
    equal = np.stack([one[:3000] for one in waveforms])
    scores = classifier.predict(equal)
    padded = tf.data.Dataset.from_tensor_slices((equal, labels)).batch(4)
    np.testing.assert_allclose(classifier.predict(padded), scores, atol=1e-5)
    np.testing.assert_allclose(classifier.predict(list(equal)), scores, atol=1e-5)
    loss = classifier.evaluate(waveforms, labels, verbose=0)
    for x in (dataset(waveforms, labels), batched):
        np.testing.assert_allclose(classifier.evaluate(x, verbose=0), loss, rtol=1e-4)


def test_a_dataset_is_fitted_with_new_draws_in_each_epoch(classifier):
    waveforms, labels = clips()
    data = dataset(waveforms, labels, [1.0, 1, 1, 1, 1, 0.5])
    batches, steps = classifier.preprocessor.training_batches(data)
    first, second = (inputs["segment_ids"] for inputs, *_ in batches.take(2).as_numpy_iterator())
    assert steps == 1 and (first != second).any()
    assert batches.options().autotune.enabled is False  # an iterator's end would wait for it
    history = classifier.fit(data, epochs=3, verbose=0, validation_data=data).history
    assert len(history["val_loss"]) == 3
    with pytest.raises(ValueError, match="without an end; give steps_per_epoch"):
        classifier.fit(data.repeat())
    classifier.fit(data.repeat(), steps_per_epoch=1, verbose=0)
    for given in ({"y": labels}, {"batch_size": 3}, {"sample_weight": [1] * 6}):
        with pytest.raises(ValueError, match=f"so {next(iter(given))} cannot be given: put labels"):
            classifier.fit(data, **given)
    classifier.preprocessor.augment = AugmentSettings(mixup=0.5)
    with pytest.raises(ValueError, match=r"augment\.mixup needs clips in memory"):
        classifier.fit(data)
    classifier.fit(waveforms, [0] * 6, verbose=0)  # integers become shares of all classes


def test_shuffled_and_endless_datasets(classifier):
    waveforms, labels = clips(12)
    shuffled = dataset(waveforms, labels).shuffle(12)
    expected = classifier.evaluate(waveforms, labels, verbose=0)
    for _ in range(3):  # another order may need another number of rows
        found = classifier.evaluate(shuffled, verbose=0)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    endless = dataset(waveforms, labels).repeat()
    for door in (classifier.evaluate, classifier.predict):
        with pytest.raises(ValueError, match=r"x is a Dataset without an end; give steps\."):
            door(endless)
    assert classifier.predict(endless, steps=1).shape[1] == 3
    classifier.evaluate(endless, steps=2, verbose=0)


def test_fit_goes_on_with_other_draws_and_weighs_classes(classifier, monkeypatch):
    waveforms, labels = clips()
    seen, make = [], AudioClassifierPreprocessor.training_batches

    def spy(self, x, y=None, sample_weight=None, **options):
        seen.append((options["start"], sample_weight))
        return make(self, x, y, sample_weight, **options)

    monkeypatch.setattr(AudioClassifierPreprocessor, "training_batches", spy)
    classifier.fit(waveforms, labels, epochs=2, verbose=0)
    factors = {0: 1.0, 1: 0.5}
    classifier.fit(
        waveforms, labels, class_weight=factors, sample_weight=[2.0] * 6, verbose=0,
        validation_data=[waveforms, labels],
    )  # fmt: skip
    assert [start for start, _ in seen] == [0, 2]  # batches
    np.testing.assert_allclose(seen[1][1], [2, 1, 2, 2, 1, 2])
    soft = np.eye(3, dtype="float32")[labels]
    with pytest.raises(ValueError, match="class_weight needs one label for each clip"):
        classifier.fit(waveforms, soft, class_weight=factors)
    first, _ = make(classifier.preprocessor, waveforms, labels)
    later, _ = make(classifier.preprocessor, waveforms, labels, start=1)
    first, later = (next(one.as_numpy_iterator())[0]["tokens"] for one in (first, later))
    assert (first != later).any()


def test_classes_of_a_dataset_have_their_weights():
    waveforms, labels = clips()
    equal = np.stack([one[:3000] for one in waveforms])
    batched = tf.data.Dataset.from_tensor_slices((equal, labels, [2.0] * 6)).batch(4)
    for data, share in ((dataset(waveforms, labels), 1.0), (batched, 2.0)):
        weighted = labelled(data, 3, multi_label=False, factors={0: 1.0, 1: 0.5})
        found = np.concatenate([np.ravel(weight) for *_, weight in weighted.as_numpy_iterator()])
        np.testing.assert_allclose(found, np.array([1, 0.5, 1] * 2) * share)


def test_a_dataset_is_drawn_as_clips_in_memory(run):
    waveforms, labels = clips()
    patches = dataclasses.replace(run.patches, clips_per_draw=100)
    own = AudioClassifierPreprocessor(ASTAudioConverter(run.fbank), patches=patches)
    for data, y in ((waveforms, labels), (dataset(waveforms, labels), None)):
        sizes = set()
        for start in (0, 100, 200, 300):
            batches, _ = own.training_batches(data, y, start=start)
            inputs, *_ = next(batches.as_numpy_iterator())
            (size,) = np.unique(inputs["positions"][0, inputs["segment_ids"][0] > 0, 2])
            sizes.add(float(size))
        assert len(sizes) > 1
    both = AudioClassifierPreprocessor(
        ASTAudioConverter(run.fbank), augment=AugmentSettings(frame_shift_range_ms=(10, 20)),
        patches=dataclasses.replace(run.patches, frame_shifts_ms=(10.0, 20.0)),
    )  # fmt: skip
    for data, y in ((waveforms, labels), (dataset(waveforms, labels), None)):
        with pytest.raises(ValueError, match="frame_shift_range_ms="):
            both.training_batches(data, y)


def test_compile_packed_takes_the_scores_for_scores(run):
    losses = []
    for activation in ("softmax", None):
        classifier = AudioClassifier.from_run(run, activation=activation)
        compile_packed(classifier, 1e-3, optimizer="muon")
        losses.append(classifier.evaluate(*clips(), verbose=0)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_rare_classes_of_clips_in_memory_come_more_often(run):
    waveforms, _ = clips(8)
    for labels in ([0, 0, 0, 0, 0, 0, 0, 1], np.eye(3)[[0, 0, 0, 0, 0, 0, 0, 1]]):
        own = AudioClassifierPreprocessor(
            ASTAudioConverter(run.fbank), patches=run.patches.at([16]), packing=run.packing,
            augment=AugmentSettings(balanced=True),
        )  # fmt: skip
        batches, steps = own.training_batches(waveforms, labels)
        rare = []
        for _, slots, weights in batches.take(20 * steps).as_numpy_iterator():
            drawn = slots if slots.ndim == 2 else slots.argmax(-1)
            rare += (drawn == 1)[weights > 0].tolist()
        assert 0.4 < np.mean(rare) < 0.6


def test_fit_goes_on_with_other_draws_after_accumulated_gradients(classifier, monkeypatch):
    classifier.compile(keras.optimizers.Adam(0.01, gradient_accumulation_steps=3))
    starts, make = [], AudioClassifierPreprocessor.training_batches

    def spy(self, *given, **options):
        starts.append(options["start"])
        return make(self, *given, **options)

    monkeypatch.setattr(AudioClassifierPreprocessor, "training_batches", spy)
    for _ in range(2):
        classifier.fit(*clips(), epochs=4, verbose=0)  # a batch an epoch
    assert starts == [0, 4]


def test_a_classifier_keeps_the_shares_of_its_run(run, tmp_path):
    """Else `evaluate` would test on clips of the training; and the length of an export."""
    run = dataclasses.replace(run, shares=(0.05, 0.3), clip_seconds=3.5)
    classifier = AudioClassifier.from_run(run)
    classifier.save(tmp_path / "model.keras")
    classifier.save_to_preset(tmp_path / "preset")
    for again in (
        keras.saving.load_model(tmp_path / "model.keras"),
        AudioClassifier.from_preset(tmp_path / "preset"),
        classifier,
    ):
        back = again.to_run()
        assert (back.shares, back.clip_seconds) == ((0.05, 0.3), 3.5)


def test_a_frozen_encoder_stays_frozen_when_it_is_saved(tmp_path, classifier):
    classifier.backbone.trainable = False
    classifier.compile(optimizer=keras.optimizers.Adam(0.01))
    classifier.fit(*clips(), verbose=0)
    classifier.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert len(again.trainable_weights) == len(classifier.trainable_weights) == 13
    assert int(again.optimizer.iterations) == int(classifier.optimizer.iterations) > 0


def test_compile_adds_metrics_and_scales_the_loss_of_float16(run):
    classifier = AudioClassifier.from_run(run, dtype="mixed_float16")
    assert isinstance(classifier.optimizer, keras.optimizers.LossScaleOptimizer)
    classifier = AudioClassifier.from_run(run)
    one, other = (keras.metrics.SparseTopKCategoricalAccuracy(k, name=f"top{k}") for k in (1, 2))
    classifier.compile(metrics=[one], weighted_metrics=[other])
    found = classifier.evaluate(*clips(), verbose=0, return_dict=True)
    assert set(found) == {"loss", "top1", "top2"}
    assert type(classifier.optimizer) is keras.optimizers.Adam
    classifier.compile(loss="sparse_categorical_crossentropy", metrics="accuracy")
    assert set(classifier.evaluate(*clips(), verbose=0, return_dict=True)) == {"loss", "accuracy"}


def test_the_rows_of_a_fit_decide_whether_xla_compiles(run, monkeypatch, tmp_path):
    monkeypatch.setattr(audio_classifier, "jit_compile", lambda _, row_length: row_length <= 128)
    classifier = AudioClassifier.from_run(run)
    assert classifier.jit_compile  # its preprocessor has rows of 128 tokens
    noise = np.random.default_rng(0).normal(0, 0.1, 4 * RATE).astype("float32")
    classifier.fit([noise], [0], verbose=0)
    assert not classifier.jit_compile  # 400 tokens at patch 8
    classifier.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again._chooses_xla and again.jit_compile
    for given in ({"jit_compile": True}, {"run_eagerly": True}):
        classifier.compile(**given)
        assert not classifier._chooses_xla
    monkeypatch.setattr(audio_classifier, "jit_compile", lambda *_: "auto")  # several devices
    assert not AudioClassifier.from_run(run)._chooses_xla


def test_a_classifier_that_is_not_compiled_is_saved_and_predicts(run, classifier, tmp_path):
    waveforms, labels = clips(3)
    bare = AudioClassifier.from_run(run, compile=False)
    expected = classifier.predict(waveforms)
    np.testing.assert_array_equal(bare.predict(waveforms), expected)
    bare.save(tmp_path / "model.keras")
    bare.save_to_preset(str(tmp_path / "preset"))
    for again in (
        keras.models.load_model(tmp_path / "model.keras"),
        AudioClassifier.from_preset(str(tmp_path / "preset")),
    ):
        np.testing.assert_allclose(again.predict(waveforms), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"is not compiled; call `compile\(\)` before"):
        bare.fit(waveforms, labels)
    for parts in ((), (waveforms, labels, labels, labels)):
        with pytest.raises(ValueError, match=r"validation_data has . parts; expected a Dataset"):
            classifier.fit(waveforms, labels, validation_data=parts)


def test_without_a_preprocessor_it_takes_packed_batches(classifier):
    waveforms, labels = clips()
    inputs, slots, weights = (
        keras.tree.map_structure(keras.ops.convert_to_numpy, one)
        for one in classifier.preprocessor(waveforms, labels)
    )
    expected = keras.ops.convert_to_numpy(classifier(inputs))
    classifier.preprocessor = None
    np.testing.assert_allclose(classifier.predict(inputs, verbose=0), expected, atol=1e-6)
    classifier.fit(inputs, slots, sample_weight=weights, verbose=0)
    classifier.evaluate(inputs, slots, sample_weight=weights, verbose=0)
    with pytest.raises(ValueError, match="to_run needs a preprocessor"):
        classifier.to_run()


# === Presets and runs ===


@pytest.mark.parametrize("make, options", [(ElasticAST, {}), (FlexiAST, {"dropout": 0.1})])
def test_a_run_and_a_preset_turn_into_one_another(tmp_path, make, options):
    run = make_run(make=make, **options)
    (tmp_path / "run").mkdir()
    save_run(run, tmp_path / "run")
    waveforms, _ = clips()
    expected = load_classifier(run).predict(waveforms)
    classifier = AudioClassifier.from_preset(tmp_path / "run")
    np.testing.assert_allclose(classifier.predict(waveforms), expected, atol=1e-6)
    classifier.save_to_preset(tmp_path / "preset")
    loaded = AudioClassifier.from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(loaded.predict(waveforms), expected, atol=1e-6)
    assert (loaded.classes, loaded.get_config()) == (CLASSES, classifier.get_config())
    loaded.save_to_preset(tmp_path / "preset")  # over itself
    loaded.save_to_run(tmp_path / "again")
    again = load_run(tmp_path / "again")
    np.testing.assert_allclose(load_classifier(again).predict(waveforms), expected, atol=1e-6)
    assert (again.fbank, again.patches, again.packing) == (run.fbank, run.patches, run.packing)
    loaded.save(tmp_path / "model.keras")
    keras_own = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(keras_own.predict(waveforms), expected, atol=1e-6)


def test_a_new_head_keeps_the_encoder(folder, classifier, tmp_path):
    classifier.save_to_preset(tmp_path / "preset")
    classifier.backbone.save_to_preset(str(tmp_path / "encoder"))
    for preset in (folder, tmp_path / "preset", tmp_path / "encoder"):
        found = AudioClassifier.from_preset(preset, num_classes=7, dropout=0.2)
        assert (found.num_classes, found.dropout, len(found.classes)) == (7, 0.2, 7)
        for ours, theirs in zip(
            found.backbone.get_weights(), classifier.backbone.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        assert found.predict(clips()[0]).shape == (6, 7)
    found = AudioClassifier.from_preset(tmp_path / "encoder", num_classes=7, segments=5)
    assert found.predict(clips()[0]).shape == (6, 7)
    with pytest.raises(ValueError, match=r"Give the preprocessor packing=PackSettings\(segments=5"):
        found.preprocessor = classifier.preprocessor
    with pytest.raises(ValueError, match="of an ASTBackbone alone, pass num_classes"):
        AudioClassifier.from_preset(tmp_path / "encoder")
    found = AudioClassifier.from_preset(folder, segments=2, pooling="mean")  # a new pooling
    assert found.predict(clips()[0]).shape == (6, 3)
    half = AudioClassifier.from_preset(folder, dtype="mixed_bfloat16")
    assert half.backbone.blocks[0].dtype_policy.name == "mixed_bfloat16"
    assert np.abs(half.predict(clips()[0]) - classifier.predict(clips()[0])).max() < 0.05


@ONCE
def test_presets_by_name_are_untrained():
    assert {name.partition("_")[2] for name in PRESETS} == {"nano", "tiny", "small", "base"}
    assert AudioClassifier.presets is PRESETS
    for name in ("flexiast_nano", "elasticast_nano"):
        found = AudioClassifier.from_preset(name, load_weights=False, num_classes=4)
        assert found.predict([np.random.default_rng(0).normal(0, 0.1, 16000)]).shape == (1, 4)
        assert "Untrained" in PRESETS[name]["metadata"]["description"]
        with pytest.raises(ValueError, match=r"has no published weights\. Pass load_weights=False"):
            AudioClassifier.from_preset(name)
        with pytest.raises(ValueError, match=r"has no classes\. Pass num_classes"):
            AudioClassifier.from_preset(name, load_weights=False)


def test_a_published_ast_loads_through_the_same_door():
    classifier = AudioClassifier.from_preset(PUBLISHED)
    waveform = np.random.default_rng(0).normal(0, 0.1, 16000).astype("float32")
    from keras_flexast import convert_run

    run = convert_run(PUBLISHED).run
    expected = load_classifier(run).predict([waveform])
    np.testing.assert_allclose(classifier.predict([waveform]), expected, atol=1e-6)
    assert classifier.classes == run.classes


@ONCE
def test_the_card_and_the_way_to_a_hub(classifier, tmp_path, monkeypatch):
    classifier.save_to_preset(tmp_path / "preset")
    card = (tmp_path / "preset" / "README.md").read_text()
    assert "pipeline_tag: audio-classification" in card and "- middle\n" in card
    sent = {}
    hub = keras_hub.src.utils.preset_utils.huggingface_hub
    monkeypatch.setattr(
        hub, "create_repo", lambda repo_id, exist_ok: type("Url", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(hub, "file_exists", lambda repo_id, filename: True)
    monkeypatch.setattr(hub, "upload_folder", lambda **given: sent.update(given))
    keras_hub.upload_preset("hf://me/tones", str(tmp_path / "preset"))
    assert sent == {"repo_id": "me/tones", "folder_path": str(tmp_path / "preset")}


# === Bad input ===


@pytest.mark.parametrize(
    "x, y, message",
    [
        ([np.zeros(0, "float32")], [0], r"waveforms\[0\] has 0 samples; at least 200 are needed"),
        ([np.zeros(3000, "int16")], [0], r"has dtype int16 .* Divide 16-bit integers by 32768"),
        ([np.full(3000, np.nan)], [0], "NaN or infinite"),
        (clips(2)[0], [0, 3], r"y has .* values such as \[3\]; expected integers from 0 to 2"),
        (clips(2)[0], [0.5, 1.0], r"values such as \[0\.5\]; expected integers"),
        (clips(2)[0], [0], r"labels has shape \(1,\) for 2 waveforms"),
        (clips(2)[0], np.zeros((2, 5)), "y has 5 columns for 3 classes"),
        (clips(2)[0], None, "y is None; give the label of each clip"),
        (clips(1)[0], [[0, 0.5, np.nan]], r"y has values outside \[0, 1\], or NaN"),
    ],
)
def test_clips_and_labels_of_no_use_are_named(classifier, x, y, message):
    for door in (classifier.fit, classifier.evaluate):
        with pytest.raises(ValueError, match=message):
            door(x, y, verbose=0)


def test_datasets_of_no_use_are_named(classifier):
    integers = tf.data.Dataset.from_tensors(np.zeros(3000, "int16"))
    named = tf.data.Dataset.from_tensors({"audio": np.zeros(3000, "float32")})
    for wrong, text in ((integers, "int16"), (named, "audio")):
        with pytest.raises(ValueError, match=rf"the Dataset gives .*{text}.*; expected waveforms"):
            classifier.predict(wrong)
    with pytest.raises(ValueError, match="waveforms is one array; give a list of arrays"):
        classifier.predict(np.zeros(3000, "float32"))
    empty = dataset([np.zeros(100, "float32")])
    with pytest.raises(tf.errors.InvalidArgumentError, match="of the Dataset is shorter than"):
        classifier.predict(empty)
    waveforms, labels = clips(3)
    loud = dataset([1e3 * waveforms[0]])
    for wrong in (loud, dataset([waveforms[0] * np.nan])):
        with pytest.raises(tf.errors.InvalidArgumentError, match="has NaN or samples beyond 16"):
            classifier.predict(wrong)
    stereo = dataset(waveforms, labels).map(lambda x, y: (tf.stack([x, x], 1), y))
    for wrong in (stereo, stereo.map(lambda x, y: x)):
        with pytest.raises(ValueError, match="Take the mean of the channels"):
            classifier.predict(wrong)
    for door in (classifier.fit, classifier.evaluate):
        with pytest.raises(ValueError, match=r"without clips|no clips"):
            door(dataset(waveforms, labels).take(0), verbose=0)
    with pytest.raises(ValueError, match="batch_size=0 must be a positive"):
        classifier.fit(waveforms, labels, batch_size=0)
    with pytest.raises(ValueError, match="x is None; give the waveforms"):
        classifier.predict(None)
    with pytest.raises(ValueError, match=r"class_weight=\[1\] must be a dictionary"):
        classifier.fit(waveforms, labels, class_weight=[1])
    with pytest.raises(ValueError, match=r"sample_weight has shape \(1,\) for 3 clips"):
        classifier.fit(waveforms, labels, sample_weight=[1], class_weight={0: 1})
    soft = tf.data.Dataset.from_tensors((waveforms[0], np.zeros(4, "float32")))
    for wrong, text in (
        (dataset(waveforms), r"expected \(waveform, label\) or"),
        (soft, r"labels TensorSpec.*; expected integers \(\.\.\.\) or floats \(\.\.\., 3\)"),
    ):
        with pytest.raises(ValueError, match=text):
            classifier.fit(wrong, verbose=0)
    for door in (classifier.fit, classifier.evaluate):
        with pytest.raises(tf.errors.InvalidArgumentError, match="of the Dataset; expected 0 to 2"):
            door(dataset(waveforms, [0, 1, 3]), verbose=0)
    several = AudioClassifier.from_run(make_run(multi_label=True))
    with pytest.raises(ValueError, match=r"labels TensorSpec.*; expected floats \(\.\.\., 3\)"):
        several.fit(dataset(waveforms, labels), verbose=0)


@ONCE
def test_other_folders_and_names_are_refused(tmp_path, folder, monkeypatch):
    with pytest.raises(ValueError, match=r"is neither a run .* nor a preset"):
        AudioClassifier.from_preset(tmp_path)
    other = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3), patch_size=16, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8
    )
    other.save_to_preset(str(tmp_path / "vit"))
    with pytest.raises(ValueError, match="is neither a run"):
        AudioClassifier.from_preset(tmp_path / "vit")
    with pytest.raises(FileNotFoundError, match="preset='mine' is no folder here, and no name of"):
        AudioClassifier.from_preset("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.config\.json is not JSON"):
        AudioClassifier.from_preset(tmp_path / "broken")
    (tmp_path / "vit" / "task.json").write_text("{}")
    with pytest.raises(ValueError, match=r"subclass of AudioClassifier .* with ViTBackbone"):
        AudioClassifier.from_preset(tmp_path / "vit")
    with pytest.raises(ValueError, match="preprocessor is a Dense; expected an AudioClassifierPre"):
        AudioClassifier.from_preset(folder, preprocessor=keras.layers.Dense(3))

    def no_network(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(keras_hub.src.utils.preset_utils.kagglehub, "model_download", no_network)
    with pytest.raises(FileNotFoundError, match=r"no hub gave the preset kaggle://.*no route"):
        AudioClassifier.from_preset("kaggle://someone/model/keras/small")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("someone/never-there", "hf://someone/never-there"):
        with pytest.raises(FileNotFoundError, match="hub did not give"):
            AudioClassifier.from_preset(name)
    with pytest.raises(ValueError, match="pooling='cls' needs a backbone of 1 prefix tokens"):
        AudioClassifier(ASTBackbone(16, 1, num_heads=1), 3, pooling="cls")
    with pytest.raises(ValueError, match="classes has 1 names for num_classes=3"):
        AudioClassifier(ASTBackbone(16, 1, num_heads=1), 3, classes=["one"])
    wrong = AudioClassifierPreprocessor(ASTAudioConverter())
    with pytest.raises(ValueError, match=r"preprocessor's patches\.prefix_tokens is 0, but the"):
        AudioClassifier(ASTBackbone(16, 1, num_heads=1, prefix_tokens=1), 3, wrong, pooling="cls")
    with pytest.raises(ValueError, match="num_classes=0 must be a positive"):
        AudioClassifier.from_preset(folder, num_classes=0)
    with pytest.raises(ValueError, match="AudioClassifier has no argument patch_size"):
        AudioClassifier.from_preset(folder, patch_size=8)
    with pytest.raises(FileExistsError, match="is not replaced: it is no KerasHub preset"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("mine")
        AudioClassifier.from_preset(folder).save_to_preset(tmp_path / "mine")


@ONCE
def test_without_kerashub_one_sentence_says_what_to_install():
    code = """
    import keras_flexast
    try:
        import keras_flexast.hub
    except ImportError as error:
        print(error)
    """
    text = run_python(code, backend="jax", blocked=["keras_hub"])
    assert text.startswith('keras_flexast.hub needs KerasHub: pip install "keras-flexast[hub]"')


# === The notebook ===


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="it exports, too")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """At small scale; the pictures in it are of the full one."""
    import matplotlib.pyplot as plt

    book = json.loads((ROOT / "examples" / "your_own_sounds.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    pictures = [out for cell in book["cells"] for out in cell.get("outputs", []) if "data" in out]
    assert len(pictures) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLIPS", "6")
    monkeypatch.setenv("EPOCHS", "1")
    names = {}
    for cell in cells:
        exec(cell, names)
    plt.close("all")
    assert names["scores"].shape == (3, 3)
    assert (tmp_path / "preset" / "config.json").exists()
