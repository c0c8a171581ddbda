"""A cascade over patch sizes: who is asked, what it costs, and what cannot be one."""

import dataclasses
import itertools

import numpy as np
import pytest
import soundfile
from helpers import randomize, write_tones

from keras_flexast import FlexiAST, evaluate_run, evaluation, load_classifier
from keras_flexast.evaluation import evaluate_cascade
from keras_flexast.inference import CascadeClassifier, Classifier, FileScores, load_cascade
from keras_flexast.inference.cascade import (
    THRESHOLDS,
    best_stages,
    best_threshold,
    cascade_costs,
    clip_operations,
    means_so_far,
    stages_of,
)
from keras_flexast.runs import Run
from tf_data_pipelines import read_data
from tf_data_pipelines.settings import DataWarning, FbankSettings, PackSettings

SIZES = (48, 24, 12)


class Known(Classifier):
    """Gives the scores of a table; a clip is its own number, a file the text of it."""

    def __init__(self, scores, deaf=()):
        self.scores, self.deaf, self.asked = scores, deaf, []
        self.classes, self.sample_rate, self.multi_label = ("a", "b", "c"), 16000, False
        self.min_samples = 400
        self.patch_size = "16"

    def predict(self, waveforms):
        numbers = [len(one) - 1000 for one in waveforms]
        self.asked += numbers
        return self.scores[numbers]

    def predict_files(self, paths, progress=False):
        usable = [path for path in paths if int(path) not in self.deaf]
        self.asked += map(int, usable)
        return FileScores(self.scores[[int(path) for path in usable]], usable)

    def embed_files(self, paths, progress=False):
        raise NotImplementedError

    timeline = embed_files


def table(stages, clips, seed=0):
    logits = np.random.default_rng(seed).normal(size=(stages, clips, 3)) * 3
    return (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype("float32")


@pytest.mark.parametrize("threshold", [0, 0.5, 0.8, 1, None])
def test_each_clip_ends_at_the_first_stage_that_is_sure(threshold):
    scores, rng = table(3, 50), np.random.default_rng(1)
    stages = [Known(one) for one in scores]
    found = CascadeClassifier(stages, threshold).predict(
        [rng.uniform(-1, 1, 1000 + number).astype("float32") for number in range(50)]
    )
    for clip in range(50):
        heard = [clip in stage.asked for stage in stages]
        means = [scores[: k + 1, clip].mean(0) for k in range(3)]
        ends = (k for k in range(2) if threshold is not None and means[k].max() >= threshold)
        place = next(ends, 2)
        assert heard == [k <= place for k in range(3)]
        np.testing.assert_allclose(found[clip], means[place], rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.99, None])
def test_a_file_too_long_for_finer_patches_keeps_its_coarse_scores(threshold):
    scores = table(2, 6)
    cascade = CascadeClassifier(
        [Known(scores[0], deaf={4}), Known(scores[1], deaf={0, 1})], threshold
    )
    with pytest.warns(DataWarning, match="2 of 5 clips are too long for patch 16"):
        found = cascade.predict_files([str(number) for number in range(6)])
    assert found.paths == ["0", "1", "2", "3", "5"]
    np.testing.assert_array_equal(found.scores[:2], scores[0, :2])


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_is_cheaper_and_as_accurate(seed):
    scores, rng = table(3, 200, seed), np.random.default_rng(seed)
    targets = rng.integers(0, 3, 200)
    right = rng.random((3, 200)) < np.array([[0.4], [0.6], [0.7]])  # finer is better
    scores = np.where(right[..., None], np.sort(scores), np.sort(scores)[..., ::-1])
    order = np.stack([(targets + shift) % 3 for shift in (2, 1, 0)], -1)
    scores = np.take_along_axis(scores, np.argsort(order, -1)[None].repeat(3, 0), -1)
    costs = rng.uniform(1, 2, (3, 200)) * np.array([[1], [4], [16]])
    results = {}
    heard = np.ones((3, 200), bool)
    for threshold in THRESHOLDS:
        stage = stages_of(means_so_far(scores, heard), threshold)
        ended = [scores[: last + 1, clip].mean(0) for clip, last in enumerate(stage)]
        paid = sum(costs[: last + 1, clip].sum() for clip, last in enumerate(stage)) / 200
        results[threshold] = (np.argmax(ended, -1) == targets).mean(), paid
        np.testing.assert_allclose(cascade_costs(costs, heard, stage).mean(), paid)
    least = (scores.argmax(-1) == targets).mean(1).max()
    accuracy, paid = results[best_threshold(scores, heard, targets=targets, costs=costs)]
    able = [cost for value, cost in results.values() if value >= least]
    assert (
        (accuracy >= least and paid == min(able))
        if able
        else accuracy == max(value for value, _ in results.values())
    )


