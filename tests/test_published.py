"""Published data sets go through the command line: from the download to a prediction."""

import json
import pathlib

import keras
import pytest
from published import MAKERS, write_sounds
from typer.testing import CliRunner

from keras_flexast import cli
from keras_flexast.settings import SIZES

FAST = ("--size", "nano", "--batch-tokens", "256", "--row-length", "256", "--epochs", "5")
RECIPES = {  # whose numbers the training takes, but for those in FAST
    "esc50": "flexiast-esc50",
    "speech-commands": "flexiast-speech-commands",
    "audioset": "flexiast-audioset",
    "vggsound": "flexiast-vggsound",
    "voxceleb1": "elasticast-voxceleb",
    "epic-sounds": "elasticast-epic-sounds",
    "ast": "elasticast-audioset",
}
SIZE_OF_SPLITS = {  # clips for training, validation and test
    "esc50": (6, 2, 2),
    "speech-commands": (2, 2, 2),
    "audioset": (19, 2, 1),
    "vggsound": (19, 2, 1),
    "voxceleb1": (2, 2, 2),
    "epic-sounds": (2, 1, 0),
    "ast": (19, 2, 1),
}


def flexast(*arguments):
    """What `flexast ARGUMENTS` prints."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.exception, result.stderr)
    return result.stdout


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the same on every backend")
@pytest.mark.parametrize("layout", MAKERS)
def test_from_the_download_to_a_prediction(tmp_path, monkeypatch, layout):
    monkeypatch.setitem(SIZES, "nano", (16, 1, 2))
    data, shards, run = tmp_path / "data", tmp_path / "shards", tmp_path / "run"
    root = MAKERS[layout](data)
    write_sounds(data, seconds=2.0 if layout == "epic-sounds" else 0.5)
    sizes = dict(zip(("train", "validation", "test"), SIZE_OF_SPLITS[layout], strict=True))

    flexast("prepare", root, shards)
    facts = json.loads((shards / "dataset.json").read_text())
    found = {split: counted["clips"] for split, counted in facts["splits"].items()}
    assert found == {split: clips for split, clips in sizes.items() if clips}
    assert facts["missing"] == facts["rejected"] == []
    assert facts["multi_label"] == (layout in ("audioset", "ast"))

    summaries = [json.loads(flexast("stats", place, "--json")) for place in (root, shards)]
    for summary in summaries:
        assert summary["clips"] == sum(sizes.values()) and summary["left_out"] == 0
    assert summaries[0]["classes"] == summaries[1]["classes"]
    assert summaries[0]["seconds"] == pytest.approx(summaries[1]["seconds"], abs=1e-3)
    assert summaries[0]["mean"] == pytest.approx(summaries[1]["mean"], abs=0.02)

    flexast("train", shards, "--out", run, "--recipe", RECIPES[layout], *FAST)
    split = "test" if sizes["test"] else "validation"
    scores = []
    for place in (root, shards):
        results = json.loads(
            flexast("evaluate", run, place, "--split", split, "--patch-sizes", "16", "--json")
        )
        assert [result["clips"] for result in results] == [sizes[split]]
        assert results[0]["metric"] == ("mAP" if facts["multi_label"] else "accuracy")
        scores.append(results[0]["value"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)

    sounds = sorted(path for path in pathlib.Path(data).rglob("*") if path.suffix != ".csv")
    sound = next(path for path in sounds if path.suffix in (".wav", ".flac"))
    (heard,) = json.loads(flexast("predict", run, sound, "--json"))
    assert heard["file"] == str(sound)
    assert {found["label"] for found in heard["top"]} <= set(facts["classes"])
