"""The command line, `flexast`: each command is a few lines over the library."""

import json
import os
import pathlib
import platform
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from keras_flexast.options import (
    AsJson,
    DataArgument,
    Dtype,
    Family,
    FilesArgument,
    FrameShift,
    FullLength,
    Input,
    ModelArgument,
    Overlong,
    Overwrite,
    PatchSize,
    Pooling,
    Position,
    Remainder,
    Resize,
    ResizeRun,
    RunArgument,
    Size,
    TableRule,
    Target,
    parse_classes,
    parse_milliseconds,
    parse_numbers,
    parse_pair,
    parse_patch_sizes,
    parse_words,
)

app = typer.Typer(
    help=(
        "Transformer audio classification at any patch size, clip length and frame shift.\n\n"
        "Start with [bold]flexast demo[/], or with your own sounds, one folder per class:\n\n"
        "  flexast stats sounds/\n\n"
        "  flexast train sounds/ --out run\n\n"
        "  flexast evaluate run sounds/ --patch-sizes 8,16,32,48\n\n"
        "  flexast predict run new.ogg --patch-size 32\n\n"
        "  flexast export run --data sounds/\n\n"
        "  flexast predict saved_models/run/mobile/run_32_int8.tflite new.ogg\n\n"
        "Or from published weights:\n\n"
        "  flexast convert MIT/ast-finetuned-audioset-10-10-0.4593 run\n\n"
        "KERAS_BACKEND=jax (or tensorflow) chooses what computes."
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


@app.command()
def demo(
    out: Annotated[pathlib.Path, typer.Option(help="Folder to write.")] = pathlib.Path(
        "flexast-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of data, weights and draws.")] = 1337,
    overwrite: Overwrite = False,
):
    """Speak digits, train one flexible model on them, test, export and check it (minutes)."""
    from keras_flexast.demo import run_demo

    _use_devices()
    run_demo(out, seed, overwrite)


@app.command()
def train(
    data: DataArgument,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the run.", show_default=False)],
    size: Annotated[Size | None, typer.Option(help="Size of the model; tiny if not given.")] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            help="attention (if not given) as ElasticAST; cls or cls_distillation as FlexiAST; "
            "mean as SSAST."
        ),
    ] = None,
    init: Annotated[
        pathlib.Path | None,
        typer.Option(help="Run to start from, such as a converted checkpoint.", show_default=False),
    ] = None,
    patch_sizes: Annotated[
        str, typer.Option(help="Sizes to draw from, one a clip. One size alone is a plain AST.")
    ] = "8,10,12,16,20,24,30,32,40,48",
    frame_shifts_ms: Annotated[
        str, typer.Option(help="Frame shifts to draw from, one a clip: 10,20,40. Empty: 10 only.")
    ] = "",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training clips.")] = 20,
    learning_rate: Annotated[
        float, typer.Option(help="After the warm-up; 1e-5 to 1e-4 for pretrained weights.")
    ] = 1e-3,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch.")] = 4096,
    row_length: Annotated[
        int, typer.Option(min=0, help="Tokens in a row; 0 for the longest clip's.")
    ] = 0,
    segments: Annotated[int, typer.Option(min=1, help="Clips in a row at the most.")] = 16,
    remainder: Annotated[
        Remainder, typer.Option(help="What happens to bins and frames that no whole patch covers.")
    ] = Remainder.cover,
    position: Annotated[
        Position, typer.Option(help="physical: true pitch and time; grid: as the papers.")
    ] = Position.physical,
    resize: Annotated[
        Resize, typer.Option(help="PI-resize, or the papers' bilinear ablation.")
    ] = Resize.pi,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="In every block.")] = 0.0,
    overlong: Annotated[
        Overlong, typer.Option(help="A clip longer than a row: an error, or cut.")
    ] = Overlong.error,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the computation; the saved weights are float32.")
    ] = Dtype.float32,
    rematerialise: Annotated[
        bool,
        typer.Option("--rematerialise", help="Less memory for more time: compute blocks twice."),
    ] = False,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Batches to each step of the optimizer.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of weights, order and draws.")] = 1337,
    overwrite: Overwrite = False,
):
    """Train a classifier on your sounds. The best epoch on the validation clips is kept.

    Without splits in DATA, a tenth of each class becomes validation and a tenth test.
    While it trains, and after an interruption, RUN.partial is a run of the best epoch so far.
    Curves: tensorboard --logdir RUN.partial/logs, later RUN/logs.
    """
    from keras_flexast.files import refuse_overwrite
    from keras_flexast.runs import load_run
    from keras_flexast.training import TrainSettings, train_run
    from tf_data_pipelines.settings import PatchSettings

    refuse_overwrite(out, overwrite)
    if init and (size or pooling):
        raise typer.BadParameter("--size and --pooling are those of --init; leave them out.")
    _use_devices()
    patches = PatchSettings(
        parse_patch_sizes(patch_sizes),
        parse_numbers(frame_shifts_ms),
        remainder.value,
        position.value,
        resize.value,
    )
    settings = TrainSettings(
        epochs,
        learning_rate,
        seed=seed,
        batch_tokens=batch_tokens,
        row_length=row_length or None,
        segments=segments,
        overlong=overlong.value,
        dtype=dtype.value,
        rematerialise=rematerialise,
        accumulate=accumulate,
    )
    chosen = {"size": size, "pooling": pooling}
    options = {name: choice.value for name, choice in chosen.items() if choice}
    options["dropout"] = dropout
    start = load_run(init) if init else None
    found = _scan(data, fbank=start and start.full_length().fbank)
    run, history = train_run(
        found.split("train"), found.split("validation"), out, patches, settings, options,
        overwrite, start,
    )  # fmt: skip
    metric = "val_mAP" if run.multi_label else "val_accuracy"
    typer.echo(f"Best {metric}: {max(history.history[metric]):.4f}. The run is in {out}.")


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint: .pth, .npz or .safetensors, a Hugging Face folder or hub name, a "
            "KerasHub preset.",
            show_default=False,
        ),
    ],
    out: Annotated[pathlib.Path, typer.Argument(help="Folder of the run.", show_default=False)],
    family: Annotated[
        Family | None, typer.Option(help="What it is; told from its names if not given.")
    ] = None,
    to: Annotated[
        Target | None, typer.Option(help="Start such a model from it, instead of keeping it.")
    ] = None,
    classes: Annotated[
        str,
        typer.Option(
            help="Names, in a file with one a line or AudioSet's class_labels_indices.csv; or "
            "their number. Another number than the checkpoint's starts a new head.",
            show_default=False,
        ),
    ] = "",
    num_heads: Annotated[int, typer.Option(min=0, help="Attention heads, where no file says.")] = 0,
    mel_bins: Annotated[int, typer.Option(min=0, help="Mel bins, where no file says.")] = 0,
    frames: Annotated[
        int, typer.Option(min=0, help="Frames of its spectrograms; with --to, of the new model's.")
    ] = 0,
    stride: Annotated[
        str, typer.Option(help="From patch to patch: 10, or frequency x time; told if not given.")
    ] = "",
    base_patch: Annotated[str, typer.Option(help="With --to: size of the kernel.")] = "",
    table: Annotated[
        TableRule | None,
        typer.Option(help="With --to: cut or stretch the position table as AST, or resize it."),
    ] = None,
    resize: Annotated[
        Resize, typer.Option(help="PI-resize of kernels, or the papers' bilinear ablation.")
    ] = Resize.pi,
    mean: Annotated[float | None, typer.Option(help="Of log-mel, where no file says.")] = None,
    std: Annotated[float | None, typer.Option(help="Of log-mel, where no file says.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Regular expression of names to leave out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of new weights.")] = 1337,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
):
    """Published weights as a run: the same numbers, then any patch size and length.

    AST, SSAST, FlexiAST and ElasticAST are kept as published; ViT and DeiT start a FlexiAST.
    Every name of the source is used or listed as ignored, in OUT/conversion.json.
    """
    from keras_flexast.conversion.convert import convert_run
    from keras_flexast.files import atomic_folder, atomic_write, refuse_overwrite
    from keras_flexast.runs import save_run

    refuse_overwrite(out, overwrite)
    with errors.status("Reading and converting"):
        done = convert_run(
            source,
            family and family.value,
            to and to.value,
            parse_classes(classes),
            num_heads or None,
            mel_bins or None,
            frames or None,
            parse_pair(stride, "--stride"),
            parse_pair(base_patch, "--base-patch"),
            table and table.value,
            resize.value,
            mean,
            std,
            tuple(ignore or ()),
            seed,
        )
        account = json.dumps(done.to_dict(), indent=2)
        with atomic_folder(out, overwrite) as folder:
            save_run(done.run, folder)
            atomic_write(folder / "conversion.json", account + "\n")
    if as_json:
        typer.echo(account)
        return
    _show_conversion(done, out)


