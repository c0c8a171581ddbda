"""What several commands of the command line share: arguments, options, and texts as values.

Choices and defaults come from the settings classes.
"""

import pathlib
import shlex
from typing import Annotated, Literal

import typer

from keras_flexast.recipes import FROM_INIT, FROM_SCRATCH, load_recipe, recipe_names
from keras_flexast.settings import (
    DEFAULT_POOLING,
    DEFAULT_WINDOW,
    DTYPES,
    FAMILIES,
    INPUTS,
    MAX_DROPOUT,
    MAX_EMA,
    MAX_SEED,
    MAX_SMOOTHING,
    MAX_TEMPERATURE,
    OPTIMIZERS,
    POOLINGS,
    PRECISIONS,
    SCHEDULES,
    SIZES,
    SWEEPS,
    TABLE_RULES,
    TARGETS,
)
from tf_data_pipelines.settings import (
    LAYOUT_NAMES,
    OVERLONGS,
    PATCH_SIZES,
    POSITIONS,
    REMAINDERS,
    RESIZES,
    FbankSettings,
    PatchSettings,
    patch_name,
    patch_pair,
)

PATCHES = PatchSettings()  # the defaults
DEFAULTS = load_recipe(FROM_SCRATCH)  # of `train`

Dtype = Literal[DTYPES]
Family = Literal[FAMILIES]
Input = Literal[INPUTS]
Optimizers = Literal[OPTIMIZERS]
Overlong = Literal[OVERLONGS]
Pooling = Literal[tuple(POOLINGS)]
Position = Literal[POSITIONS]
Remainder = Literal[REMAINDERS]
Resize = Literal[RESIZES]
Schedules = Literal[SCHEDULES]
Size = Literal[tuple(SIZES)]
Sweeps = Literal[tuple(SWEEPS)]
TableRule = Literal[TABLE_RULES]
Target = Literal[TARGETS]


# === Texts as values ===


def sizes_text(sizes):
    """((8, 8), (16, 24)) or (8, 16) -> "8,16x24"."""
    return ",".join(patch_name(patch_pair(size)) for size in sizes)


def parse_patch_sizes(text, name="--patch-sizes"):
    """ "8,16x24" -> ((8, 8), (16, 24)): frequency x time; None -> None."""
    if text is None:
        return None
    try:
        sizes = [tuple(int(number) for number in part.split("x")) for part in text.split(",")]
        if any(len(size) > 2 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"{name} {text!r}: expected patch sizes such as 16 or 8,16,24x32 (frequency x time)."
        ) from None
    return tuple(size if len(size) == 2 else size * 2 for size in sizes)


def parse_pair(text, name):
    """ "10" or "10x5" -> (frequency, time); None -> None."""
    sizes = (None,) if text is None else parse_patch_sizes(text, name)
    if len(sizes) != 1:
        raise typer.BadParameter(f"{name} {text!r} must be one size.")
    return sizes[0]


def parse_milliseconds(text):
    """ "20ms", "0.02s" or "20" -> 20.0; None -> None."""
    if text is None:
        return None
    number, scale = text.strip().lower(), 1.0
    if number.endswith("ms"):
        number = number[:-2]
    elif number.endswith("s"):
        number, scale = number[:-1], 1000.0
    try:
        value = scale * float(number)
        if not 0 < value < float("inf"):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"--budget {text!r} is not a time such as 20ms, 0.02s or 20."
        ) from None
    return value


