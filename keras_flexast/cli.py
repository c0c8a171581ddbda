"""The command line, `flexast`: each command parses, calls one function and prints."""

import contextlib
import json
import os
import pathlib
import platform
import shlex
import sys
import warnings
from typing import Any

import typer

from keras_flexast import options
from keras_flexast.files import RESUME_HINT, kept_partials, remove_unfinished
from keras_flexast.interrupts import EXIT_CODE, end_on_interrupt
from keras_flexast.options import (
    command_line,
    parse_milliseconds,
    parse_numbers,
    parse_pair,
    parse_patch_sizes,
    parse_words,
    sizes_text,
    typed_options,
)
from keras_flexast.recipes import DISTILL_OPTIONS, chosen
from keras_flexast.settings import (
    DEFAULT_THRESHOLD,
    EXPORT_PATCH_SIZES,
    FORMATS,
    KEPT_VERSIONS,
    MAX_SERVED_SECONDS,
    DistillSettings,
)
from keras_flexast.terminal import (
    answers_table,
    cascade_table,
    class_table,
    conversion_table,
    data_tables,
    errors,
    evaluation_table,
    json_text,
    nothing_on_stderr,
    points_table,
    print_tables,
    report_table,
    show_warning,
    sweep_table,
)
from tf_data_pipelines.settings import PATCH_SIZES, FbankSettings, PatchSettings

TRAIN, PATCHES, FBANK = options.DEFAULTS.train, PatchSettings(), FbankSettings()
DISTILL = DistillSettings()
DRAWN_SIZES, EXPORTED_SIZES = sizes_text(PATCH_SIZES), sizes_text(EXPORT_PATCH_SIZES)
ALL_FORMATS = ",".join(FORMATS)
EXPORTED_FORMATS = ",".join(FORMATS[:2])  # onnx needs an extra
MANY_FILES = 20  # from which on a command shows a progress bar

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
FAILURES = (ValueError, OSError, ImportError, RuntimeError, MemoryError)  # that say what to do


@app.command()
def demo(
    out: options.Out = pathlib.Path("flexast-demo"),
    seed: options.Seed = TRAIN.seed,
    overwrite: options.Overwrite = False,
):
    """Speak digits, train one flexible model on them, test, export and check it (minutes)."""
    _start()
    from keras_flexast.demo import run_demo

    run_demo(out, seed=seed, overwrite=overwrite)


