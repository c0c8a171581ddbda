"""However many patch sizes, lengths and frame shifts: how often a model is compiled."""

import dataclasses

import keras
import numpy as np
import pytest
import soundfile
from helpers import randomize

from keras_flexast import PackedAST
from keras_flexast.evaluation import evaluate_run
from keras_flexast.inference.scoring import PackedPredictor, packed_outputs
from keras_flexast.models import embedding_model
from keras_flexast.runs import Run
from keras_flexast.training import compile_packed
from tf_data_pipelines import (
    PATCH_SIZES,
    evaluation_batches,
    load_source,
    scan_source,
    training_batches,
)
from tf_data_pipelines.lengths import clip_tokens, packing_for
from tf_data_pipelines.settings import FbankSettings, PackSettings

FBANK = FbankSettings()
SHORT, LONG = PackSettings(4, 128, 4), PackSettings(1, 512, 8)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """Twelve clips of 0.5 to 1.05 s: 96 to 208 tokens at patch 8, up to 56 at patch 16."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("sounds")
    for number in range(12):
        path = root / f"class{number % 3}" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, 8000 + 800 * number), 16000)
    return scan_source(load_source(root, validation=0, test=0), FBANK)


def counted(model, name):
    """A list that grows by one with every trace of a method."""
    traces, method = [], getattr(model, name)

    def call(*args, **kwargs):
        traces.append(name)
        return method(*args, **kwargs)

    setattr(model, name, call)
    return traces


def run_of(packing):
    model = PackedAST(3, dim=16, depth=1, num_heads=2, grid=(8, 64), segments=packing.segments)
    patches = model.patch_settings(PATCH_SIZES)
    return Run(
        model, FBANK, patches=patches, packing=packing, classes=("class0", "class1", "class2")
    )


def test_training_compiles_once(scanned):
    run = run_of(PackSettings(2, 256, 4))
    patches = run.model.patch_settings(PATCH_SIZES, frame_shifts_ms=(10.0, 12.5, 20.0))
    compile_packed(run.model, 1e-3, row_length=run.packing.row_length)
    traces, after = counted(run.model, "compute_loss"), []
    seen = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_, **__: after.append(len(traces))
    )
    run.model.fit(
        training_batches(scanned, FBANK, patches=patches, packing=run.packing),
        steps_per_epoch=3, epochs=2, shuffle=False, verbose=0, callbacks=[seen],
    )  # fmt: skip
    assert len(after) == 6 and len(set(after)) == 1, after


def test_a_sweep_over_patch_sizes_compiles_at_most_twice(scanned):
    run = run_of(SHORT)
    tokens = clip_tokens(scanned, FBANK, run.patches)
    assert tokens[0].max() > SHORT.row_length > tokens[3].max()  # patch 8 needs longer rows
    attention = run.model.backbone.blocks[0].self_attention
    traces = counted(attention, "call")
    results = evaluate_run(run, scanned, split="all", patch_sizes=PATCH_SIZES)
    again = len(traces)
    evaluate_run(run, scanned, split="all", patch_sizes=[16, 20])
    per_shape = len(traces) - again  # one shape, however often Keras traces it
    assert again == 2 * per_shape
    assert [r["patch_size"] for r in results] == [(size, size) for size in PATCH_SIZES]
    assert [r["tokens"] for r in results] == tokens.sum(1).tolist()


def test_row_lengths_are_few(scanned):
    run, lengths = run_of(SHORT), set()
    for stretch in np.linspace(0.5, 7.5, 200):
        longer = dataclasses.replace(scanned, durations=scanned.durations * stretch)
        lengths.add(packing_for(longer, FBANK, run.patches, SHORT).row_length)
    assert len(lengths) <= 14 and max(lengths) <= 8192, lengths


def test_prediction_in_rows_of_any_length_gives_the_same(scanned):
    """Long rows attend clip by clip, short ones under the dense mask; in any order."""
    run = run_of(LONG)
    model, patches = randomize(run.model, scale=0.3), run.patches_at([16])
    for part in (model, embedding_model(model)):
        predictor, outputs = PackedPredictor(part), {}
        for packing in (LONG, SHORT, LONG):
            batches = evaluation_batches(scanned, FBANK, patches=patches, packing=packing)
            outputs[packing], _ = packed_outputs(predictor, batches, len(scanned.source))
        np.testing.assert_allclose(outputs[LONG], outputs[SHORT], rtol=0, atol=1e-5)
        assert np.ptp(outputs[LONG], axis=0).max() > 1e-3  # the clips do differ


def test_a_clip_without_weight_is_scored():
    class Predictor:
        width = 1

        def __call__(self, inputs):
            return np.float32([[[1.0], [2.0], [9.0]]])

    ids = {"segment_ids": np.array([[1, 2, 0]])}
    batch = ids, None, np.float32([[1, 0, 0]]), np.array([[1, 0, -1]])
    outputs, _ = packed_outputs(Predictor(), [batch], 2)
    assert outputs.tolist() == [[2.0], [1.0]]