@app.command()
def evaluate(
    run: ModelArgument,
    data: DataArgument,
    patch_sizes: Annotated[
        str | None,
        typer.Option(
            help="Sizes to test at, one set of weights for all. If not given: "
            "8,10,12,16,20,24,30,32,40,48, or all that an artifact has.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation, test, or all.")] = "test",
    frame_shift_ms: FrameShift = 0,
    resize: ResizeRun = None,
    full_length: FullLength = False,
    figure: Annotated[
        pathlib.Path | None, typer.Option(help="Draw the result as PNG.", show_default=False)
    ] = None,
    as_json: AsJson = False,
):
    """Accuracy (mAP where clips have several labels) of a run or artifact at several patch sizes.

    An artifact is run by its own runtime: the number is what the exported file scores.
    """
    from keras_flexast.evaluation import evaluate_run
    from keras_flexast.export.model_card import share_text
    from keras_flexast.figures import accuracy_figure
    from keras_flexast.inference.artifacts import is_artifact
    from tf_data_pipelines.settings import PATCH_SIZES, patch_name

    if is_artifact(run):
        _refuse_run_options(frame_shift_ms, resize, full_length)
        results = _evaluate_artifact(run, data, patch_sizes, split, not as_json)
    else:
        sizes = parse_patch_sizes(patch_sizes) if patch_sizes else PATCH_SIZES
        loaded = _load(run, resize, full_length)
        found = _scan(data, loaded.classes, loaded.fbank, split, not as_json)
        _warn_of_cuts(loaded, found)
        results = evaluate_run(loaded, found, sizes, frame_shift_ms or None, not as_json)
        for result in results:
            result["name"] = patch_name(result["patch_size"])
    metric, clips = results[0]["metric"], results[0]["clips"]
    if figure:
        curve = {result["name"]: result["value"] for result in results}
        accuracy_figure({run.name: curve}, figure, f"{clips} clips", metric)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    packed = "tokens" in results[0]
    table = Table("patch size", metric, "clips", *(["tokens per clip", "row fill"] * packed))
    for r in results:
        more = (f"{r['tokens'] / r['clips']:.0f}", f"{100 * r['fill']:.0f} %") if packed else ()
        table.add_row(r["name"], f"{share_text(r)} %", str(r["clips"]), *more)
    Console().print(table)