@app.command()
def train(
    context: typer.Context,
    data: options.DataArgument,
    out: options.TrainOut,
    recipe: options.RecipeOption = None,
    resume: options.Resume = False,
    size: options.TrainSize = None,
    pooling: options.TrainPooling = None,
    init: options.Init = None,
    teacher: options.TeacherRun = None,
    teacher_patch_size: options.TeacherPatchSize = None,
    distill_weight: options.DistillWeight = DISTILL.weight,
    temperature: options.Temperature = DISTILL.temperature,
    patch_sizes: options.PatchSizes = DRAWN_SIZES,
    frame_shifts_ms: options.FrameShiftsMs = None,
    epochs: options.Epochs = TRAIN.epochs,
    learning_rate: options.LearningRate = TRAIN.learning_rate,
    schedule: options.Schedule = TRAIN.schedule,
    optimizer: options.Optimizer = TRAIN.optimizer,
    weight_decay: options.WeightDecay = TRAIN.weight_decay,
    label_smoothing: options.LabelSmoothing = TRAIN.label_smoothing,
    ema: options.Ema = TRAIN.ema,
    patience: options.Patience = TRAIN.patience,
    frozen: options.Frozen = TRAIN.frozen,
    lora_rank: options.LoraRank = TRAIN.lora_rank,
    batch_clips: options.BatchClips = TRAIN.batch_clips,
    batch_tokens: options.BatchTokens = TRAIN.batch_tokens,
    row_length: options.RowLength = TRAIN.row_length,
    segments: options.Segments = TRAIN.segments,
    remainder: options.TrainRemainder = None,
    position: options.TrainPosition = None,
    resize: options.TrainResize = None,
    dropout: options.Dropout = None,
    overlong: options.TrainOverlong = TRAIN.overlong,
    dtype: options.TrainDtype = TRAIN.dtype,
    remat: options.Remat = TRAIN.remat,
    accumulate: options.Accumulate = TRAIN.accumulate,
    devices: options.Devices = 1,
    validation: options.Validation = TRAIN.validation,
    test: options.Test = TRAIN.test,
    seed: options.Seed = TRAIN.seed,
    overwrite: options.Overwrite = False,
):
    """Train a classifier on your sounds. The best epoch on the validation clips is kept.

    Without splits in DATA, some clips of each class are drawn for validation and some for test;
    `evaluate` and `export` draw the same.
    While it trains, and after an interruption, RUN.partial is a run of the best epoch so far;
    after a kill at any moment, the same command with --resume goes on.
    small-folder mixes half of the clips with others, so accuracy stays below val_accuracy.
    Curves: tensorboard --logdir RUN.partial/logs, later RUN/logs.
    """
    if init and (size or pooling):
        raise typer.BadParameter("--size and --pooling are those of --init; leave them out.")
    typed = typed_options(context)
    if {"batch_tokens", "batch_clips"} <= typed.keys():
        raise typer.BadParameter("give --batch-tokens or --batch-clips, not both.")
    if "patch_sizes" in typed:
        typed["patch_sizes"] = parse_patch_sizes(patch_sizes)
    if "frame_shifts_ms" in typed:
        typed["frame_shifts_ms"] = parse_numbers(frame_shifts_ms)
    if "teacher_patch_size" in typed:
        typed["teacher_patch_size"] = parse_pair(teacher_patch_size, "--teacher-patch-size")
    base = chosen(typed, recipe=recipe)  # wrong options are told at once
    if not (base.teacher or resume) and any(name in typed for name in DISTILL_OPTIONS):
        raise typer.BadParameter(
            "--teacher-patch-size, --distill-weight and --temperature belong to --teacher."
        )
    _start()
    from keras_flexast.distribution import data_parallel
    from keras_flexast.training import train_run

    if resume:
        base = chosen(typed, recipe=recipe, resumed=out)
    with data_parallel(devices):
        run, history = train_run(
            data, out, **base.arguments(),
            resume=resume, overwrite=overwrite, progress=True, command_line=command_line(context),
        )  # fmt: skip
    metric = "val_mAP" if run.multi_label else "val_accuracy"
    values = history.history[metric]
    kept = ("Best", max(values)) if base.train.keep == "best" else ("Last", values[-1])
    typer.echo(f"{kept[0]} {metric}: {kept[1]:.4f}. The run is in {out}.")


@app.command()
def convert(
    source: options.Source,
    out: options.ConvertOut,
    family: options.ConvertFamily = None,
    to: options.To = None,
    classes: options.Classes = None,
    num_heads: options.NumHeads = None,
    mel_bins: options.MelBins = None,
    frames: options.Frames = None,
    stride: options.Stride = None,
    base_patch: options.BasePatch = None,
    table: options.ConvertTable = None,
    resize: options.ConvertResize = PATCHES.resize,
    mean: options.Mean = None,
    std: options.Std = None,
    ignore: options.Ignore = None,
    seed: options.Seed = TRAIN.seed,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
):
    """Published weights as a run: the same numbers, then any patch size and length.

    AST, SSAST, FlexiAST and ElasticAST are kept as published; ViT and DeiT start a FlexiAST.
    Every name of the source is used or listed as ignored, in OUT/conversion.json.
    """
    _start()
    from keras_flexast.conversion import convert_run

    with errors.status("Reading and converting"):
        done = convert_run(
            source, out, family=family, to=to, classes=classes, num_heads=num_heads,
            mel_bins=mel_bins, frames=frames, stride=parse_pair(stride, "--stride"),
            base_patch=parse_pair(base_patch, "--base-patch"), table=table, resize=resize,
            mean=mean, std=std, ignore=tuple(ignore or ()), seed=seed, overwrite=overwrite,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(done.to_dict(), indent=2))
    else:
        print_tables(conversion_table(done))
        typer.echo(f"The run is in {out}.")


