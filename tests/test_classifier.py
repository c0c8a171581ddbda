"""One face: a run and what is exported from it give the same scores, in memory and from files."""

import dataclasses
import json
import warnings

import keras
import numpy as np
import pytest
import soundfile
from helpers import ONCE, randomize, run_python

from keras_flexast import ElasticAST, evaluate_run, load_classifier
from keras_flexast.export.model_card import describe_run
from keras_flexast.inference.scoring import fixed_scores
from keras_flexast.runs import Run, load_run, save_run
from tf_data_pipelines import read_data
from tf_data_pipelines.settings import DataWarning, FbankSettings, PackSettings

RATE, SECONDS, CLASSES = 8000, 0.5, ("low", "middle", "high")
ARTIFACTS = ("serving", "mobile/run_16_float32.tflite", "onnx/run_16.onnx")
EXPORT = """
    import sys
    from keras_flexast import export_run
    export_run(sys.argv[1], sys.argv[2], patch_sizes=(16,), precisions=("float32",),
               formats=("serving", "mobile", "onnx"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run at 8 kHz with random weights, what is exported from it, and sounds."""
    folder = tmp_path_factory.mktemp("classifier")
    keras.utils.set_random_seed(0)
    fbank = FbankSettings(sample_rate=RATE, mel_bins=64, mean=-6.0, std=3.0)
    model = ElasticAST(3, "nano", depth=1, grid=(4, 64), segments=4)
    run = Run(
        randomize(model, scale=0.1), fbank, patches=model.patch_settings(),
        packing=PackSettings(2, 128, 4), classes=CLASSES, clip_seconds=SECONDS,
    )  # fmt: skip
    (folder / "run").mkdir()
    save_run(run, folder / "run")
    pytest.importorskip("tf2onnx")
    run_python(EXPORT, folder / "run", folder / "run.export" / "run", backend="tensorflow")
    (folder / "sounds").mkdir()
    for number, waveform in enumerate(waveforms()):
        path = folder / "sounds" / f"[{number}].wav"
        soundfile.write(path, waveform, RATE, subtype="FLOAT")
    return folder


def waveforms():
    """Six clips of SECONDS, as a fixed artifact hears them."""
    rng = np.random.default_rng(0)
    scales = 10 ** rng.uniform(-2, -0.5, (6, 1))
    return (rng.normal(size=(6, round(SECONDS * RATE))) * scales).astype("float32")


@pytest.mark.parametrize("name", ["run", *ARTIFACTS])
def test_the_same_scores_from_everything(folder, name):
    path = folder / "run" if name == "run" else folder / "run.export" / "run" / name
    size = 16 if name in ("run", "serving") else None
    classifier = load_classifier(path, patch_size=size)
    expected = fixed_scores(load_run(folder / "run"), 16, waveforms())
    assert (classifier.classes, classifier.sample_rate) == (CLASSES, RATE)
    assert (classifier.patch_size, classifier.multi_label) == ("16", False)
    assert np.ptp(expected, axis=0).max() > 0.005  # the clips do differ
    scores = classifier.predict(list(waveforms()))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)

    files = sorted((folder / "sounds").iterdir())
    found = classifier.predict_files([*files[:3], folder / "no.wav", *files[3:]])
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=1e-4)
    assert found.paths == [str(file) for file in files]
    ((path, reason),) = found.rejected
    assert path.endswith("no.wav") and "does not exist" in reason

    line = classifier.timeline(files[0])
    np.testing.assert_allclose(line.scores, classifier.predict([waveforms()[0]]), atol=1e-4)


def test_the_same_embeddings_from_a_run_and_its_saved_model(folder):
    files = sorted((folder / "sounds").iterdir())
    run = load_classifier(folder / "run", 16).embed_files(files)
    served = load_classifier(folder / "run.export" / "run" / "serving").embed_files(files)
    assert run.embeddings.shape == (6, 96) and run.paths == served.paths
    np.testing.assert_allclose(served.embeddings, run.embeddings, rtol=0, atol=1e-4)
    for name in ARTIFACTS[1:]:
        with pytest.raises(ValueError, match=r"has no embeddings"):
            load_classifier(folder / "run.export" / "run" / name).embed_files(files)


@ONCE
@pytest.mark.parametrize("name", ARTIFACTS[1:])
def test_files_for_other_runtimes_need_no_tensorflow(folder, name):
    pytest.importorskip("ai_edge_litert")
    code = """
        import json, pathlib, sys
        from keras_flexast import load_classifier
        files = sorted(map(str, pathlib.Path(sys.argv[2]).iterdir()))
        print(json.dumps(load_classifier(sys.argv[1]).predict_files(files).scores.tolist()))
    """
    artifact = folder / "run.export" / "run" / name
    out = run_python(code, artifact, folder / "sounds", backend="jax", blocked=["tensorflow"])
    expected = fixed_scores(load_run(folder / "run"), 16, waveforms())
    np.testing.assert_allclose(json.loads(out.splitlines()[-1]), expected, rtol=0, atol=1e-4)


def test_a_clips_scores_do_not_depend_on_its_company(folder):
    classifier = load_classifier(folder / "run", (16, 24), frame_shift_ms=20.0)
    clips = [np.concatenate([a, a[: 500 * k]]) for k, a in enumerate(waveforms())]
    together = classifier.predict(clips)
    alone = [classifier.predict([clip])[0] for clip in clips]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_many_files_are_held_in_groups(folder, monkeypatch):
    files = sorted((folder / "sounds").iterdir())
    expected = load_classifier(folder / "run").predict_files(files).scores
    monkeypatch.setattr("keras_flexast.inference.classifier.GROUP_SECONDS", 0.9)
    found = load_classifier(folder / "run").predict_files(files)
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=1e-5)


