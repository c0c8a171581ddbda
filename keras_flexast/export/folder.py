"""A run as a folder to deploy, with a model card in which every artifact is measured on itself.

OUT/serving/      for TensorFlow Serving: <version>/, models.config, batching.config
OUT/mobile/       OUT_16_int8.tflite and so on; OUT_multi_float32.tflite holds every patch size
OUT/onnx/         OUT_16.onnx and so on
OUT/mediapipe/    OUT_mediapipe_16_int8.tflite and so on, which take no length
OUT/README.md     model card, with card.json and points.png; only where test clips are given
"""

import builtins
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable

import keras
from rich.console import Console
from rich.progress import track

from keras_flexast.evaluation import evaluate_run, spread
from keras_flexast.export.common import FixedOptions, at_length
from keras_flexast.export.model_card import (
    CARD,
    describe_run,
    is_own_card,
    operating_points,
    write_card,
)
from keras_flexast.export.onnx import write_onnx
from keras_flexast.export.serving import (
    check_name,
    nearest_size,
    next_version,
    versions,
    write_serving,
)
from keras_flexast.export.serving_files import labeled_versions, updated_config
from keras_flexast.export.tflite import write_multi_tflite, write_tflite
from keras_flexast.files import EXPORT, atomic_folder, move_in, refuse_overwrite
from keras_flexast.inference.scoring import check_patch_fits
from keras_flexast.runs import configured_run
from keras_flexast.settings import (
    EXPORT_PATCH_SIZES,
    FORMATS,
    INPUTS,
    KEPT_VERSIONS,
    LONGEST_CLIP,
    MAX_SERVED_SECONDS,
    PRECISIONS,
)
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.resize import token_count
from tf_data_pipelines.settings import (
    MAX_ROW_LENGTH,
    DataWarning,
    check_choice,
    check_positive,
    patch_name,
    patch_pair,
)

CALIBRATION_CLIPS = 100
OWN_ENDING = (  # of an artifact's name, after the model's
    rf"(_mediapipe)?_(\d+(x\d+)?|multi)((_({'|'.join(PRECISIONS)}))?\.(tflite|onnx)|\.labels\.txt)"
)


