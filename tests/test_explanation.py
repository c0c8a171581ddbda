"""Where a model looks: exact attention, in its place in the spectrogram."""

import dataclasses

import keras
import numpy as np
import pytest
import soundfile
from helpers import randomize
from keras import ops

from keras_flexast import FlexiAST, PackedAST, load_classifier
from keras_flexast.figures import explanation_figure, mel_place
from keras_flexast.inference import explain_file, explanation
from keras_flexast.inference.explanation import attention_map, over_spectrogram
from keras_flexast.runs import Run
from tf_data_pipelines.fbank import features
from tf_data_pipelines.settings import DataWarning, FbankSettings, PackSettings, PatchSettings

COUNTS = (7, 11, 5)


def batch(width=11):
    rng = np.random.default_rng(0)
    ids = np.int32(np.arange(width) < np.array(COUNTS)[:, None])
    positions = np.ones((3, width, 4), "float32")
    positions[:, 0] = 0  # a prefix token, where there are any
    return {
        "tokens": rng.normal(size=(3, width, 256)).astype("float32"),
        "positions": positions,
        "segment_ids": ids,
    }


def model(pooling):
    return randomize(PackedAST(3, dim=16, depth=2, num_heads=1, pooling=pooling, segments=2))


def test_the_attention_of_the_query_gives_what_pooling_gives():
    """With one head, the pooled vector is the sum of the values with these weights."""
    packed, inputs = model("attention"), batch()
    weights = attention_map(packed, inputs)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    assert not weights[inputs["segment_ids"] == 0].any()
    tokens = packed.backbone(inputs)
    pool = packed.pooling
    summed = ops.einsum("rt,rtd->rd", weights, pool.value_dense(tokens))
    expected = pool(tokens, inputs["segment_ids"])[:, 0]
    np.testing.assert_allclose(pool.output_dense(summed), expected, rtol=0, atol=1e-5)


def test_the_attention_of_a_prefix_token_is_that_of_the_last_block():
    packed, inputs = model("cls"), batch()
    weights = attention_map(packed, inputs)
    block = packed.backbone.blocks[-1]
    before = keras.Model(packed.backbone.input, block.input[0])(inputs)
    tokens = block.attention_norm(before)
    expected = block.self_attention(tokens, inputs["segment_ids"])[:, 0]
    value = block.self_attention.value_dense(tokens)
    found = block.self_attention.output_dense(ops.einsum("rt,rtd->rd", weights, value))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def blocks_attention(packed, inputs):
    """Attention of every block, float64 (blocks, heads, rows, length, length), the slow way."""
    ids, found = inputs["segment_ids"], []
    tokens = packed.backbone.patch_embed(inputs["tokens"])
    tokens = tokens + packed.backbone.position_embed(inputs["positions"])
    if packed.backbone.prefix is not None:
        tokens = packed.backbone.prefix(tokens, inputs["positions"])
    for block in packed.backbone.blocks:
        layer, x = block.self_attention, block.attention_norm(tokens)
        query, key = (
            np.asarray(dense(x), "float64").reshape(*x.shape[:2], layer.num_heads, -1)
            for dense in (layer.query_dense, layer.key_dense)
        )
        logits = np.einsum("rahw,rbhw->hrab", query, key) / query.shape[-1] ** 0.5
        weights = np.exp(logits - logits.max(-1, keepdims=True)) * (ids > 0)[None, :, None]
        found.append(weights / weights.sum(-1, keepdims=True))
        tokens = block(tokens, ids)
    return np.array(found)


