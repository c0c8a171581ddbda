"""A student learns what its teacher says of the clips, and stays an ordinary run."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_flexast import PackedAST
from keras_flexast.distillation import DistillationLoss, DistilledModel
from keras_flexast.metrics import log_softmax
from keras_flexast.optimizers import compile_packed
from keras_flexast.runs import Run, load_run
from keras_flexast.settings import DistillSettings, TrainSettings
from keras_flexast.training import train_run
from tf_data_pipelines import read_data
from tf_data_pipelines.settings import AugmentSettings, FbankSettings, PackSettings

NANO = {"size": None, "dim": 16, "depth": 1, "num_heads": 2}
CLASSES = ("high", "low", "middle")
LOGITS = np.float32([[[2, 0, -1], [0.5, 0.25, 3]], [[-30, 40, 0], [9, 9, 9]]])


def test_the_loss_of_single_labels_by_hand():
    """The divergence of softmax scores at the temperature, times its square, a mean over clips."""
    student, weights = LOGITS[:, ::-1] / 2, np.float32([[1, 1], [0.5, 0]])
    loss = DistillationLoss(temperature=2.0)
    ours, theirs = (log_softmax(logits / 2) for logits in (student, LOGITS))
    each = 4 * (np.exp(theirs) * (theirs - ours)).sum(-1)
    found = float(loss(LOGITS, student, sample_weight=weights))
    assert found == pytest.approx((each * weights).sum() / 2.5, rel=1e-5)
    assert float(loss(LOGITS, LOGITS, sample_weight=weights)) == pytest.approx(0, abs=1e-6)


def test_the_loss_of_several_labels_by_hand():
    """The divergence of each label's two scores, a mean over classes, then over clips."""
    student = np.float32([[[1, -1, 0.5], [0, 0, 0]], [[-3, 2, 0], [1, 2, 3]]])
    loss = DistillationLoss(multi_label=True, temperature=1.0)
    target, score = (1 / (1 + np.exp(-np.float64(logits))) for logits in (LOGITS, student))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [p * np.log(p / q) for p, q in ((target, score), (1 - target, 1 - score))]
    expected = np.nansum(parts, 0).mean()
    assert float(loss(LOGITS, student)) == pytest.approx(expected, rel=1e-5)
    assert float(loss(LOGITS, LOGITS)) == pytest.approx(0, abs=1e-6)


def packed(rng, prefix="", length=32):
    ids = np.zeros((4, length), "int32")
    ids[:, :20] = np.repeat([1, 2], [12, 8])
    batch = {
        "tokens": rng.normal(size=(4, length, 256)).astype("float32"),
        "positions": np.ones((4, length, 4), "float32"),
        "segment_ids": ids,
    }
    return {prefix + name: value for name, value in batch.items()}


def models():
    keras.utils.set_random_seed(0)
    student, teacher = (
        PackedAST(3, **NANO, segments=3, pooling=pooling) for pooling in ("attention", "cls")
    )
    teacher.head.bias.assign([4, -2, 0])
    return student, teacher


def test_a_student_moves_to_its_teacher_and_the_teacher_stays(tmp_path):
    """Labels say one class, the teacher another; with weight 1 the student follows the teacher."""
    rng, weights = np.random.default_rng(0), np.float32([[1, 1, 0]] * 4)
    inputs = {**packed(rng), **packed(rng, "teacher_", 24)}
    own = {name: value for name, value in inputs.items() if "teacher_" not in name}
    heard = {name.removeprefix("teacher_"): v for name, v in inputs.items() if "teacher_" in name}
    labels = np.full((4, 3), 2)
    student, teacher = models()
    before = teacher.get_weights()
    taught = teacher.predict_on_batch(heard)[:, :2]
    assert (taught.argmax(-1) == 0).all()
    loss = DistillationLoss(temperature=1.0)
    model = DistilledModel(student, teacher, loss=loss, weight=1.0)
    compile_packed(model, 3e-2, row_length=32)
    for _ in range(40):
        model.train_on_batch(inputs, labels, sample_weight=weights)
    for ours, theirs in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    logits = student.predict_on_batch(own)[:, :2]
    ours, theirs = np.exp(log_softmax(logits)), np.exp(log_softmax(taught))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=0.05)
    # Without what the teacher hears, as in the validation, the loss is that of the labels.
    found, accuracy = model.test_on_batch(own, labels, sample_weight=weights)
    assert found == pytest.approx(-log_softmax(logits)[..., 2].mean(), rel=1e-4) and accuracy == 0
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert isinstance(loaded, PackedAST)
    np.testing.assert_allclose(loaded.predict_on_batch(own)[:, :2], logits, atol=1e-5)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    soundfile = pytest.importorskip("soundfile")
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("sounds")
    for number in range(12):
        times = np.arange(5000 + 400 * number) / 16000
        name = CLASSES[number % 3]
        tone = 0.3 * np.sin(2 * np.pi * {"low": 300, "middle": 900, "high": 2500}[name] * times)
        (root / name).mkdir(exist_ok=True)
        sound = tone + rng.normal(0, 0.01, len(times))
        soundfile.write(root / name / f"{number}.wav", sound, 16000)
    return root