@app.command()
def predict(
    run: ModelArgument,
    files: FilesArgument,
    patch_size: PatchSize = None,
    frame_shift_ms: FrameShift = 0,
    resize: ResizeRun = None,
    full_length: FullLength = False,
    top: Annotated[int, typer.Option(min=1, help="Labels to show.")] = 3,
    timeline: Annotated[
        bool,
        typer.Option(
            "--timeline",
            help="What is heard when in one recording of any length: a table and a picture.",
        ),
    ] = False,
    window: Annotated[
        float,
        typer.Option(
            min=0, help="Of the timeline, in seconds; 0 for 1, or what an artifact takes."
        ),
    ] = 0,
    hop: Annotated[
        float, typer.Option(min=0, help="From window to window, in seconds; 0 for half a window.")
    ] = 0,
    timeline_out: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="Write the timeline to this name with .csv and .png; NAME_timeline here if not "
            "given.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
):
    """Labels and scores of sound files of any format, rate and length."""
    from keras_flexast.inference.artifacts import is_artifact
    from tf_data_pipelines.settings import patch_name

    if not timeline and (window or hop or timeline_out):
        raise typer.BadParameter("--window, --hop and --timeline-out belong to --timeline.")
    if timeline and len(files) != 1:
        raise typer.BadParameter(f"--timeline takes one recording, not {len(files)} files.")
    if is_artifact(run):
        _refuse_run_options(frame_shift_ms, resize, full_length)
        loaded, pair = _load_artifact(run, patch_size), None
        name = loaded.patch_size
    else:
        loaded = _load(run, resize, full_length)
        pair = _one_patch_size(loaded, patch_size)
        name = patch_name(pair)
    more = {}
    if timeline:
        heard = _hear(loaded, files[0], pair, window, hop, frame_shift_ms, not as_json)
        scores, paths, rejected = heard.overall()[None], [str(files[0])], ()
        more = _write_timeline(heard, files[0], timeline_out)
    else:
        scores, paths, rejected = _score_files(loaded, files, pair, frame_shift_ms, not as_json)
    answers = []
    for path, score in zip(paths, scores, strict=True):
        best = score.argsort()[::-1][:top]
        labels = [{"label": loaded.classes[k], "score": round(float(score[k]), 6)} for k in best]
        answers.append({"file": path, "patch_size": name, "top": labels, **more})
    if as_json:
        failed = [{"file": path, "error": reason} for path, reason in rejected]
        typer.echo(json.dumps(answers + failed, indent=2))
    else:
        table = Table(Column("file", overflow="fold"))
        for place in range(1, min(top, scores.shape[1]) + 1):
            table.add_column(f"{place}.")
        for answer in answers:
            labels = (f"{one['label']} {one['score']:.3f}" for one in answer["top"])
            table.add_row(answer["file"], *labels)
        Console().print(table)
        if timeline:
            typer.echo(f"Wrote {more['csv']} ({more['windows']} windows) and {more['png']}")
    _fail_for(rejected)