def export_run(
    run: PathLike,
    out: PathLike | None = None,
    *,
    patch_sizes: Iterable[PatchSize] = EXPORT_PATCH_SIZES,
    formats: Iterable[str] = ("serving", "mobile"),
    precisions: Iterable[str] | None = None,
    data: PathLike | None = None,
    seconds: float | None = None,
    frame_shift_ms: float | None = None,
    resize: str | None = None,
    input: str = "waveform",
    max_seconds: float = MAX_SERVED_SECONDS,
    overwrite: bool = False,
    keep: int = KEPT_VERSIONS,
    command: str | None = None,
) -> list[pathlib.Path]:
    """Export a run as a folder to deploy, with progress bars.

    On another backend than TensorFlow, a TensorFlow process of its own does the work.

    Args:
        run: folder of the run.
        out: folder that appears whole or not at all; its name becomes the name of the model.
            None for saved_models/NAME OF THE RUN.
        patch_sizes: list of ints or (frequency, time) pairs.
        formats: list of "serving" (one SavedModel with a signature for each patch size),
            "mobile" (a `.tflite` for each patch size and precision, and one of all patch
            sizes), "onnx" (an `.onnx` for each patch size) and "mediapipe" (`.tflite` files
            that MediaPipe takes: they are not told the length of a clip).
        precisions: list of precisions of the `.tflite` files, see `FixedOptions`. None for all
            of them; int8 is left out where there is no data.
        data: folder or manifest, as for training. Its training clips give int8 its scales, and
            its test clips measure every artifact for the model card, and the run itself: the
            server's default is the patch size of best accuracy. None for no model card, and
            for the base patch, or the nearest size to it, as the default.
        seconds: length of every clip of mobile and onnx; None for the length of the longest
            training clip, or for the length to which a converted checkpoint brings its clips.
        frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.
        resize: method of the patch resize, "pi" or "bilinear"; None for the run's own.
        input: input of mobile and onnx, "waveform" or "features" (normalized log-mel).
        max_seconds: length of the longest clip that serving accepts.
        overwrite: whether to update an existing export, whole: all formats that it has, and
            its model card. Nothing is touched until everything is written; then each new file
            replaces the old one, other patch sizes and precisions of the old export go, and the
            server gets a new version beside the old ones, whole.
        keep: number of versions in OUT/serving that stay, the newest; a version that
            models.config named until now stays, too.
        command: text that the model card names as the command that made it; None for this
            call.

    Returns:
        list of pathlib.Path: the artifacts.

    Raises:
        FileNotFoundError: the run or the data does not exist.
        FileExistsError: the folder `out` exists; or it has a format or a model card that this
            update would leave as it was, or a model card that was edited.
        ValueError: a format, precision or input is unknown, int8 has no data, or a patch is
            larger than the clip's spectrogram.
        RuntimeError: the other process failed.

    Example:
        export_run("digits", patch_sizes=[16, 32], precisions=["dynamic"], data="sounds")
    """
    arguments = _plain(locals())
    if not isinstance(run, (str, os.PathLike)):
        raise ValueError(
            f"run is a {type(run).__name__}; expected the folder of a run. `save_run` writes one."
        )
    precisions = arguments["precisions"]
    if precisions is None:
        precisions = [name for name in PRECISIONS if data or name != "int8"]
    _check(arguments, precisions)
    sizes = {patch_name(patch_pair(size)): patch_pair(size) for size in arguments["patch_sizes"]}
    out = pathlib.Path(out or pathlib.Path("saved_models", pathlib.Path(run).resolve().name))
    if "serving" in arguments["formats"]:
        check_name(out.name)
    inputs = [run] if data is None else [run, data]
    refuse_overwrite(out, overwrite, kind=EXPORT, inputs=inputs)
    _refuse_parts(out, arguments["formats"], data)
    version = next_version(out / "serving")
    if "serving" in arguments["formats"]:
        with warnings.catch_warnings(action="ignore"):  # they come again
            updated_config(out / "serving", out.name, version)  # for its errors, before the work
    arguments |= {
        "patch_sizes": list(sizes.values()),
        "precisions": precisions,
        "command": command or _call_text(arguments),
        "name": out.name,
        "version": version,
    }
    update = functools.partial(_update, keep=keep)
    with atomic_folder(out, overwrite, kind=EXPORT, inputs=inputs, update=update) as building:
        if keras.backend.backend() == "tensorflow":
            written = build_export(building, arguments)
        else:
            written = _in_tensorflow_process(building, arguments)
    return [out / path for path in written]


def build_export(folder, arguments):
    """Write the parts of an export into an empty folder; Keras runs on TensorFlow.

    Args:
        folder: pathlib.Path of the folder.
        arguments: those of `export_run`, checked, with the `name` of the model and the
            `version` for its server.

    Returns:
        list of the artifacts' paths in the folder, as str.
    """
    sizes = {patch_name(pair): pair for pair in map(tuple, arguments["patch_sizes"])}
    shift = arguments["frame_shift_ms"]
    plan = _Plan(
        arguments["name"],
        sizes,
        formats=arguments["formats"],
        precisions=arguments["precisions"],
        options=FixedOptions(arguments["seconds"], shift, input=arguments["input"]),
        max_seconds=arguments["max_seconds"],
        version=arguments["version"],
    )
    run, data = configured_run(arguments["run"], resize=arguments["resize"]), arguments["data"]
    _check_fixed_sizes(run, plan)
    train, validation, test = _splits(data, run, plan) if data else (None, None, None)
    if "serving" in plan.formats:
        plan = dataclasses.replace(plan, default=_default_size(run, test, plan))
    written = [
        write(run, path, **keywords)
        for write, path, keywords in track(_writers(run, folder, plan, train), "Exporting")
    ]
    if test:
        points = operating_points(
            written, test, held_out=validation, run=run, frame_shift_ms=shift, progress=True
        )
        facts = {
            "data": f"the test split of {pathlib.Path(data).name}",
            "command": arguments["command"],
            "default_patch_size": plan.default and patch_name(plan.default),
        }
        write_card(folder, points, {**describe_run(run, plan.name, shift), **facts})
    return [str(path.absolute().relative_to(folder.absolute())) for path in written]