@app.command()
def evaluate(
    run: options.ModelArgument,
    data: options.DataArgument,
    patch_sizes: options.EvaluatePatchSizes = None,
    cascade: options.EvaluateCascade = None,
    sweep: options.Sweep = None,
    points: options.Points = None,
    name: options.ReportName = None,
    split: options.Split = "test",
    frame_shift_ms: options.FrameShift = None,
    resize: options.ResizeRun = None,
    full_length: options.FullLength = False,
    figure: options.FigureOption = None,
    confusion: options.Confusion = None,
    per_class: options.PerClass = False,
    as_json: options.AsJson = False,
):
    """Accuracy (mAP where clips have several labels) of a run or artifact at several patch sizes.

    An artifact is run by its own runtime: the number is what the exported file scores.
    d' is that of the mean area under the ROC curve (AUC). --json has all of it for each class.
    """
    if cascade and (patch_sizes or figure or confusion):
        raise typer.BadParameter(
            "--cascade has its own patch sizes, and no --figure or --confusion; leave them out."
        )
    if sweep and (cascade or figure or confusion or frame_shift_ms or resize or full_length):
        raise typer.BadParameter(
            "--sweep takes no other change of what is heard, and no --figure, --confusion or "
            "--cascade; `flexast report` makes its pictures."
        )
    if name and not sweep:
        raise typer.BadParameter("--name belongs to --sweep.")
    if points and (sweep or "patch-size") == "patch-size":
        raise typer.BadParameter("--points belongs to --sweep length, frame-shift or pooling.")
    stages = None if cascade == "auto" else parse_patch_sizes(cascade, "--cascade")
    sizes, values = parse_patch_sizes(patch_sizes), parse_numbers(points, "--points")
    if sweep and sweep != "patch-size" and sizes and len(sizes) > 1:
        raise typer.BadParameter(f"--sweep {sweep} takes one patch size, not {len(sizes)}.")
    _start()
    from keras_flexast.evaluation import evaluate_cascade, evaluate_run
    from keras_flexast.figures import accuracy_figure, confusion_figure, refuse_picture
    from keras_flexast.sweeps import evaluate_sweep

    refuse_picture(figure)
    refuse_picture(confusion)
    if sweep:
        found = evaluate_sweep(
            run, data, sweep, split=split, name=name, progress=not as_json,
            **({"points": sizes} if sweep == "patch-size" else
               {"points": values, "patch_size": sizes and sizes[0]}),
        )  # fmt: skip
        results = found["sweeps"][sweep]
        if as_json:
            typer.echo(json_text(found))
        else:
            print_tables(sweep_table(sweep, results), *([class_table(results)] * per_class))
        return
    how: dict[str, Any] = {
        "split": split, "frame_shift_ms": frame_shift_ms, "resize": resize,
        "full_length": full_length, "progress": not as_json,
    }  # fmt: skip
    if cascade:
        results = evaluate_cascade(run, data, stages, **how)
        if as_json:
            typer.echo(json_text(results))
        else:
            print_tables(cascade_table(results), *([class_table(results)] * per_class))
        return
    results = evaluate_run(run, data, patch_sizes=sizes, **how)
    first = results[0]
    if figure:
        accuracy_figure({run.name: results}, figure, f"{first['clips']} clips")
    classes, matrix = [one["class"] for one in first["per_class"]], first["confusion"]
    if confusion and matrix:
        title = f"{run.name}, patch {first['name']}"
        confusion_figure(classes, matrix, confusion, title)
    if as_json:
        typer.echo(json_text(results))
    else:
        print_tables(evaluation_table(results), *([class_table(results)] * per_class))
    if confusion and not matrix:
        raise ValueError("confusion=True needs clips of one label each; leave it out.")