def test_the_sizes_of_a_cascade_are_found():
    """40 is right about the easy clips, 16 and 8 each about a half of the others, too."""
    targets, clips = np.random.default_rng(0).integers(0, 2, 400), np.arange(400)
    easy, even = clips < 360, clips % 2 == 0
    scores, never = np.zeros((5, 400, 2)), np.zeros(400, bool)
    for place, right in enumerate((easy, never, easy | even, never, easy | ~even)):
        of_target = np.where(right, np.where(easy, 0.95, 0.9), 0.45)
        scores[place, clips, targets], scores[place, clips, 1 - targets] = of_target, 1 - of_target
    costs = np.repeat(np.array([[1.0], [2], [10], [15], [20]]), 400, 1)
    how = {"targets": targets, "areas": [40**2, 32**2, 16**2, 12**2, 8**2]}
    heard = np.ones((5, 400), bool)
    assert best_stages(scores, heard, costs=costs, **how) == [0, 2, 4]
    heard[4, ~easy] = False  # too long for 8
    assert best_stages(scores, heard, costs=costs, **how) == [0, 2]
    assert best_stages(scores, heard, costs=costs / costs, **how) == [2, 4]  # none at half the cost
    alike = {**how, "areas": [256, 256, 256, 256, 64]}  # stages are of different sizes
    assert best_stages(scores, heard, costs=costs, **alike)[1] == 4


def test_operations_are_those_of_the_matrices():
    model = FlexiAST(3, dim=48, depth=2, num_heads=4)
    backbone = model.backbone
    kernels = [backbone.patch_embed.kernel] + [
        weight for block in backbone.blocks for weight in block.weights if len(weight.shape) == 2
    ]
    tokens = np.array([1, 50, 700])
    products = 2 * sum(int(np.prod(one.shape)) for one in kernels) * tokens
    pairs = 2 * 2 * 2 * 48 * tokens**2  # blocks, query x key and weights x value, 2 each
    np.testing.assert_allclose(clip_operations(model, tokens), products + pairs)


@pytest.fixture(scope="module")
def run():
    ast = randomize(FlexiAST(2, dim=16, depth=1, num_heads=2))
    return Run(
        ast, FbankSettings(), patches=ast.patch_settings(), packing=PackSettings(),
        classes=("high", "low"), shares=(0.4, 0.4),
    )  # fmt: skip


def test_a_run_and_its_evaluation_agree(run, tmp_path):
    data = write_tones(tmp_path, clips=20)
    *stages, cascade, mean = evaluate_cascade(run, data, SIZES)
    assert [one["name"] for one in stages] == ["48", "24", "12"]
    for one, other in zip(stages, evaluate_run(run, data, patch_sizes=SIZES), strict=True):
        assert one["value"] == other["value"] and one["confusion"] == other["confusion"]
    costs = [one["operations"] for one in stages]
    assert costs == sorted(costs) and mean["operations"] == pytest.approx(sum(costs))
    trained = dataclasses.replace(run, patches=run.patches_at(SIZES[::-1]))
    *names, _, _ = (one["name"] for one in evaluate_cascade(trained, data))
    assert 2 <= len(names) <= 3 and set(names) <= {"48", "24", "12"}
    shares = cascade["reached"]
    assert shares[0] == 1 and all(a >= b for a, b in itertools.pairwise(shares))
    assert costs[0] <= cascade["operations"] <= sum(costs)
    files = sorted(map(str, tmp_path.rglob("*.wav")))
    every = [load_classifier(run, size).predict_files(files).scores for size in SIZES]
    threshold = float(np.median(every[0].max(1)))
    found = load_cascade(run, SIZES, threshold=threshold).predict_files(files)
    means = means_so_far(np.array(every), np.ones((3, len(files)), bool))
    stage = stages_of(means, threshold)
    assert stage.mean() > 0 and found.paths == files
    expected = means[stage, np.arange(len(files))]
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=1e-5)
    all_of_them = load_cascade(run, SIZES, threshold=None).predict_files(files).scores
    np.testing.assert_allclose(all_of_them, np.mean(every, 0), rtol=0, atol=1e-5)