def _refuse_parts(out, formats, data):
    """Raise FileExistsError where an update would leave old parts, or replace what is no card."""
    older = [name for name in FORMATS if name not in formats and _own_files(out, name)]
    if older:
        together = ",".join(name for name in FORMATS if name in {*older, *formats})
        raise FileExistsError(
            f"{out} also holds {' and '.join(older)}, which would stay as they are beside what is "
            f"new. Export all of it (--formats {together}), or choose another place (--out)."
        )
    card = _card_in(out)
    if not card or (data is None and "card.json" not in card):
        return
    _refuse_edited(out)
    if data is None:
        raise FileExistsError(
            f"{out} has a model card, whose numbers would be of an older export. Give the test "
            f"clips (--data), choose another place (--out), or remove {', '.join(card)}."
        )


def _card_in(out):
    """Names of a model card's files that are in a folder, whoever wrote them."""
    return [name for name in CARD if os.path.lexists(out / name)]


def _refuse_edited(out):
    """Raise FileExistsError where files have the names of a model card but are not ours alone."""
    if _card_in(out) and not is_own_card(out):
        raise FileExistsError(
            f"{out} holds {', '.join(_card_in(out))}, not as this program writes a model card. "
            f"Move away what you want to keep, or choose another place (--out)."
        )


def _own_files(out, format):
    """Paths in an export that `export_run` wrote in one of its formats."""
    if format == "serving":
        return [out / format / str(version) for version in versions(out / format)]
    own = re.compile(re.escape(out.resolve().name) + OWN_ENDING)
    return [p for p in (out / format).glob("*") if p.is_file() and own.fullmatch(p.name)]