@app.command()
def report(
    files: options.ResultFiles,
    out: options.ReportOut,
    overwrite: options.Overwrite = False,
):
    """Results of several runs as tables and figures, for each data set and each sweep.

    Runs of one name are one row: the mean over their seeds, with the least and the most.
    OUT holds report.md, its figures (PNG and SVG), report.csv and report.json.
    """
    from keras_flexast.report import join_results, read_results, report_tables, write_report

    results = read_results(files)
    folder = write_report(results, out, overwrite=overwrite)
    print_tables(*map(report_table, report_tables(join_results(results))))
    typer.echo(f"The report is {folder / 'report.md'}.")


@app.command()
def predict(
    context: typer.Context,
    run: options.ModelArgument,
    files: options.FilesArgument,
    patch_size: options.OneSize = None,
    cascade: options.PredictCascade = None,
    threshold: options.Threshold = DEFAULT_THRESHOLD,
    mean: options.MeanOfSizes = False,
    frame_shift_ms: options.FrameShift = None,
    resize: options.ResizeRun = None,
    full_length: options.FullLength = False,
    top: options.Top = 3,
    timeline: options.Timeline = False,
    window: options.Window = None,
    hop: options.Hop = None,
    timeline_out: options.TimelineOut = None,
    as_json: options.AsJson = False,
):
    """Labels and scores of sound files of any format, rate and length.

    With --json the answer is always a list with an entry for each file: `file`, and `top` or
    `error`.
    """
    if not timeline and (window or hop or timeline_out):
        raise typer.BadParameter("--window, --hop and --timeline-out belong to --timeline.")
    if timeline and len(files) != 1:
        raise typer.BadParameter(f"--timeline takes one recording, not {len(files)} files.")
    if cascade and (patch_size or timeline):
        raise typer.BadParameter("--cascade has its own patch sizes, and no --timeline.")
    if not cascade and (mean or "threshold" in typed_options(context)):
        raise typer.BadParameter("--threshold and --mean belong to --cascade.")
    if mean and "threshold" in typed_options(context):
        raise typer.BadParameter("give --threshold or --mean, not both.")
    if cascade == "auto":
        raise typer.BadParameter(
            "--cascade auto belongs to `flexast evaluate`, which finds the sizes. Give them here, "
            "such as 48,24,8."
        )
    pair = parse_pair(patch_size, "--patch-size")
    stages = parse_patch_sizes(cascade, "--cascade")
    more = {}
    with _answer_of_errors(files if as_json else ()):
        _start()
        from keras_flexast.inference import (
            FileScores,
            load_cascade,
            load_classifier,
            refuse_timeline,
        )

        files = files if timeline else _sound_files(files)
        prefix = timeline_out or f"{files[0].stem}_timeline"
        if timeline:
            refuse_timeline(prefix)
        how: dict[str, Any] = {
            "frame_shift_ms": frame_shift_ms, "resize": resize, "full_length": full_length,
        }  # fmt: skip
        classifier = (
            load_cascade(run, stages, threshold=None if mean else threshold, **how)
            if stages
            else load_classifier(run, pair, **how)
        )
        if timeline:
            line = classifier.timeline(files[0], window=window, hop=hop, progress=not as_json)
            found = FileScores(line.overall()[None], [str(files[0])])
            more = line.write(prefix, files[0].name)
        else:
            many = len(files) > MANY_FILES
            found = classifier.predict_files(files, progress=not as_json and many)
    answers = []
    for path, best in zip(found.paths, found.top(classifier.classes, top), strict=True):
        labels = [{"label": label, "score": round(score, 6)} for label, score in best]
        answers.append({"file": path, "patch_size": classifier.patch_size, "top": labels, **more})
    if as_json:
        failed = [{"file": path, "error": reason} for path, reason in found.rejected]
        typer.echo(json.dumps(answers + failed, indent=2))
    elif answers:
        print_tables(answers_table(answers))
        if timeline:
            typer.echo(f"Wrote {more['csv']} ({more['windows']} windows) and {more['png']}")
    _fail_for(found.rejected)