@app.command()
def choose(
    folder: Annotated[
        pathlib.Path,
        typer.Argument(help="Folder with the card.json of an export.", show_default=False),
    ],
    budget: Annotated[
        str, typer.Option(help="Time for a clip: 20ms, 0.02s or 20 (ms).", show_default=False)
    ] = "",
    max_mb: Annotated[float, typer.Option(min=0, help="Largest file, in MB; 0 for any size.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads that a clip may use.")] = 1,
    figure: Annotated[
        pathlib.Path | None, typer.Option(help="Draw the points as PNG.", show_default=False)
    ] = None,
    as_json: AsJson = False,
):
    """The most accurate exported model within a budget of time and size, as measured."""
    from keras_flexast.export.model_card import choose_point, read_card, share_text
    from keras_flexast.figures import points_figure

    card, limit = read_card(folder), parse_milliseconds(budget)
    points = card["points"]
    best, nearest = choose_point(points, limit, max_mb or None, threads)
    if figure:
        points_figure(points, figure, card["model"]["name"], threads, best, limit)
    if as_json:
        typer.echo(json.dumps({"best": best, "nearest": nearest, "points": points}, indent=2))
    else:
        table = Table(
            "", Column("artifact", overflow="fold"), "patch", "precision",
            f"{points[0]['metric']} %", Column("ms a clip", justify="right"),
            Column("MB", justify="right"), caption=f"{threads} thread{'s' * (threads > 1)}",
        )  # fmt: skip
        for point in sorted(points, key=lambda point: -point["value"]):
            time = point["latency_ms"].get(str(threads))
            table.add_row(
                "→" if point is best else "",
                point["name"],
                point["patch_size"] or "",
                point["precision"] or "",
                share_text(point),
                "" if time is None else f"{time:.3g}",
                f"{point['megabytes']:.2f}",
                style="bold" if point is best else None,
            )
        Console().print(table)
    if best is None:
        limits = [f"{limit:g} ms"] * bool(limit) + [f"{max_mb:g} MB"] * bool(max_mb)
        raise ValueError(
            f"no operating point is within {' and '.join(limits)}; the nearest is "
            f"{nearest['name']} with {nearest['latency_ms'][str(threads)]:.3g} ms and "
            f"{nearest['megabytes']:.2f} MB."
        )
    if not as_json:
        typer.echo(f"Best within the budget: {folder / best['path']}")