def test_sizes_and_threshold_are_those_of_the_validation_clips(run, tmp_path, monkeypatch):
    """There 24 knows all classes; among the test clips 12 does."""
    data, asked = write_tones(tmp_path, clips=20), []

    def scores_at(run, data, pairs, **_):
        asked.append(data)
        knows, targets = (24, 12)[len(asked) > 1], data.source.targets()
        scores = np.full((len(pairs), len(targets), 2), 0.55)  # sure of the wrong class
        for stage, (side, _) in enumerate(pairs):
            of_target = 0.95 if side == knows else 0.45
            scores[stage, np.arange(len(targets)), targets] = of_target
            scores[stage, np.arange(len(targets)), 1 - targets] = 1 - of_target
        costs = np.repeat([[1e6 / side] for side, _ in pairs], len(targets), 1)
        return np.log(scores), np.ones(scores.shape[:2], bool), costs

    monkeypatch.setattr(evaluation, "_stage_scores", scores_at)
    trained = dataclasses.replace(run, patches=run.patches_at(SIZES))
    *stages, cascade, _ = evaluate_cascade(trained, data)
    assert [one["name"] for one in stages] == ["24", "12"]
    assert cascade["threshold"] == 0.95
    assert len(asked[0].source) == len(read_data(data, run.fbank, split="validation",
                                                 shares=run.shares).source)  # fmt: skip


def test_a_long_clip_is_heard_at_the_sizes_that_hold_it(run, tmp_path):
    """In memory, in files and in the evaluation alike."""
    rng = np.random.default_rng(0)
    for name, seconds in (("train/low/a", 1), ("validation/high/b", 1), ("test/low/c", 40)):
        path = tmp_path / f"{name}.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, rng.normal(0, 0.1, 16000 * seconds), 16000)
    sizes = (48, (48, 2), (4, 4))  # 4 x 4 has 32,000 tokens
    cascade = load_cascade(run, sizes, threshold=None)
    with pytest.warns(DataWarning, match="1 of 1 clips are too long for patch 4;"):
        of_file = cascade.predict_files(path).scores
    with pytest.warns(DataWarning, match="1 of 1 clips are too long for patch 4;"):
        in_memory = cascade.predict([soundfile.read(path, dtype="float32")[0]])
    expected = np.mean(
        [load_classifier(run, one).predict_files(path).scores for one in sizes[:2]], 0
    )
    np.testing.assert_allclose(of_file, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(in_memory, expected, rtol=0, atol=1e-5)
    with pytest.warns(DataWarning) as warned:
        *stages, cascade_found, mean = evaluate_cascade(run, tmp_path, sizes)
    assert [str(one.message).split(":")[0] for one in warned] == [
        "1 of 1 clips are too long for patch 4"
    ]
    with pytest.warns(DataWarning) as warned:
        evaluate_cascade(run, tmp_path, ((8, 2), (2, 2)))
    cut = "1 of 1 clips have more than 8,192 tokens and lose their end: 1 at patch 8x2. A larger"
    assert str(warned[0].message).startswith(cut) and "patch 2:" in str(warned[1].message)
    (tmp_path / "test/low/c.wav").rename(tmp_path / "validation/high/c.wav")
    (tmp_path / "validation/high/b.wav").rename(tmp_path / "test/low/b.wav")
    with pytest.warns(DataWarning, match="1 of 1 validation clips are too long for patch 4:"):
        evaluate_cascade(run, tmp_path, sizes)
    assert cascade_found["reached"][2] == 0  # none is short enough
    spent = sum(one["operations"] for one in stages[:2])
    assert mean["operations"] == pytest.approx(spent)
    assert mean["per_class"][1]["accuracy"] == float(expected[0].argmax() == 1)
    for split in ("validation", "all"):
        with pytest.raises(ValueError, match=f"split='{split}' has the validation clips"):
            evaluate_cascade(run, tmp_path, sizes, split=split)


def test_what_is_no_cascade_is_refused(run, tmp_path):
    for sizes in ((16,), (16, 24), (16, 16), ((8, 32), 16), range(90, 0, -10)):
        with pytest.raises(
            ValueError, match=r"cascade=.* must be 2 to 8 patch sizes, each smaller"
        ):
            load_cascade(run, sizes)
        with pytest.raises(ValueError, match=r"cascade=.* must be 2 to 8 patch sizes"):
            evaluate_cascade(run, tmp_path, sizes)
    one = dataclasses.replace(run, patches=run.patches_at([16]))
    with pytest.raises(
        ValueError, match="no cascade can be found: the run was trained at patches of one area, 16"
    ):
        evaluate_cascade(one, tmp_path)
    with pytest.raises(ValueError, match=r"threshold=1.5"):
        load_cascade(run, SIZES, threshold=1.5)
    cascade = load_cascade(run, SIZES)
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    with pytest.raises(ValueError, match="a cascade has no embeddings"):
        cascade.embed_files(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="a cascade has no timeline"):
        cascade.timeline(tmp_path / "a.wav")
    (tmp_path / "model.tflite").write_bytes(b"")
    with pytest.raises(ValueError, match="is an exported artifact, and a cascade is evaluated"):
        evaluate_cascade(tmp_path / "model.tflite", tmp_path, SIZES)
    several = Known(table(1, 1)[0])
    several.multi_label = True
    with pytest.raises(ValueError, match="threshold needs one label for each clip"):
        CascadeClassifier([several, several])