def parse_numbers(text, name="--frame-shifts-ms"):
    """ "10,20" -> (10.0, 20.0); None -> None."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise typer.BadParameter(
            f"{name} {text!r} is not a list of numbers such as 10,20."
        ) from None


def parse_words(text):
    """ "serving,mobile" -> ("serving", "mobile"); None -> None."""
    if text is None:
        return None
    return tuple(word.strip() for word in text.split(",") if word.strip())


def command_line(context):
    """The command with the options that were given, under their long names."""
    words = ["flexast", context.info_name]
    for one in context.command.params:
        value = context.params.get(one.name)
        if context.get_parameter_source(one.name).name == "DEFAULT" or value in (None, False):
            continue
        if one.param_type_name == "option":
            words.append(one.opts[0])
        if value is not True:
            words.append(str(value))
    return shlex.join(words)


def typed_options(context):
    """{name: value} of the options of a command that were typed."""
    return {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name).name != "DEFAULT"
    }


# === Arguments and options ===

RunArgument = Annotated[
    pathlib.Path,
    typer.Argument(help="Folder of a run, written by train, convert or demo.", show_default=False),
]
ModelArgument = Annotated[
    pathlib.Path,
    typer.Argument(
        help="Folder of a run, written by train, convert or demo, or an exported artifact: "
        ".tflite, .onnx, SavedModel.",
        show_default=False,
    ),
]
DataArgument = Annotated[
    pathlib.Path,
    typer.Argument(
        help="Folder with one folder per class (or train/ validation/ test/ of these), or a CSV "
        "manifest with the columns path, label and perhaps split. Or the folder of a published "
        "data set: ESC-50, Speech Commands, AudioSet, VGGSound, VoxCeleb1, EPIC-SOUNDS, or AST's "
        "JSON manifests. Or what `flexast prepare` made of any of these.",
        show_default=False,
    ),
]
FilesArgument = Annotated[
    list[pathlib.Path],
    typer.Argument(help="Sound files, and folders of them.", show_default=False),
]
OneSize = Annotated[
    str | None,
    typer.Option(
        "--patch-size",
        help="Patch size, or frequency x time: 16, 16x24. Larger is faster.",
        show_default="the model's own",
    ),
]
ResizeRun = Annotated[
    Resize | None,
    typer.Option(
        help="Resize rule for other patch sizes than the model's own.",
        show_default="as trained",
    ),
]
FullLength = Annotated[
    bool,
    typer.Option(
        "--full-length",
        help="Use whole clips, where a converted AST would cut or pad them.",
    ),
]
FrameShift = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        max=1000,
        help="Frame shift in milliseconds. Longer is faster.",
        show_default="that of training",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what is there if this program wrote it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Seed = Annotated[
    int,
    typer.Option(min=0, max=MAX_SEED, help="Random seed of the data, the weights and the draws."),
]
ExplainOut = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--out",
        help="PNG file to write; an earlier picture of this program is replaced.",
        show_default="FILE_attention.png, in this folder",
    ),
]
SoundFile = Annotated[
    pathlib.Path, typer.Argument(help="Sound file of any format, rate and length.")
]
FigureOption = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--figure",
        help="PNG file to draw the result into; an earlier picture of this program is replaced.",
        show_default=False,
    ),
]

# === demo ===

Out = Annotated[pathlib.Path, typer.Option(help="Folder to write.")]

# === train ===

TrainOut = Annotated[pathlib.Path, typer.Option(help="Folder of the run.", show_default=False)]
TrainSize = Annotated[
    Size | None,
    typer.Option(help="Size of the model.", show_default=DEFAULTS.model["size"]),
]
TrainPooling = Annotated[
    Pooling | None,
    typer.Option(
        help="Pooling: attention as ElasticAST; cls or cls_distillation as FlexiAST; mean as "
        "SSAST.",
        show_default=DEFAULT_POOLING,
    ),
]
Init = Annotated[
    pathlib.Path | None,
    typer.Option(help="Run to start from, such as a converted checkpoint.", show_default=False),
]
TeacherRun = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--teacher",
        help="Run of the same classes to learn from, beside the labels: knowledge distillation.",
        show_default=False,
    ),
]
TeacherPatchSize = Annotated[
    str | None,
    typer.Option(help="Patch size of the teacher, or frequency x time.", show_default="its own"),
]
DistillWeight = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the teacher's loss; the rest is the labels'.")
]
Temperature = Annotated[
    float,
    typer.Option(min=0.1, max=MAX_TEMPERATURE, help="Temperature of the teacher's loss."),
]
PatchSizes = Annotated[
    str,
    typer.Option(help="Patch sizes to draw from, one per clip. A single size is a plain AST."),
]
FrameShiftsMs = Annotated[
    str | None,
    typer.Option(
        help="Frame shifts in milliseconds to draw from, one per clip, such as 10,20,40.",
        show_default=f"{FbankSettings.frame_shift_ms:g} only",
    ),
]
Epochs = Annotated[int, typer.Option(min=1, help="Number of passes over the training clips.")]
LearningRate = Annotated[
    float,
    typer.Option(help="Learning rate after the warm-up; 1e-5 to 3e-4 for pretrained weights."),
]
BatchTokens = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of tokens in a batch; takes the place of the recipe's --batch-clips.",
        show_default=False,
    ),
]
BatchClips = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of clips in a batch, on average and rounded to whole rows, at least one.",
    ),
]
RowLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of tokens in a row.",
        show_default="what the longest clip needs, up to 4,096",
    ),
]
Segments = Annotated[int, typer.Option(min=1, help="Largest number of clips in a row.")]
TrainRemainder = Annotated[
    Remainder | None,
    typer.Option(
        help="Rule for bins and frames that no whole patch covers.",
        show_default=f"{PATCHES.remainder}, or that of --init",
    ),
]
TrainPosition = Annotated[
    Position | None,
    typer.Option(
        help="Positions: true pitch and time (physical), or as the papers (grid).",
        show_default=f"{PATCHES.position}, or that of --init",
    ),
]
TrainResize = Annotated[
    Resize | None,
    typer.Option(
        help="Resize rule: PI-resize, or the papers' bilinear ablation.",
        show_default=f"{PATCHES.resize}, or that of --init",
    ),
]
Dropout = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MAX_DROPOUT,
        help="Dropout rate in every block.",
        show_default="0, or that of --init",
    ),
]
TrainOverlong = Annotated[
    Overlong,
    typer.Option(
        help="Rule for a clip longer than a row at every patch size: error stops, crop cuts its "
        "end."
    ),
]
TrainDtype = Annotated[
    Dtype, typer.Option(help="Precision of the computation; the saved weights are float32.")
]
Validation = Annotated[
    float,
    typer.Option(
        min=0, max=0.99, help="Share of each class for validation, where DATA has no splits."
    ),
]
Test = Annotated[
    float,
    typer.Option(
        min=0, max=0.99, help="Share of each class for the test, where DATA has no splits."
    ),
]
Remat = Annotated[
    bool,
    typer.Option("--remat", help="Gradient checkpointing: less memory for more time."),
]
Accumulate = Annotated[
    int, typer.Option(min=1, help="Number of batches to each step of the optimizer.")
]
Devices = Annotated[
    int, typer.Option(min=1, help="Number of GPUs of this machine that share each batch.")
]

Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the training that left RUN.partial, however it ended. Options that are "
        "not given are as they were.",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help=f"Recipe: {', '.join(recipe_names())}, or a Python file. Options that are given win "
        f"over it. Without one it is {FROM_SCRATCH}, or with --init {FROM_INIT}; the defaults "
        f"below are those of {FROM_SCRATCH}. What a file of your own leaves out is as in Python.",
        show_default=False,
    ),
]
Optimizer = Annotated[
    Optimizers,
    typer.Option(
        help="Optimizer: adam adds weight decay to the gradient, adamw decouples it, muon is adamw "
        "with orthogonal steps inside the encoder."
    ),
]
Schedule = Annotated[
    Schedules, typer.Option(help="Learning rate after the warm-up: cosine to zero, step, constant.")
]
WeightDecay = Annotated[float, typer.Option(min=0, max=1, help="Weight decay.")]
Ema = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=MAX_EMA,
        help="Momentum of averaged weights, such as 0.999, which are validated and saved.",
        show_default=False,
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1, help="Stop after so many epochs without a better validation.", show_default=False
    ),
]
Frozen = Annotated[
    bool, typer.Option("--frozen", help="Keep the encoder as it is; train pooling and head.")
]
LoraRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Change the encoder's attention by matrices of this rank only (LoRA).",
        show_default=False,
    ),
]
LabelSmoothing = Annotated[
    float,
    typer.Option(
        min=0, max=MAX_SMOOTHING, help="Share of each label that is spread over all classes."
    ),
]

# === prepare ===

PrepareOut = Annotated[pathlib.Path, typer.Argument(help="Folder to write.", show_default=False)]
Layout = Annotated[
    Literal[LAYOUT_NAMES] | None,
    typer.Option(
        help="Layout of a published data set; esc50-fold1 to esc50-fold5 choose the test fold.",
        show_default="told by its lists",
    ),
]
SampleRate = Annotated[int, typer.Option(min=1000, help="Sample rate of the shards in Hz.")]

# === convert ===

Source = Annotated[
    str,
    typer.Argument(
        help="Checkpoint: .pth, .npz or .safetensors, a Hugging Face folder or hub name, a "
        "KerasHub preset.",
        show_default=False,
    ),
]
ConvertOut = Annotated[pathlib.Path, typer.Argument(help="Folder of the run.", show_default=False)]
ConvertFamily = Annotated[
    Family | None,
    typer.Option(help="Family of the model.", show_default="told by its names"),
]
To = Annotated[
    Target | None,
    typer.Option(
        help="Kind of new model to initialize from the checkpoint.",
        show_default=False,
    ),
]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Class names, in a file with one per line or AudioSet's class_labels_indices.csv; "
        "or their number. Another number than the checkpoint's starts a new head.",
        show_default=False,
    ),
]
NumHeads = Annotated[
    int | None,
    typer.Option(min=1, help="Number of attention heads, where no file says it."),
]
MelBins = Annotated[
    int | None, typer.Option(min=1, help="Number of mel bins, where no file says it.")
]
Frames = Annotated[
    int | None,
    typer.Option(min=1, help="Frames of its spectrograms; with --to, of the new model's."),
]
Stride = Annotated[
    str | None,
    typer.Option(
        help="Stride of the patches: 10, or frequency x time.",
        show_default="told by the weights",
    ),
]
BasePatch = Annotated[
    str | None, typer.Option(help="Patch size of the new model's kernel, with --to.")
]
ConvertTable = Annotated[
    TableRule | None,
    typer.Option(
        help="Rule for the position table, with --to: cut or stretch it as AST, or resize it.",
        show_default=False,
    ),
]
ConvertResize = Annotated[
    Resize, typer.Option(help="Resize rule of kernels: PI-resize, or the bilinear ablation.")
]
Mean = Annotated[
    float | None, typer.Option(help="Mean of the log-mel values, where no file says it.")
]
Std = Annotated[
    float | None,
    typer.Option(help="Standard deviation of the log-mel values, where no file says it."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Regular expression of names to leave out.", show_default=False),
]

# === evaluate ===

EvaluatePatchSizes = Annotated[
    str | None,
    typer.Option(
        help="Patch sizes to test at, one set of weights for all.",
        show_default=f"{sizes_text(PATCH_SIZES)}, or all that an artifact has",
    ),
]
EvaluateCascade = Annotated[
    str | None,
    typer.Option(
        "--cascade",
        help="Patch sizes from large to small, such as 48,24,8: each hears the clips that those "
        "before it doubt. Accuracy and operations of a clip, at a threshold set on the validation "
        'clips; "auto" finds the sizes on them, too.',
        show_default=False,
    ),
]
PredictCascade = Annotated[
    str | None,
    typer.Option(
        "--cascade",
        help="Patch sizes from large to small, such as 48,24,8: each hears the clips that those "
        "before it doubt.",
        show_default=False,
    ),
]
Threshold = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="Score at which --cascade believes a class; evaluate --cascade finds it."
    ),
]
MeanOfSizes = Annotated[
    bool,
    typer.Option("--mean", help="Mean of the scores at all sizes of --cascade, in place of it."),
]
Sweep = Annotated[
    Sweeps | None,
    typer.Option(
        help="Accuracy along one axis: patch sizes, seconds after which clips are cut, "
        "milliseconds from frame to frame, or neighboring frames pooled to one. `flexast report` "
        "joins what --json prints.",
        show_default=False,
    ),
]
Points = Annotated[
    str | None,
    typer.Option(
        help="Values along the axis of --sweep length, frame-shift or pooling, such as 0.5,1,2. "
        "Those of patch-size are given by --patch-sizes, which has the one size of the others.",
        show_default="tenths of the longest clip; 1 to 4 times the frame shift; 1 to 4 frames",
    ),
]
ReportName = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="Name of the run in a report of --sweep; runs of one name and several seeds are one "
        "row.",
        show_default="that of the folder",
    ),
]
Split = Annotated[str, typer.Option(help="Split: train, validation, test, or all.")]
Confusion = Annotated[
    pathlib.Path | None,
    typer.Option(
        help="PNG file to draw the confusion matrix into, at the first of the patch sizes.",
        show_default=False,
    ),
]
PerClass = Annotated[
    bool,
    typer.Option("--per-class", help="Also print the number of each class at each patch size."),
]

# === predict ===

Top = Annotated[int, typer.Option(min=1, help="Number of labels to show.")]
Timeline = Annotated[
    bool,
    typer.Option(
        "--timeline",
        help="Show what is heard when in one recording of any length: a table and a picture.",
    ),
]
Window = Annotated[
    float | None,
    typer.Option(
        help="Length of the timeline's windows in seconds.",
        show_default=f"{DEFAULT_WINDOW:g}, or what an artifact takes",
    ),
]
Hop = Annotated[
    float | None,
    typer.Option(help="Seconds from window to window.", show_default="half a window"),
]
TimelineOut = Annotated[
    pathlib.Path | None,
    typer.Option(
        help="Name of the timeline's files, without .csv and .png; an earlier timeline that "
        "nobody edited is replaced.",
        show_default="NAME_timeline here",
    ),
]

# === choose ===

Folder = Annotated[
    pathlib.Path,
    typer.Argument(help="Folder with the card.json of an export.", show_default=False),
]
Budget = Annotated[
    str | None,
    typer.Option(help="Time for a clip: 20ms, 0.02s or 20 (ms).", show_default=False),
]
MaxMb = Annotated[
    float | None, typer.Option(min=0.001, help="Largest file size in MB.", show_default=False)
]
Threads = Annotated[int, typer.Option(min=1, help="Number of threads for a clip.")]

ChooseFormats = Annotated[
    str,
    typer.Option(help="Formats to choose from: serving, mobile and mediapipe (.tflite), onnx."),
]

# === report ===

ResultFiles = Annotated[
    list[pathlib.Path],
    typer.Argument(
        help="JSON files that `flexast evaluate --sweep ... --json` printed, and folders of them.",
        show_default=False,
    ),
]
ReportOut = Annotated[pathlib.Path, typer.Option(help="Folder to write.", show_default=False)]

# === embed ===

EmbedOut = Annotated[pathlib.Path, typer.Option(help="File to write, .npz.", show_default=False)]

# === export ===

ExportOut = Annotated[
    pathlib.Path | None,
    typer.Option(help="Folder to write.", show_default="saved_models/NAME OF THE RUN"),
]
ExportPatchSizes = Annotated[
    str,
    typer.Option(help="Patch sizes, each a signature for the server and files for phones."),
]
Formats = Annotated[
    str,
    typer.Option(
        help="Formats: serving (TensorFlow Serving), mobile (.tflite), onnx, mediapipe (.tflite "
        "for MediaPipe)."
    ),
]
Precisions = Annotated[
    str | None,
    typer.Option(
        help=f"Precisions of the .tflite files: {', '.join(PRECISIONS)}. int8 needs --data.",
        show_default="all that can be",
    ),
]
Data = Annotated[
    pathlib.Path | None,
    typer.Option(
        help="Data, as for train: its training clips give int8 its scales, its test clips "
        "measure every artifact for the model card and `flexast choose`.",
        show_default=False,
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        help="Length of every clip on phones and in onnx.",
        show_default="the longest training clip",
    ),
]
MaxSeconds = Annotated[
    float, typer.Option(min=0.1, help="Length of the longest clip that the server accepts.")
]
ExportInput = Annotated[
    Input, typer.Option(help="Input of .tflite and onnx; features are normalized log-mel.")
]
Keep = Annotated[
    int,
    typer.Option(
        min=1,
        help="Number of the server's versions that stay after --overwrite, the newest; what its "
        "configuration named until then stays, too.",
    ),
]