@app.command()
def embed(
    run: RunArgument,
    files: FilesArgument,
    out: Annotated[pathlib.Path, typer.Option(help="File to write, .npz.", show_default=False)],
    patch_size: PatchSize = None,
    frame_shift_ms: FrameShift = 0,
    resize: ResizeRun = None,
    full_length: FullLength = False,
    overwrite: Overwrite = False,
):
    """One vector per sound file, what pooling gives the classifier, as NumPy's .npz.

    The file holds `files` (names) and `embeddings` float32 (files, width).
    """
    import io

    import numpy as np

    from keras_flexast.files import atomic_write, refuse_overwrite
    from keras_flexast.models import embedding_model

    if out.suffix != ".npz":
        raise ValueError(f"--out {out} must end in .npz.")
    refuse_overwrite(out, overwrite)
    loaded = _load(run, resize, full_length)
    pair = _one_patch_size(loaded, patch_size)
    found, vectors = _run_files(loaded, files, pair, frame_shift_ms, embedding_model, True)
    content = io.BytesIO()
    np.savez(content, files=[clip.path for clip in found.source.clips], embeddings=vectors)
    atomic_write(out, content.getvalue())
    typer.echo(f"{len(vectors)} embeddings of width {vectors.shape[1]} are in {out}.")
    _fail_for(found.rejected)


@app.command()
def stats(data: DataArgument, as_json: AsJson = False):
    """Mean and standard deviation of the log-mel values, lengths, and clips per class."""
    import numpy as np

    found = _scan(data, progress=not as_json)
    splits = sorted({clip.split for clip in found.source.clips})
    counts = {name: dict.fromkeys(splits, 0) for name in found.source.classes}
    for clip in found.source.clips:
        for label in clip.labels:
            counts[found.source.classes[label]][clip.split] += 1
    seconds = found.durations
    summary = {
        "clips": len(seconds),
        "left_out": len(found.rejected),
        "mean": round(found.mean, 6),
        "std": round(found.std, 6),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "seconds": {
            name: round(float(np.quantile(seconds, q)), 3)
            for name, q in (("shortest", 0), ("median", 0.5), ("99 %", 0.99), ("longest", 1))
        },
    }
    if as_json:
        typer.echo(json.dumps({**summary, "classes": counts}, indent=2))
        return
    table = Table(show_header=False)
    for name, value in summary.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        table.add_row(name, str(value))
    classes = Table("class", *splits)
    for name, row in counts.items():
        classes.add_row(name, *map(str, row.values()))
    Console().print(table, classes)


@app.command()
def export(
    run: RunArgument,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder; saved_models/NAME OF THE RUN if not given."),
    ] = None,
    patch_sizes: Annotated[
        str, typer.Option(help="Each a signature for the server and files for phones.")
    ] = "8,16,24,32,48",
    formats: Annotated[
        str, typer.Option(help="serving (TensorFlow Serving), mobile (.tflite), onnx.")
    ] = "serving,mobile",
    precisions: Annotated[
        str,
        typer.Option(
            help="Of the .tflite files: float32, float16, dynamic, int8. All of them if not "
            "given; int8 needs --data.",
            show_default=False,
        ),
    ] = "",
    data: Annotated[
        pathlib.Path | None,
        typer.Option(
            help="As for train: its training clips give int8 its scales, its test clips measure "
            "every artifact for the model card and `flexast choose`.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Length of every clip on phones and in onnx; 0 for the longest training clip.",
        ),
    ] = 0,
    max_seconds: Annotated[
        float, typer.Option(min=0.1, help="Of the longest clip that the server accepts.")
    ] = 60,
    input: Annotated[
        Input, typer.Option(help="Of .tflite and onnx; features are normalized log-mel.")
    ] = Input.waveform,
    frame_shift_ms: FrameShift = 0,
    resize: ResizeRun = None,
    overwrite: Overwrite = False,
):
    """A folder to deploy: TF Serving model, phone models, model card. Neither Keras nor this
    package is needed to run them: waveform in, scores out.

    With --overwrite the files are replaced and the server gets a new version beside the old.
    """
    from keras_flexast.export.folder import export_folder

    out = out or pathlib.Path("saved_models", run.resolve().name)
    written = export_folder(
        run, out, parse_patch_sizes(patch_sizes), parse_words(formats), parse_words(precisions),
        data, seconds or None, frame_shift_ms or None, resize and resize.value, input.value,
        max_seconds, overwrite,
    )  # fmt: skip
    typer.echo(f"{len(written)} artifacts are in {out}.")
    if data:
        typer.echo(f"Their card is {out / 'README.md'}. Next: flexast choose {out} --budget 20ms")