@app.command()
def choose(
    folder: options.Folder,
    budget: options.Budget = None,
    max_mb: options.MaxMb = None,
    threads: options.Threads = 1,
    formats: options.ChooseFormats = ALL_FORMATS,
    figure: options.FigureOption = None,
    as_json: options.AsJson = False,
):
    """The most accurate exported model within a budget of time and size, as measured.

    Cascades over the patch sizes of one file are among them, with their mean time. A server's time
    is that on all cores of the machine that measured it.
    """
    limit = parse_milliseconds(budget)
    _start()
    from keras_flexast.export.model_card import (
        cascade_command,
        choose_point,
        in_formats,
        read_card,
        timed_points,
    )
    from keras_flexast.figures import points_figure, refuse_picture

    refuse_picture(figure)
    card = read_card(folder)
    points = timed_points(in_formats(card["points"], parse_words(formats)), threads)
    best, nearest = choose_point(points, limit, max_mb=max_mb, threads=threads)
    if figure:
        points_figure(
            points, figure, title=card["model"]["name"], threads=threads, chosen=best,
            budget_ms=limit,
        )  # fmt: skip
    if as_json:
        limited = limit is not None or max_mb is not None
        found = {"best": best, "nearest": nearest if limited else None, "points": points}
        typer.echo(json.dumps(found, indent=2))
    else:
        print_tables(points_table(points, best, threads))
    if best is None:
        limits = [f"{limit:g} ms"] if limit is not None else []
        limits += [f"{max_mb:g} MB"] if max_mb is not None else []
        raise ValueError(
            f"no operating point is within {' and '.join(limits)}; the nearest is "
            f"{nearest['name']} with {nearest['ms']:.3g} ms and "
            f"{nearest['megabytes']:.2f} MB."
        )
    if not as_json:
        path, signature = folder / best["path"], best["signature"]
        if best.get("cascade"):
            typer.echo(
                f"Best within the budget, on average: {cascade_command(path, best)}\n"
                f"A clip that all of its patch sizes hear takes {best['most_ms']:.3g} ms."
            )
        else:
            named = "" if signature == "serving_default" else f", signature {signature}"
            typer.echo(f"Best within the budget: {path}{named}")


@app.command()
def embed(
    run: options.ModelArgument,
    files: options.FilesArgument,
    out: options.EmbedOut,
    patch_size: options.OneSize = None,
    frame_shift_ms: options.FrameShift = None,
    resize: options.ResizeRun = None,
    full_length: options.FullLength = False,
    overwrite: options.Overwrite = False,
):
    """One vector per sound file, what pooling gives the classifier, as NumPy's .npz.

    The file holds `files` (names) and `embeddings` float32 (files, width).
    """
    _start()
    from keras_flexast.files import EMBEDDINGS, refuse_overwrite
    from keras_flexast.inference import load_classifier

    refuse_overwrite(out, overwrite, kind=EMBEDDINGS)
    files = _sound_files(files)
    classifier = load_classifier(
        run, parse_pair(patch_size, "--patch-size"), frame_shift_ms=frame_shift_ms, resize=resize,
        full_length=full_length,
    )  # fmt: skip
    found = classifier.embed_files(files, progress=len(files) > MANY_FILES)
    if found.paths:
        found.save(out)
        count, width = found.embeddings.shape
        typer.echo(f"{count} embeddings of width {width} are in {out}.")
    _fail_for(found.rejected)