def _update(new, out, keep):
    """Move the new parts of an export into the older export `out`, which a server may poll.

    A version appears whole, and the configuration that names it after it. What the new parts
    do not replace goes last: files of the older export, and versions that no server needs.
    """
    named, served = set(), versions(new / "serving")
    if served:  # what the user wrote into the configuration stays
        named = labeled_versions(out / "serving", out.name)
        config = updated_config(out / "serving", out.name, max(served))
        (new / "serving" / "models.config").write_text(config, encoding="utf-8")
        if (out / "serving" / "batching.config").exists():
            (new / "serving" / "batching.config").unlink(missing_ok=True)
    parts = {path.relative_to(new) for path in new.rglob("*")}
    for part in parts:
        if (
            part.parent == pathlib.Path("serving")
            and part.name.isdecimal()
            and (out / part).exists()
        ):
            raise FileExistsError(
                f"{out / part} came while this export ran: another one writes into {out}. Wait "
                f"for it, then export again."
            )
    if any(pathlib.Path(name) in parts for name in CARD):
        _refuse_edited(out)  # since the work began
    phones = {part.parts[0] for part in parts}.difference(("serving", *CARD))
    older = [path for name in phones for path in _own_files(out, name)]
    older += [out / name for name in CARD if is_own_card(out)]
    move_in(new, out)
    for path in older:
        if path.relative_to(out) not in parts:
            path.unlink(missing_ok=True)
    older = versions(out / "serving")[:-keep] if served else []
    for version in older:
        if version not in named:  # a server may hold it until it reads the configuration
            os.replace(out / "serving" / str(version), new / str(version))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is exported: under which name, at which {name: patch size}, in which formats.

    `default` is the patch size that the server takes where a request names none.
    """

    name: str
    sizes: dict
    _: dataclasses.KW_ONLY
    formats: list
    precisions: list
    options: FixedOptions
    max_seconds: float
    version: int
    default: tuple | None = None


def _writers(run, folder, plan, train):
    """What writes each artifact: list of (function, path in the folder, keyword arguments)."""
    writers, options, sizes = [], plan.options, plan.sizes
    if "serving" in plan.formats:
        keywords = {
            "patch_sizes": list(sizes.values()),
            "default": plan.default,
            "version": plan.version,
            "max_seconds": plan.max_seconds,
            "frame_shift_ms": options.frame_shift_ms,
            "name": plan.name,
        }
        writers.append((write_serving, folder / "serving", keywords))
    phones = [kind for kind in ("mobile", "mediapipe") if kind in plan.formats]
    if phones and "int8" in plan.precisions:
        waveforms = calibration_waveforms(run, train, options.seconds)
        options = dataclasses.replace(options, calibration=waveforms)
    for kind in phones:
        writers += _tflite_writers(folder / kind, kind, plan, options)
    if "onnx" in plan.formats:
        (folder / "onnx").mkdir()
        for label, size in sizes.items():
            path = folder / "onnx" / f"{plan.name}_{label}.onnx"
            writers.append((write_onnx, path, {"patch_size": size, "options": plan.options}))
    return writers


def _tflite_writers(folder, kind, plan, options):
    """What writes the `.tflite` files of "mobile" or "mediapipe" into a new folder."""
    folder.mkdir()
    writers, name = [], plan.name if kind == "mobile" else f"{plan.name}_{kind}"
    for precision in plan.precisions:
        chosen = dataclasses.replace(options, precision=precision, with_length=kind == "mobile")
        for label, size in plan.sizes.items():
            path = folder / f"{name}_{label}_{precision}.tflite"
            writers.append((write_tflite, path, {"patch_size": size, "options": chosen}))
        if kind == "mobile" and precision == plan.precisions[0] and len(plan.sizes) > 1:
            path = folder / f"{name}_multi_{precision}.tflite"
            keywords = {"patch_sizes": list(plan.sizes.values()), "options": chosen}
            writers.append((write_multi_tflite, path, keywords))
    return writers


def calibration_waveforms(run, data, seconds=None):
    """Clips on which int8 measures its scales, taken evenly from all of the data.

    Args:
        run: Run.
        data: ScannedSource of training clips.
        seconds: length of every waveform: longer clips are cut, shorter ones end in zeros.
            None for the run's own.

    Returns:
        float32 (clips, samples) at the run's sample rate.
    """
    from tf_data_pipelines.audio import pad_waveforms

    sample_rate = run.fbank.sample_rate
    samples = round((seconds or run.clip_seconds) * sample_rate)
    clips = spread(data, CALIBRATION_CLIPS).source.clips
    return pad_waveforms([clip.read(sample_rate)[:samples] for clip in clips], samples)


def _default_size(run, test, plan):
    """The patch size of best accuracy on test clips; without them the nearest to the base patch.

    Of several sizes that are as accurate, the one of fewest tokens.
    """
    pairs = list(plan.sizes.values())
    if not test or len(pairs) == 1:
        return nearest_size(pairs, run.model.backbone.base_patch)
    shift = plan.options.frame_shift_ms
    results = evaluate_run(run, test, patch_sizes=pairs, frame_shift_ms=shift, progress=True)
    return max(results, key=lambda one: (one["value"], -one["tokens"]))["patch_size"]


def _check_fixed_sizes(run, plan):
    """Raise ValueError for a patch too large or a clip too long, before anything is written."""
    if not {"mobile", "mediapipe", "onnx"}.isdisjoint(plan.formats):
        run, seconds = at_length(run, plan.options.seconds)
        fbank, _ = run.front_end(plan.options.frame_shift_ms)
        for pair in plan.sizes.values():
            frames = check_patch_fits(fbank, pair, seconds)
            tokens = int(token_count(frames, fbank.mel_bins, pair, run.patches))
            if tokens > MAX_ROW_LENGTH:
                raise ValueError(
                    f"seconds={seconds:g} makes {tokens:,} tokens at patch {patch_name(pair)}, "
                    f"more than {MAX_ROW_LENGTH:,}. Choose fewer seconds, or a larger patch."
                )


def _splits(data, run, plan):
    """ScannedSource of training, validation and test clips; None where none are needed.

    What is longer than the exported model takes at one of its patch sizes is left out, so that
    the run and all artifacts are measured on the same clips.
    """
    from tf_data_pipelines.lengths import overlong_reason
    from tf_data_pipelines.sources import read_data

    patches = run.patches_at(plan.sizes.values(), plan.options.frame_shift_ms)

    def refuse(name, seconds):
        if "serving" in plan.formats and seconds > plan.max_seconds:
            return f"{name} ({seconds:.1f} s) is longer than max_seconds={plan.max_seconds:g}."
        return overlong_reason(name, seconds, fbank=run.fbank, patches=patches)

    found = read_data(
        data, run.fbank, classes=run.classes, shares=run.shares, refuse=refuse, progress=True
    )
    splits = {clip.split for clip in found.source.clips}
    if "test" not in splits:
        warnings.warn(
            f"{data} has no test clips, so nothing is measured and there is no model card.",
            DataWarning,
            stacklevel=2,
        )
    train = found.split("train") if "train" in splits or "int8" in plan.precisions else None
    held_out = (found.split(name) if name in splits else None for name in ("validation", "test"))
    return train, *held_out


def _check(arguments, precisions):
    """Raise ValueError for choices of `export_run` that are unknown or do not fit together."""
    chosen = {"formats": arguments["formats"], "precisions": precisions}
    for name, values in {**chosen, "patch_sizes": arguments["patch_sizes"]}.items():
        if not values:
            raise ValueError(f"{name} is empty; give at least one.")
    for name, values, known in (
        ("formats", chosen["formats"], FORMATS),
        ("precisions", chosen["precisions"], PRECISIONS),
        ("input", [arguments["input"]], INPUTS),
    ):
        for value in values:
            check_choice(name, value, known)
    check_positive("keep", arguments["keep"], int)
    if arguments["seconds"] is not None:
        check_positive("seconds", arguments["seconds"], most=LONGEST_CLIP)
    data, phones = arguments["data"], {"mobile", "mediapipe"}.intersection(chosen["formats"])
    if "int8" in precisions and phones and data is None:
        raise ValueError(
            "precisions: int8 measures its scales on training clips. Give data (--data) that has "
            "them, or leave int8 out; dynamic needs none."
        )
    if data and arguments["input"] == "features":
        raise ValueError("input='features' cannot be measured on sound files; leave data out.")


def _plain(arguments):
    """Arguments as JSON can hold them: paths as text, tuples and views as lists."""
    plain = {}
    for name, value in arguments.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, Iterable) and not isinstance(value, str):
            value = list(value)
        plain[name] = value
    return plain


def _call_text(arguments):
    """The call of `export_run` as text, without arguments that have their default."""
    parameters = inspect.signature(export_run).parameters
    defaults = _plain({name: one.default for name, one in parameters.items()})
    texts = [repr(arguments["run"])]
    for name, value in arguments.items():
        if name != "run" and value != defaults[name]:
            texts.append(f"{name}={value!r}")
    return f"export_run({', '.join(texts)})"


def _in_tensorflow_process(folder, arguments):
    """`build_export` where Keras runs on TensorFlow; its progress bars are shown here.

    After an interruption the process ends at once. What it has written by then lies in `folder`
    and in a temporary folder, which this process removes.
    """
    code = """