def test_a_run_in_memory_is_left_as_it_was(folder):
    run = load_run(folder / "run")
    before = run.model.get_weights(), run.model.get_config(), dict(vars(run.model))
    load_classifier(run, 24).predict(list(waveforms()))
    load_classifier(run).embed_files(sorted((folder / "sounds").iterdir()))
    for ours, theirs in zip(run.model.get_weights(), before[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert run.model.get_config() == before[1]
    assert {k: v for k, v in vars(run.model).items() if v is not before[2].get(k)} == {}


def test_nothing_usable_is_no_crash(folder):
    found = load_classifier(folder / "run").predict_files([folder / "no.wav"])
    assert found.scores.shape == (0, 3) and not found.paths and len(found.rejected) == 1


def test_a_converted_checkpoint_warns_of_what_it_does_not_hear(folder):
    run = load_run(folder / "run")
    short = dataclasses.replace(run, fbank=dataclasses.replace(run.fbank, clip_ms=300.0))
    files = sorted((folder / "sounds").iterdir())
    with pytest.warns(DataWarning, match=r"6 of 6 clips are longer than the 0\.3"):
        load_classifier(short).predict_files(files)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        heard = load_classifier(short, full_length=True).predict_files(files)
    expected = load_classifier(run).predict_files(files)
    np.testing.assert_allclose(heard.scores, expected.scores, atol=1e-5)


def test_wrong_uses_are_explained(folder, tmp_path):
    sound = waveforms()[0]
    wrong = {
        r"waveforms\[1\] has 199 samples; at least 200": [sound, sound[:199]],
        r"waveforms\[0\] has dtype int16 and shape": [(sound * 2**15).astype("int16")],
        r"waveforms\[0\] has dtype float32 and shape \(1, 4000\)": [sound[None]],
        r"waveforms\[1\] has NaN": [sound, np.where(sound > 0.1, np.nan, sound)],
        r"waveforms\[0\] has samples beyond 16": [1e4 * sound],
        r"waveforms\[0\] is silent": [0 * sound],
        "waveforms is empty": [],
        "waveforms is one array; give a list": sound,
    }
    for name in ("run", *(f"run.export/run/{one}" for one in ARTIFACTS)):
        classifier = load_classifier(folder / name)
        for message, clips in wrong.items():
            with pytest.raises(ValueError, match=message):
                classifier.predict(clips)
    with pytest.raises(ValueError, match=r"several exported artifacts; give one .*serving"):
        load_classifier(folder / "run.export" / "run")
    tflite = folder / "run.export" / "run" / ARTIFACTS[1]
    for options in ({"frame_shift_ms": 20.0}, {"resize": "pi"}, {"full_length": True}):
        with pytest.raises(ValueError, match="cannot be changed in an exported artifact"):
            load_classifier(tflite, **options)
    with pytest.raises(ValueError, match="has no patch size 8; it has 16"):
        load_classifier(tflite, patch_size=8)
    with pytest.raises(FileNotFoundError, match="is not a run"):
        load_classifier(tmp_path)


@pytest.mark.parametrize("name", ["run", *(f"run.export/run/{one}" for one in ARTIFACTS)])
def test_a_timeline_goes_on_over_silence(folder, tmp_path, name):
    gap = np.zeros(3 * RATE, "float32")
    sound = np.concatenate([*waveforms(), gap, *waveforms()])
    soundfile.write(tmp_path / "gap.wav", sound, RATE, subtype="FLOAT")
    line = load_classifier(folder / name).timeline(tmp_path / "gap.wav")
    assert line.ends[-1] == 9 and np.isfinite(line.scores).all()


def test_a_card_tells_the_frame_shift_of_the_export(folder):
    run = load_run(folder / "run")
    assert describe_run(run, "x", 20.0)["frame_shift_ms"] == 20
    assert describe_run(run, "x")["frame_shift_ms"] == 10


def test_evaluation_takes_the_split_and_refuses_other_classes(folder, tmp_path):
    for number, waveform in enumerate(waveforms()):
        path = tmp_path / ("train", "test")[number % 2] / CLASSES[number % 3] / f"{number}.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, waveform, RATE)
    data = read_data(tmp_path, load_run(folder / "run").fbank, classes=CLASSES)
    run = folder / "run"
    ((whole,), (part,)) = (
        evaluate_run(run, data, split=split, patch_sizes=[16]) for split in ("all", "test")
    )
    (again,) = evaluate_run(run, tmp_path, patch_sizes=[16])
    assert (whole["clips"], part["clips"]) == (6, 3) and again == part
    other = read_data(tmp_path, load_run(run).fbank)
    with pytest.raises(ValueError, match=r"data has the classes 'high', 'low', 'middle', expected"):
        evaluate_run(run, other)


def test_the_embeddings_are_saved_whole(folder, tmp_path):
    files = sorted((folder / "sounds").iterdir())
    found = load_classifier(folder / "run").embed_files(files)
    found.save(tmp_path / "vectors.npz")
    content = np.load(tmp_path / "vectors.npz")
    np.testing.assert_array_equal(content["embeddings"], found.embeddings)
    assert content["files"].tolist() == found.paths
    assert json.loads((folder / "run" / "settings.json").read_text())["made_by"] == {}
