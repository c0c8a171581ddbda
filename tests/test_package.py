"""What the package promises: its names, their type hints, and the folders that a wheel has."""

import ast
import importlib
import inspect
import tomllib
import typing

import pytest
from helpers import ONCE, ROOT

import keras_flexast
import tf_data_pipelines

PUBLIC = {  # renaming one breaks what others wrote
    "keras_flexast": """
        ElasticAST FlexiAST MaskAttentionPooling MaskedSelfAttention PIResizePatchEmbed PackedAST
        PackedBackbone Run compile_packed convert_checkpoint convert_run evaluate_run export_run
        fixed_model load_cascade load_classifier load_run train_run
    """,
    "keras_flexast.hub": """
        ASTAudioConverter ASTBackbone AudioClassifier AudioClassifierPreprocessor PRESETS
    """,
    "tf_data_pipelines": """
        AudioError AugmentSettings Clip FbankSettings PATCH_SIZES PackSettings PatchSettings
        ScannedSource Source TeacherTokens WaveformSource augment_features augment_waveforms
        batch_rows counted decode_audio evaluation_batches extract_features features load_source
        load_waveforms log_mel make_tokens normalize pack packing_for pad_waveforms patch_tokens
        prepare_data read_audio read_data read_waveforms scan_source stream_audio training_batches
        training_clips training_packing
    """,
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_names_are_there_and_explained(module):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name


@ONCE
@pytest.mark.parametrize("package", [keras_flexast, tf_data_pipelines])
def test_type_checkers_are_told_the_names_that_are_loaded_late(package):
    tree = ast.parse((ROOT / package.__name__ / "__init__.py").read_text())
    (block,) = (one for one in tree.body if isinstance(one, ast.If) and "CHECK" in ast.unparse(one))
    told = {alias.name: one.module for one in block.body for alias in one.names}
    assert told == {name: f"{package.__name__}.{room}" for name, room in package._ROOMS.items()}


def is_ours(value):
    return value.__module__.partition(".")[0] in ("keras_flexast", "tf_data_pipelines")


def functions_of(value):
    """(name, function) of a function; of a class its constructor, public methods and properties."""
    if inspect.isfunction(value):
        yield value.__name__, value
    for kind in filter(is_ours, inspect.getmro(value) if inspect.isclass(value) else ()):
        for name, member in vars(kind).items():
            if name.startswith("_") and name != "__init__":
                continue
            member = getattr(member, "__func__", member)  # of a class method
            parts = (member.fget, member.fset) if isinstance(member, property) else (member,)
            yield from (
                (f"{kind.__name__}.{name}", one) for one in parts if inspect.isfunction(one)
            )


def classes_in(hint):
    """Our classes in a type hint."""
    inner = {one for part in typing.get_args(hint) for one in classes_in(part)}
    return {hint} if inspect.isclass(hint) and is_ours(hint) else inner


@pytest.mark.parametrize("module", PUBLIC)
def test_public_functions_have_type_hints(module):
    found = importlib.import_module(module)
    waiting, seen, problems = [getattr(found, name) for name in found.__all__], set(), []
    while waiting:
        functions = dict.fromkeys(functions_of(waiting.pop()))
        for name, function in functions.keys() - seen:
            seen.add((name, function))
            try:
                hints = typing.get_type_hints(function)
            except NameError as error:
                problems.append(f"{name}: {error}")
                continue
            needed = {*inspect.signature(function).parameters, "return"} - {"self", "cls"}
            problems += [f"{name}: {one} has no hint" for one in sorted(needed - hints.keys())]
            waiting += classes_in(hints.get("return"))  # what it gives is public, too
    assert not problems, problems


@ONCE
def test_a_wheel_has_every_folder():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in (keras_flexast, tf_data_pipelines)
        for path in (ROOT / top.__name__).rglob("__init__.py")
    ]
    assert sorted(setup["packages"]) == sorted(folders)
    packages = [top.__name__ for top in (keras_flexast, tf_data_pipelines)]
    assert setup["package-data"] == {name: ["py.typed"] for name in packages}  # PEP 561
    assert all((ROOT / name / "py.typed").is_file() for name in packages)
