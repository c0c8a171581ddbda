"""Recipes: what a file says, what was typed, and what is wrong with a file."""

import dataclasses
import inspect

import pytest
from helpers import ONCE

from keras_flexast.recipes import chosen, load_recipe, recipe_names
from keras_flexast.settings import Recipe, TrainSettings
from keras_flexast.training import train_run
from tf_data_pipelines.settings import AugmentSettings

pytestmark = ONCE
MINE = """
import math
from keras_flexast.settings import TrainSettings
_doubled = 2 * 3
train = TrainSettings(epochs=_doubled, betas=(0.9, 0.98))
patch_sizes = (8, (16, 24))
model = {"size": "nano", "dropout": 0.1}
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@pytest.mark.parametrize("name", recipe_names())
def test_built_in_recipes_can_be_read_and_written(name):
    recipe = load_recipe(name)
    assert recipe != Recipe() and Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_recipe_gives_train_run_all_that_it_has(mine):
    recipe = load_recipe(mine)
    arguments = recipe.arguments()
    assert set(arguments) <= set(inspect.signature(train_run).parameters)
    assert arguments.pop("settings") == recipe.train
    assert arguments.pop("model_options") == recipe.model
    assert arguments.pop("patch_options") == recipe.patches
    assert arguments == {name: getattr(recipe, name) for name in arguments}
    assert len(arguments) == len(dataclasses.fields(Recipe)) - 3


def test_the_papers_numbers_are_in_their_recipes():
    train = load_recipe("flexiast-audioset").train
    assert (train.learning_rate, train.epochs, train.loss) == (1e-5, 5, "binary")
    train = load_recipe("elasticast-voxceleb").train
    assert (train.decay_start, train.decay_every, train.decay_factor) == (5, 1, 0.75)
    for name in recipe_names():  # one size for a batch
        recipe = load_recipe(name)
        drawn = recipe.patches.get("clips_per_draw", 1)
        assert drawn == (recipe.train.batch_clips if name.startswith("flexiast") else 1)
    augment = load_recipe("flexiast-esc50").augment
    assert augment == AugmentSettings(freq_mask=24, time_mask_ms=960.0)


def test_what_was_typed_wins_over_the_recipe_and_this_over_the_defaults(mine):
    recipe = chosen({"epochs": 9, "size": "tiny", "resume": True}, recipe=mine)
    assert recipe.train == TrainSettings(9, betas=(0.9, 0.98))
    assert recipe.model == {"size": "tiny", "dropout": 0.1}
    assert recipe.patch_sizes == ((8, 8), (16, 24))
    mine.write_text(MINE + "patches = {'patch_weights': [1, 2], 'clips_per_draw': 4}\n")
    assert chosen({}, recipe=mine).patches == {"patch_weights": (1, 2), "clips_per_draw": 4}
    typed = chosen({"patch_sizes": (8, 16, 32)}, recipe=mine)
    assert typed.patches == {"clips_per_draw": 4}  # the weights are those of other sizes
    assert chosen({}, recipe=mine) == load_recipe(mine)
    assert chosen({}) == load_recipe("small-folder")
    assert chosen({"init": "run"}).train == load_recipe("small-folder-init").train
    started = chosen({"init": "run"}, recipe=mine)  # whose weights have their own size
    assert started.model == {"dropout": 0.1} and started.init == "run"


def test_a_batch_of_clips_gives_way_to_one_of_tokens():
    train = chosen({"batch_tokens": 512}, recipe="flexiast-esc50").train
    assert (train.batch_tokens, train.batch_clips) == (512, None)
    assert chosen({"batch_clips": 5}, recipe="flexiast-esc50").train.batch_clips == 5


def test_another_optimizer_has_its_own_weight_decay(mine):
    assert chosen({"optimizer": "adam"}).train.weight_decay == 5e-7
    assert chosen({"optimizer": "adam", "weight_decay": 0.1}).train.weight_decay == 0.1
    assert chosen({"optimizer": "muon"}).train == chosen({}).train
    assert chosen({"optimizer": "adamw"}, recipe="flexiast-esc50").train.weight_decay == 0.05
    mine.write_text(MINE.replace("epochs=_doubled", "weight_decay=0.0"))
    assert chosen({"optimizer": "adamw"}, recipe=mine).train.weight_decay == 0  # its own


def test_an_average_over_epochs_gives_way_to_what_was_typed():
    for typed, epochs in (({"epochs": 3}, 3), ({"ema": 0.9}, 1), ({"patience": 2}, 1), ({}, 5)):
        assert chosen(typed, recipe="flexiast-audioset").train.average_epochs == epochs


@pytest.mark.parametrize(
    "text, message",
    [
        ("patch_size = 16", r"has the name 'patch_size', which no recipe has\. Use train, augment"),
        ("train = {'epochs': 3}", r"train=\{'epochs': 3\} must be of the kind TrainSettings"),
        (MINE + "train = TrainSettings(lr=1)", "unexpected keyword argument 'lr'"),
        (MINE + "train = TrainSettings(epochs=0)", "epochs=0 must be a positive"),
        ("patch_sizes = (0,)", "patch_sizes=0 must be one whole number"),
        ("patches = {'grid': 3}", "patches has no setting grid; it has patch_weights, clips_per"),
        ("patches = [1]", r"patches=\[1\] must be of the kind dict"),
        ("train = (", "was never closed"),
        ("RECIPE = 3", "chooses nothing. Give at least one of train, augment, .*patch_sizes = "),
    ],
)
def test_a_wrong_recipe_is_one_error_that_names_the_file(mine, text, message):
    mine.write_text(text)
    with pytest.raises(ValueError, match=rf"^recipe='.*mine\.py' .*{message}"):
        load_recipe(mine)


def test_the_length_of_a_recipe_is_kept_beside_a_run_to_start_from(mine):
    text = "from tf_data_pipelines.settings import FbankSettings\n"
    mine.write_text(text + "fbank = FbankSettings(clip_ms=500)\n")
    assert chosen({"init": "run"}, recipe=mine).fbank.clip_ms == 500
    assert chosen({"init": "run"}).fbank is None


def test_a_recipe_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"recipe='ast' is unknown\. Choose one of ast-"):
        load_recipe("ast")
    with pytest.raises(FileNotFoundError, match=r"recipe='.*none\.py' does not exist"):
        load_recipe(tmp_path / "none.py")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frozen": True, "lora_rank": 4}, "lora_rank=4 trains the encoder, which frozen keeps"),
        ({"average_epochs": 3, "ema": 0.9}, "does not go with ema=0.9"),
        ({"average_epochs": 3, "patience": 2}, "does not go with patience=2"),
        ({"average_epochs": 30}, "average_epochs=30 must be at most epochs=20"),
        ({"betas": (0.9,)}, "must be two numbers"),
        ({"betas": (0.9, 1.0)}, r"betas=1\.0 must be a number from 0 to 0\.999999"),
        ({"schedule": "linear"}, "schedule='linear' is unknown"),
        ({"class_weights": "inverse"}, "class_weights='inverse' is unknown"),
        ({"ema": 1.0}, r"ema=1\.0 must be a number"),
        ({"layer_decay": 0}, "layer_decay=0 must be a number from 0.01 to 1"),
        ({"label_smoothing": 1}, "label_smoothing=1 must be a number from 0 to 0.9"),
        ({"lora_rank": 0}, "lora_rank=0 must be a positive"),
        ({"warmup_steps": 2**31}, "warmup_steps=2147483648 must be a positive number up to 2,147"),
        ({"batch_clips": 0}, "batch_clips=0 must be a positive"),
        ({"epochs": 2**31 - 1}, "must be a positive number up to 1,000,000"),
        ({"segments": 10**6}, "segments=1000000 must be a positive number up to 8,192"),
        ({"clip_norm": float("inf")}, "clip_norm=inf must be a positive"),
    ],
)
def test_settings_that_exclude_each_other_or_are_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**options)


def test_a_run_hears_its_clips_as_they_are_evaluated():
    with pytest.raises(ValueError, match=r"pool_frames=\(2, 4\) must have 1 among them"):
        Recipe(patches={"pool_frames": (2, 4)})