@pytest.mark.parametrize("pooling", ["attention", "cls", "cls_distillation", "mean"])
def test_rollout_is_the_product_of_all_blocks(pooling):
    packed = PackedAST(3, dim=16, depth=3, num_heads=2, pooling=pooling, segments=2)
    inputs = batch()
    randomize(packed)
    found = attention_map(packed, inputs, rollout=True)
    real = inputs["segment_ids"] > 0
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert not found[~real].any()
    through = np.eye(real.shape[1])
    for weights in blocks_attention(packed, inputs).mean(1):
        through = (weights + np.eye(real.shape[1])) / 2 @ through
    if pooling == "attention":
        last = attention_map(packed, inputs)
    else:
        prefix = (inputs["positions"][..., 2] == 0) & real
        last = prefix if pooling.startswith("cls") else real & ~prefix
        last = last / last.sum(1, keepdims=True)
    expected = np.einsum("ra,rab->rb", last, through) * real
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_mean_pooling_looks_where_its_last_block_looks():
    packed, inputs = model("mean"), batch()
    inputs["positions"][:] = 1
    real = inputs["segment_ids"] > 0
    weights = blocks_attention(packed, inputs)[-1, 0]
    expected = (weights * real[..., None]).sum(1) / real.sum(1, keepdims=True) * real
    np.testing.assert_allclose(attention_map(packed, inputs), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def run():
    ast = randomize(FlexiAST(2, dim=16, depth=1, num_heads=2))
    return Run(
        ast, FbankSettings(), patches=ast.patch_settings(), packing=PackSettings(),
        classes=("high", "low"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sounds") / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 12345), 16000)
    return path


@pytest.mark.parametrize("size, shift", [(None, None), (8, None), ((12, 20), 20.0)])
def test_a_file_is_explained_as_it_is_classified(run, sound, size, shift, tmp_path):
    found = explain_file(run, sound, size, frame_shift_ms=shift)
    scores = load_classifier(run, size, frame_shift_ms=shift).predict_files(sound).scores[0]
    np.testing.assert_allclose(found.scores, scores, rtol=0, atol=1e-5)
    fbank = FbankSettings(shift or 10.0)
    waveform = soundfile.read(sound, dtype="float32")[0]
    np.testing.assert_allclose(found.spectrogram, features(waveform, fbank), atol=1e-4)
    for heat in (found.attention, found.rollout):
        assert heat.shape == found.spectrogram.shape and heat.max() == 1 and heat.min() >= 0
    assert found.top(1)[0][0] == run.classes[scores.argmax()] and found.fbank == fbank
    explanation_figure(found, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_weights_lie_over_their_patches():
    """Tokens run through time inside each band; where patches overlap, the larger counts."""
    patches = PatchSettings(((16, 16),), grid=(2, 4))
    weights = np.zeros(8)
    weights[[1, 6]] = 2.0, 1.0  # first band, second column; second band, third column
    spread = over_spectrogram(weights, (64, 32), patches)
    assert spread[:16, 16:32].min() == 1 and spread[16:, 32:48].min() == 0.5
    assert spread.sum() == 16 * 16 * 1.5


def test_ticks_stand_at_the_bands_of_their_frequencies():
    """The band in which a tone is loudest."""
    fbank = FbankSettings(mel_bins=64)
    times = np.arange(16000) / 16000
    for hertz in (500, 1000, 4000):
        tone = np.sin(2 * np.pi * hertz * times).astype("float32")
        loudest = ops.convert_to_numpy(features(tone, fbank)).mean(0).argmax()
        assert abs(mel_place([hertz], fbank)[0] - (loudest + 0.5)) <= 1


def test_a_clip_too_long_for_a_row_is_refused(run, tmp_path):
    soundfile.write(
        tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.1, 16000 * 60), 16000
    )
    with pytest.raises(ValueError, match=r"long.wav \(60.0 s\) has more .* patch 8. Use a larger"):
        explain_file(run, tmp_path / "long.wav", 8)
    with pytest.raises(IsADirectoryError, match="is a folder; give one sound file"):
        explain_file(run, tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="is an exported artifact, which gives scores and no"):
        explain_file(tmp_path / "model.onnx", tmp_path / "long.wav")


def test_what_a_run_does_not_hear_is_said(run, sound):
    cut = dataclasses.replace(run, fbank=dataclasses.replace(run.fbank, clip_ms=500))
    with pytest.warns(DataWarning, match="not heard"):
        assert explain_file(cut, sound).spectrogram.shape == (50, 128)


def test_attention_is_followed_a_part_of_the_queries_at_a_time(monkeypatch):
    packed, inputs = model("mean"), batch()
    whole = [attention_map(packed, inputs, rollout) for rollout in (False, True)]
    monkeypatch.setattr(explanation, "QUERIES", 4)
    for rollout in (False, True):
        found = attention_map(packed, inputs, rollout)
        np.testing.assert_allclose(found, whole[rollout], rtol=0, atol=1e-6)