@app.command()
def explain(
    run: options.RunArgument,
    file: options.SoundFile,
    out: options.ExplainOut = None,
    patch_size: options.OneSize = None,
    frame_shift_ms: options.FrameShift = None,
    resize: options.ResizeRun = None,
    full_length: options.FullLength = False,
    top: options.Top = 3,
):
    """Where in a sound a run looks: attention over the mel spectrogram, as a picture.

    The last layer's attention, and that of all layers, one after the other (rollout).
    """
    pair = parse_pair(patch_size, "--patch-size")
    out = out or pathlib.Path(f"{file.stem}_attention.png")
    _start()
    from keras_flexast.figures import explanation_figure, refuse_picture
    from keras_flexast.inference import explain_file

    refuse_picture(out)
    found = explain_file(
        run, file, pair, frame_shift_ms=frame_shift_ms, resize=resize, full_length=full_length
    )
    explanation_figure(found, out, top)
    labels = ", ".join(f"{label} {score:.3f}" for label, score in found.top(top))
    typer.echo(f"{file}: {labels}. Wrote {out}.")


@app.command()
def stats(data: options.DataArgument, as_json: options.AsJson = False):
    """Mean and standard deviation of the log-mel values, lengths, and clips per class."""
    _start()
    from tf_data_pipelines.settings import FbankSettings
    from tf_data_pipelines.shards import is_prepared, verify
    from tf_data_pipelines.sources import read_data

    if is_prepared(data):
        verify(data, progress=not as_json)
    summary = read_data(data, FbankSettings(), progress=not as_json).summary()
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    print_tables(*data_tables(summary))


@app.command()
def prepare(
    data: options.DataArgument,
    out: options.PrepareOut,
    layout: options.Layout = None,
    sample_rate: options.SampleRate = FBANK.sample_rate,
    validation: options.Validation = TRAIN.validation,
    test: options.Test = TRAIN.test,
):
    """Convert any data set to shards, which every command takes as DATA.

    After a kill, the same command continues. Every clip is decoded, mixed to mono and resampled
    once. A training from shards starts at once and needs next to no memory, however many clips
    there are.
    """
    _start()
    from tf_data_pipelines.prepare import prepare_data

    facts = prepare_data(
        data, out, layout=layout, sample_rate=sample_rate, shares=(validation, test), progress=True
    )
    if facts["rejected"]:
        errors.print(f"{len(facts['rejected'])} clips are left out; {out}/dataset.json says why.")
    if facts["missing"]:
        errors.print(f"{len(facts['missing'])} clips of the lists are not on the disk.")
    for split, counted in facts["splits"].items():
        typer.echo(f"{split}: {counted['clips']:,} clips, {counted['hours']:.2f} hours")
    typer.echo(f"{len(facts['shards'])} shards are in {out}.")


@app.command()
def export(
    context: typer.Context,
    run: options.RunArgument,
    out: options.ExportOut = None,
    patch_sizes: options.ExportPatchSizes = EXPORTED_SIZES,
    formats: options.Formats = EXPORTED_FORMATS,
    precisions: options.Precisions = None,
    data: options.Data = None,
    seconds: options.Seconds = None,
    max_seconds: options.MaxSeconds = MAX_SERVED_SECONDS,
    input: options.ExportInput = "waveform",
    frame_shift_ms: options.FrameShift = None,
    resize: options.ResizeRun = None,
    overwrite: options.Overwrite = False,
    keep: options.Keep = KEPT_VERSIONS,
):
    """A folder to deploy: TF Serving model, phone models, model card. Neither Keras nor this
    package is needed to run them: waveform in, scores out.

    With --overwrite the files are replaced and the server gets a new version beside the old,
    which a running server loads.
    """
    _start()
    from keras_flexast.export import export_run

    written = export_run(
        run, out, patch_sizes=parse_patch_sizes(patch_sizes), formats=parse_words(formats),
        precisions=parse_words(precisions), data=data, seconds=seconds,
        max_seconds=max_seconds, input=input, frame_shift_ms=frame_shift_ms, resize=resize,
        overwrite=overwrite, keep=keep, command=command_line(context),
    )  # fmt: skip
    folder = out or pathlib.Path("saved_models", run.resolve().name)
    typer.echo(f"{len(written)} artifacts are in {folder}.")
    if data:
        typer.echo(
            f"Their card is {folder / 'README.md'}. "
            f"Next: flexast choose {shlex.quote(str(folder))} --budget 20ms"
        )