def main():
    """Run the command line; errors that say what to do are shown without a traceback.

    What is compiled is kept for the next command, below $XDG_CACHE_HOME or ~/.cache.
    """
    # By machine: a program compiled for another processor may stop this one.
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.path.join(home, "keras-flexast", platform.node())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{cache}/jax")
    os.environ.setdefault("TF_XLA_FLAGS", f"--tf_xla_persistent_cache_directory={cache}/tensorflow")
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("FLEXAST_DEBUG"):
            raise
        errors.print(f"Error: {error}", style="red")
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("Stopped.", style="red")
        sys.exit(130)


def _use_devices():
    """Leave the GPU to JAX: TensorFlow, which only feeds it, would take its memory."""
    import keras

    if keras.backend.backend() != "tensorflow":
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")


def _load(run, resize, full_length):
    """A run, with another resize or at the clips' own lengths where that is asked for."""
    from keras_flexast.runs import load_run

    _use_devices()
    loaded = load_run(run)
    if resize:
        loaded = loaded.resized(resize.value)
    return loaded.full_length() if full_length else loaded


def _scan(data, classes=None, fbank=None, split="all", progress=True):
    """ScannedSource of DATA, with a model's classes and front end; rejected files are warned of."""
    from tf_data_pipelines.settings import FbankSettings
    from tf_data_pipelines.sources import load_source, scan_source

    source = load_source(data, classes=classes)
    if split != "all":
        source = source.split(split)
    found = scan_source(source, fbank or FbankSettings(), progress)
    if found.warning():
        errors.print(f"Warning: {found.warning()}", style="yellow")
    return found


def _load_artifact(path, patch_size):
    """The signature of an artifact for --patch-size, or its only one."""
    from keras_flexast.inference.artifacts import load_artifact, scoring_artifacts

    _use_devices()
    if not patch_size:
        return load_artifact(path)
    found = scoring_artifacts(path)
    return _sized(found, path, parse_pair(patch_size, "--patch-size"))


def _evaluate_artifact(path, data, patch_sizes, split, progress):
    """A result for each signature of an artifact, or for those of --patch-sizes."""
    from keras_flexast.export.model_card import measure
    from keras_flexast.inference.artifacts import scoring_artifacts
    from tf_data_pipelines.settings import FbankSettings

    _use_devices()
    found = scoring_artifacts(path)
    chosen = list(found.values())
    if patch_sizes:
        chosen = [_sized(found, path, pair) for pair in parse_patch_sizes(patch_sizes)]
    fbank = FbankSettings(sample_rate=chosen[0].sample_rate)
    clips = _scan(data, chosen[0].classes, fbank, split, progress)
    results = []
    for one in chosen:
        name = one.patch_size or one.signature
        result = measure(one, clips, f"Evaluating {name}" if progress else None)
        results.append({"name": name, "signature": one.signature, **result})
    return results


def _sized(found, path, pair):
    """The Artifact of one patch size among those of a file."""
    from tf_data_pipelines.settings import patch_name

    named = {one.patch_size: one for one in found.values()}
    if patch_name(pair) not in named:
        names = [name or "one that it does not name (leave the option out)" for name in named]
        raise ValueError(f"{path} has no patch size {patch_name(pair)}; it has {', '.join(names)}.")
    return named[patch_name(pair)]


def _refuse_run_options(frame_shift_ms, resize, full_length):
    """Raise for options that an exported artifact has settled."""
    given = {
        "--frame-shift-ms": frame_shift_ms, "--resize": resize, "--full-length": full_length
    }  # fmt: skip
    for name, value in given.items():
        if value:
            raise typer.BadParameter(f"{name} is settled in an exported artifact; export again.")


def _score_files(model, files, pair, frame_shift_ms, progress):
    """(scores, usable files, rejected) by a run at a patch size, or by an artifact (None)."""
    from keras_flexast.inference.artifacts import file_scores

    if pair is None:
        text = "Classifying" if progress and len(files) > 20 else None
        return file_scores(model, [str(file) for file in files], text)
    found, logits = _run_files(model, files, pair, frame_shift_ms, lambda model: model, progress)
    return model.scores(logits), [clip.path for clip in found.source.clips], found.rejected