import json, pathlib, sys, warnings
from keras_flexast.export.folder import build_export
from tf_data_pipelines.settings import DataWarning
told = []
show = warnings.showwarning
def tell(message, category, *place):
    if issubclass(category, DataWarning):
        told.append(str(message))
    else:
        show(message, category, *place)
warnings.showwarning = tell
try:
    answer = {"paths": build_export(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))}
except (ValueError, OSError, ImportError) as error:
    kinds = (FileNotFoundError, FileExistsError, OSError, ImportError, ValueError)
    kind = next(kind for kind in kinds if isinstance(error, kind))
    answer = {"error": str(error), "kind": kind.__name__}
with open(sys.argv[3], "w") as file:
    json.dump({**answer, "warnings": told}, file)
"""
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with tempfile.TemporaryDirectory() as temporary:
        path = pathlib.Path(temporary, "answer.json")
        command = [sys.executable, "-c", code, str(folder), json.dumps(arguments), str(path)]
        process = subprocess.Popen(
            command, env={**environment, "TMPDIR": temporary}, stderr=subprocess.PIPE, text=True
        )
        try:
            _, messages = process.communicate()
        finally:
            process.kill()
            process.wait()
            Console().show_cursor()  # which a progress bar hides
        if process.returncode:
            raise RuntimeError(f"the TensorFlow process that exports failed:\n{messages[-2000:]}")
        answer = json.loads(path.read_text(encoding="utf-8"))
    for message in answer["warnings"]:
        warnings.warn(message, DataWarning, stacklevel=3)
    if "error" in answer:
        raise getattr(builtins, answer["kind"])(answer["error"])
    return answer["paths"]