def main():
    """Run the command line; errors that say what to do are shown without a traceback.

    What is compiled is kept for the next command, below $XDG_CACHE_HOME or ~/.cache.
    """
    # By machine: a program compiled for another processor may stop this one.
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.path.join(home, "keras-flexast", platform.node())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{cache}/jax")
    os.environ.setdefault("TF_XLA_FLAGS", f"--tf_xla_persistent_cache_directory={cache}/tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for stream in (sys.stdout, sys.stderr):  # a name may have what the terminal cannot show
        stream.reconfigure(errors="backslashreplace")
    leave = end_on_interrupt(_stopped)
    try:
        app()
    except FAILURES as error:
        if os.environ.get("FLEXAST_DEBUG"):
            raise
        errors.print(f"Error: {_sentence(error)}", style="red")
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as stop:  # typer makes the one the other
        if isinstance(stop, SystemExit) and stop.code != EXIT_CODE:
            raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        leave()


# === What commands share ===


def _start():
    """Import what computes. After the options are checked: it takes seconds."""
    warnings.showwarning = show_warning
    with nothing_on_stderr():
        try:
            import keras
        except (ImportError, ValueError) as error:
            raise ImportError(
                f"Keras cannot compute with {os.environ.get('KERAS_BACKEND', 'its backend')}: "
                f"{error}. Set KERAS_BACKEND to tensorflow or jax."
            ) from None
        import tensorflow as tf

        if keras.backend.backend() != "tensorflow":
            # TensorFlow only feeds it, and would take the GPU's memory.
            tf.config.set_visible_devices([], "GPU")


def _stopped():
    """What Ctrl-C leaves behind, in one line; nothing but that stays."""
    remove_unfinished()
    kept = "".join(
        f" The best weights so far are in {path}.{RESUME_HINT}" for path in kept_partials()
    )
    return f"Stopped.{kept}"


def _sentence(error):
    """An error as text; a Python argument at its beginning, "hop=0 must be", as it was typed."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{os.fsdecode(error.filename)} cannot be used: {error.strerror}."
    if isinstance(error, MemoryError):
        text = f"there is not enough memory ({text}). Choose shorter clips or larger patches."
    name, given, rest = text.partition("=")
    command = typer.main.get_command(app).commands.get("".join(sys.argv[1:2]))
    for one in command.params if command and given else ():
        if one.name == name:
            typed = one.opts[0] if one.opts[0][0] == "-" else name.upper()
            return f"{typed} {rest.removeprefix('True ')}"
    return text


@contextlib.contextmanager
def _answer_of_errors(files):
    """Print a failure of a whole command as the JSON answer of each of these files, if any."""
    try:
        yield
    except FAILURES as error:
        if files:
            answers = [{"file": str(file), "error": _sentence(error)} for file in files]
            typer.echo(json.dumps(answers, indent=2))
        raise


def _sound_files(paths):
    """The sound files, with those in folders; how many is said where there is a folder."""
    from tf_data_pipelines.listing import sound_files

    files = sound_files(paths)
    if any(path.is_dir() for path in paths):
        count = sum(not path.is_dir() for path in files)
        errors.print(f"{count} sound file{'s' * (count != 1)}.")
    return files


def _fail_for(rejected):
    """Name the files that could not be used, and exit with 1 when there are any."""
    for _, reason in rejected:
        errors.print(f"Error: {reason}", style="red")
    if rejected:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