def _hear(model, file, pair, window, hop, frame_shift_ms, progress):
    """Timeline by a run at a patch size, or by an artifact (None)."""
    from keras_flexast.inference.timeline import artifact_timeline, run_timeline

    if pair is None:
        return artifact_timeline(model, file, window, hop, progress)
    window = window or 1.0
    hop = hop or window / 2
    return run_timeline(model, file, pair, window, hop, frame_shift_ms or None, progress)


def _write_timeline(heard, file, out):
    """Write a timeline's table and picture; returns where, and how many windows."""
    from keras_flexast.figures import timeline_figure
    from keras_flexast.files import atomic_write

    prefix = str(out or f"{file.stem}_timeline")
    timeline_figure(heard, f"{prefix}.png", file.name)
    atomic_write(f"{prefix}.csv", heard.to_csv())
    return {"csv": f"{prefix}.csv", "png": f"{prefix}.png", "windows": len(heard.starts)}


def _warn_of_cuts(run, found):
    """Say so when clips are longer than what a converted checkpoint hears of them."""
    if run.fbank.clip_ms is None:
        return
    seconds = (run.fbank.clip_ms - run.fbank.frame_shift_ms + run.fbank.window_ms) / 1000
    cut = int((found.durations > seconds + run.fbank.frame_shift_ms / 1000).sum())
    if cut:
        errors.print(
            f"Warning: {cut} of {len(found.durations)} clips are longer than the {seconds:.2f} s "
            f"that this checkpoint was made for; the rest of them is not heard. --full-length "
            f"hears all of it.",
            style="yellow",
        )


def _one_patch_size(run, text):
    """(frequency, time) of --patch-size; the model's own where that is not given."""
    return parse_pair(text, "--patch-size") or run.model.base_patch


def _run_files(run, files, pair, frame_shift_ms, part, progress):
    """(ScannedSource of the usable files, float32 (files, width) of a part of the model)."""
    from keras_flexast.evaluation import clip_outputs, packing_for
    from tf_data_pipelines.pipeline import evaluation_batches
    from tf_data_pipelines.sources import Clip, Source, scan_source

    clips = tuple(Clip(str(path), (0,), "all") for path in files)
    progress = progress and len(files) > 20
    found = scan_source(Source(clips, run.classes, False), run.fbank, progress, max_rejected=1.0)
    _warn_of_cuts(run, found)
    patches = run.patches_at([pair], frame_shift_ms or None)
    packing = packing_for(found, run.fbank, patches, run.packing)
    batches = evaluation_batches(found, run.fbank, patches, packing)
    text = "Classifying" if progress else None
    return found, clip_outputs(part(run.model), batches, len(found.source), text)[0]


def _show_conversion(done, out):
    """What became of the names of a checkpoint, counted by reason."""
    import collections

    model = done.run.model
    table = Table(show_header=False)
    table.add_row("family", done.family)
    table.add_row(
        "model",
        f"{model.depth} blocks, {model.dim} wide, {model.num_heads} heads, {model.pooling} pooling",
    )
    table.add_row("patches", f"{_text(model.base_patch)}, one every {_text(model.stride)}")
    table.add_row("position table", f"{_text(model.grid)}, {model.position}")
    table.add_row("classes", f"{len(done.run.classes)}: {', '.join(done.run.classes[:4])}, ...")
    table.add_row("names used", str(len(done.used)))
    for reason, count in collections.Counter(done.ignored.values()).items():
        table.add_row("names ignored", f"{count}: {reason}")
    for layer, reason in done.new.items():
        table.add_row("new", f"{layer}: {reason}")
    for note in done.notes:
        table.add_row("note", note)
    Console().print(table)
    typer.echo(f"The run is in {out}.")


def _text(pair):
    return "x".join(map(str, pair))


def _fail_for(rejected):
    """Name the files that could not be used, and exit with 1 when there are any."""
    for _, reason in rejected:
        errors.print(f"Error: {reason}", style="red")
    if rejected:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