def teacher_run(classes=CLASSES, *, bias=(0.0, 0.0, 9.0), fbank=None, **options):
    """A run that says "middle" to everything."""
    keras.utils.set_random_seed(1)
    model = PackedAST(len(classes), **NANO, pooling="cls", segments=4)
    if len(classes) == 3:
        model.head.bias.assign(bias)
    return Run(
        model, fbank or FbankSettings(), patches=model.patch_settings(), classes=classes,
        packing=PackSettings(segments=4), made_by={"command": "test"}, **options,
    )  # fmt: skip


def test_a_run_learns_from_a_teacher_and_is_an_ordinary_run(sounds, tmp_path):
    """The teacher says "middle" whatever it hears; with weight 1 nothing else is learned."""
    teacher = teacher_run(fbank=FbankSettings(noise_floor_dbfs=-60.0, mean=-3.0, std=4.0))
    run, history = train_run(
        sounds, tmp_path / "run", patch_sizes=(8, 16), model_options=NANO, teacher=teacher,
        settings=TrainSettings(8, 1e-2, batch_tokens=512),
        distill=DistillSettings(1.0, 1.0, patch_size=(32, 8)), augment=AugmentSettings(3.0),
    )  # fmt: skip
    assert run.fbank.noise_floor_dbfs == -60 and run.fbank.mean != -3.0
    assert history.history["loss"][-1] < 0.3 * history.history["loss"][0]
    assert history.history["val_loss"][-1] > 1.0  # by the labels alone
    assert run.made_by["teacher"]["command"] == "test"
    assert run.made_by["distill"]["patch_size"] == (32, 8)
    assert json.loads((tmp_path / "run" / "history.json").read_text()) == history.history
    check_logs(tmp_path / "run" / "logs", epochs=8)
    loaded = load_run(tmp_path / "run").model
    assert isinstance(loaded, PackedAST) and loaded.pooling_name == "attention"
    for ours, theirs in zip(run.model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def check_logs(folder, *, epochs):
    """TensorBoard has numbers of every epoch, and pictures of the first and the last."""
    shown = {}
    for path in folder.rglob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                shown.setdefault(value.tag, []).append(value.tensor)
    for name in ("row_fill", "clips_per_second", "tokens_per_second", "learning_rate"):
        assert len(shown[f"epoch_{name}"]) == epochs
    fill = [float(tf.make_ndarray(value)) for value in shown["epoch_row_fill"]]
    assert 0.5 < min(fill) <= max(fill) <= 1
    pictures = [values for name, values in shown.items() if name.startswith("clip_")]
    assert len(pictures) == 3  # validation clips
    for values in pictures:
        assert 2 <= len(values) <= epochs and values[0].string_val[2].startswith(b"\x89PNG")
        assert values[0] != values[-1]  # the attention has changed


@pytest.mark.parametrize(
    ("teacher", "how", "message"),
    [
        ({"classes": ("high", "low", "noise")}, {}, "teacher has 3 classes, the data 3: only one "),
        ({"classes": CLASSES[::-1]}, {}, "their order differs"),
        ({"multi_label": True}, {}, "teacher scores each label on its own, the data has one label"),
        (
            {}, {"fbank": FbankSettings(preemphasis=0.9)},
            r"teacher hears with preemphasis=0\.97, the student with 0\.9",
        ),
        ({}, {"frame_shifts_ms": (10, 20)}, "must be within .* teacher, 10; .*not .* at 20"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_one_sentence(sounds, tmp_path, teacher, how, message):
    data = read_data(sounds, FbankSettings())
    with pytest.raises(ValueError, match=message):
        train_run(
            data, tmp_path / "run", patch_sizes=[16], model_options=NANO,
            teacher=teacher_run(**teacher), **how,
        )  # fmt: skip
    assert not (tmp_path / "run.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, r"weight=1\.5 must be a number from 0 to 1"),
        ({"temperature": 0}, r"temperature=0 must be a number from 0\.1 to 100"),
        ({"patch_size": 0}, "patch_size=0 must be one whole number"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DistillSettings(), **options)
