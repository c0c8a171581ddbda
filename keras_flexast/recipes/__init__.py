"""Recipes: all choices of a training in a short Python file that one can read and change.

A recipe assigns to the names of `settings.Recipe`, such as `train = TrainSettings(epochs=5)`. It
may import and define; its other names begin with "_" or are in capitals. The files beside this one
are the built-in ones: `flexiast_audioset.py` is "flexiast-audioset".
"""

import dataclasses
import pathlib
import runpy

from keras_flexast.files import partial_of, resumable
from keras_flexast.settings import FIXED_BY_INIT, WEIGHT_DECAYS, Recipe, TrainSettings

SUFFIX = ".py"
FROM_SCRATCH, FROM_INIT = "small-folder", "small-folder-init"  # what is trained without a recipe
DISTILL_OPTIONS = {  # of `train`: the setting
    "distill_weight": "weight", "temperature": "temperature", "teacher_patch_size": "patch_size",
}  # fmt: skip
MODEL_OPTIONS = ("size", "pooling", "remainder", "position", "resize", "dropout")  # of `train`


def recipe_names():
    """Names of the built-in recipes, sorted."""
    files = pathlib.Path(__file__).parent.glob(f"[!_]*{SUFFIX}")
    return sorted(file.stem.replace("_", "-") for file in files)


def load_recipe(recipe):
    """The Recipe of a built-in name, or of a file that ends in .py, which is run.

    Args:
        recipe: name, such as "flexiast-audioset", or path.

    Returns:
        Recipe; what the file does not name has the default of `Recipe`, not of `flexast train`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is unknown, the file fails, or it has a name or an option that no
            recipe has.
    """
    path, names = pathlib.Path(recipe), recipe_names()
    if path.suffix != SUFFIX:
        if str(recipe) not in names:
            raise ValueError(
                f"recipe={str(recipe)!r} is unknown. Choose one of {', '.join(names)}, or give a "
                f"file such as mine.py."
            )
        path = pathlib.Path(__file__).with_name(str(recipe).replace("-", "_") + SUFFIX)
    if not path.is_file():
        raise FileNotFoundError(f"recipe={str(path)!r} does not exist. Give a Python file.")
    try:
        values = runpy.run_path(str(path))
    except Exception as error:  # whatever the user's file raises
        raise ValueError(f"recipe={str(path)!r} cannot be read: {error}") from error
    given = {name: one for name, one in values.items() if _is_choice(name, one)}
    known = [field.name for field in dataclasses.fields(Recipe)]
    if not given:
        raise ValueError(
            f"recipe={str(path)!r} chooses nothing. Give at least one of {', '.join(known)}, such "
            f"as patch_sizes = (8, 16); names of your own begin with an underscore or are in "
            f"capitals."
        )
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"recipe={str(path)!r} has the name {unknown[0]!r}, which no recipe has. Use "
            f"{', '.join(known)}; names of your own begin with an underscore or are in capitals."
        )
    try:
        return Recipe(**given)
    except ValueError as error:
        raise ValueError(f"recipe={str(path)!r} cannot be used: {error}") from error


def _is_choice(name, value):
    """Whether a name in a recipe is a choice; else it was imported, or is one of its own."""
    own = name.startswith("_") or name.isupper()
    return not own and not callable(value) and type(value).__name__ != "module"


def chosen(typed, *, recipe=None, resumed=None):
    """The Recipe of a training: what was typed, before a recipe's.

    Args:
        typed: dictionary of the options of `flexast train` that were typed, with their values.
        recipe: name or file of a recipe; None for "small-folder", or, with init,
            "small-folder-init".
        resumed: folder of a run whose training goes on: its own choices take the place of the
            recipe's. None for a new training.

    Returns:
        Recipe.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as `load_recipe` and `resumable`.
    """
    if resumed is not None and recipe is None and resumable(resumed):
        from keras_flexast.checkpoints import read_facts

        base = Recipe.from_dict(read_facts(partial_of(resumed))["recipe"])
    else:
        base = load_recipe(recipe or (FROM_INIT if "init" in typed else FROM_SCRATCH))
    fields = [field.name for field in dataclasses.fields(TrainSettings)]
    train = {name: typed[name] for name in fields if name in typed}
    # What was not typed gives way to what was.
    if "batch_tokens" in typed:
        train.setdefault("batch_clips", None)
    mean = min(base.train.average_epochs, train.get("epochs") or base.train.epochs)
    train["average_epochs"] = 1 if {"ema", "patience"} & train.keys() else mean
    if "optimizer" in train and base.train.weight_decay == WEIGHT_DECAYS[base.train.optimizer]:
        train.setdefault("weight_decay", WEIGHT_DECAYS[train["optimizer"]])
    model = {name: typed[name] for name in MODEL_OPTIONS if name in typed}
    distill = {name: typed[option] for option, name in DISTILL_OPTIONS.items() if option in typed}
    if "init" in typed:  # it has these itself
        kept = {name: one for name, one in base.model.items() if name not in FIXED_BY_INIT}
        base = dataclasses.replace(base, model=kept)
    if "patch_sizes" in typed:  # the recipe's weights are those of its own sizes
        patches = {name: one for name, one in base.patches.items() if name != "patch_weights"}
        base = dataclasses.replace(base, patches=patches)
    return base.replaced(
        train=dataclasses.replace(base.train, **train),
        model={**base.model, **model},
        init=str(typed["init"]) if "init" in typed else None,
        teacher=str(typed["teacher"]) if "teacher" in typed else None,
        distill=dataclasses.replace(base.distill, **distill),
        patch_sizes=typed.get("patch_sizes"),
        frame_shifts_ms=typed.get("frame_shifts_ms"),
    )
