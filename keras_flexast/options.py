"""What several commands of the command line share: choices, options, and texts as values."""

import csv
import enum
import pathlib
from typing import Annotated

import typer


class Input(enum.StrEnum):
    waveform = "waveform"
    features = "features"


class Pooling(enum.StrEnum):
    attention = "attention"
    cls = "cls"
    cls_distillation = "cls_distillation"
    mean = "mean"


class Size(enum.StrEnum):
    nano = "nano"
    tiny = "tiny"
    small = "small"
    base = "base"


class Remainder(enum.StrEnum):
    cover = "cover"
    crop = "crop"
    pad = "pad"


class Position(enum.StrEnum):
    physical = "physical"
    grid = "grid"


class Overlong(enum.StrEnum):
    error = "error"
    crop = "crop"


class Resize(enum.StrEnum):
    pi = "pi"
    bilinear = "bilinear"


class Dtype(enum.StrEnum):
    float32 = "float32"
    mixed_bfloat16 = "mixed_bfloat16"
    mixed_float16 = "mixed_float16"


class Family(enum.StrEnum):
    ast = "ast"
    ssast = "ssast"
    flexiast = "flexiast"
    elasticast = "elasticast"
    vit = "vit"
    deit = "deit"


class Target(enum.StrEnum):
    flexiast = "flexiast"
    elasticast = "elasticast"


class TableRule(enum.StrEnum):
    ast = "ast"
    resize = "resize"


def parse_patch_sizes(text):
    """ "8,16x24" -> ((8, 8), (16, 24)): frequency x time."""
    try:
        sizes = [tuple(int(number) for number in part.split("x")) for part in text.split(",")]
        if any(len(size) > 2 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of patch sizes such as 16 or 8,16,24x32 (frequency x time)."
        ) from None
    return tuple(size if len(size) == 2 else size * 2 for size in sizes)


def parse_milliseconds(text):
    """ "20ms", "0.02s" or "20" -> 20.0; "" -> None."""
    if not text:
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
        raise typer.BadParameter(f"{text!r} is not a time such as 20ms, 0.02s or 20.") from None
    return value


def parse_numbers(text):
    """ "10,20" -> (10.0, 20.0)."""
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 10,20.") from None


def parse_pair(text, name):
    """ "10" or "10x5" as (frequency, time); None for an empty text."""
    sizes = parse_patch_sizes(text) if text else (None,)
    if len(sizes) != 1:
        raise typer.BadParameter(f"{name} {text!r} must be one size.")
    return sizes[0]


def parse_words(text):
    """ "serving,mobile" -> ("serving", "mobile")."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def parse_classes(text):
    """None, a number, or the names in a file: one a line, or a CSV with `display_name`."""
    if not text:
        return None
    if text.isdigit():
        return int(text)
    path = pathlib.Path(text)
    if not path.is_file():
        raise typer.BadParameter(f"--classes {text!r} is neither a number nor a file.")
    with open(path, newline="") as file:
        if path.suffix != ".csv":
            return [line.strip() for line in file if line.strip()]
        rows = csv.DictReader(file)
        if "display_name" not in (rows.fieldnames or ()):
            raise typer.BadParameter(f"{path} has no column display_name.")
        return [row["display_name"] for row in rows]


RunArgument = Annotated[
    pathlib.Path,
    typer.Argument(help="Folder that train, convert or demo wrote.", show_default=False),
]
ModelArgument = Annotated[
    pathlib.Path,
    typer.Argument(
        help="Folder that train, convert or demo wrote, or an exported artifact: .tflite, .onnx, "
        "SavedModel.",
        show_default=False,
    ),
]
DataArgument = Annotated[
    pathlib.Path,
    typer.Argument(
        help="Folder with one folder per class (or train/ validation/ test/ of these), or a CSV "
        "manifest with the columns path, label and perhaps split.",
        show_default=False,
    ),
]
FilesArgument = Annotated[
    list[pathlib.Path], typer.Argument(help="Sound files.", show_default=False)
]
PatchSize = Annotated[
    str | None,
    typer.Option(
        help="Patch size, or frequency x time: 16, 16x24. Larger is faster. The model's own if "
        "not given.",
        show_default=False,
    ),
]
ResizeRun = Annotated[
    Resize | None,
    typer.Option(
        help="How other patch sizes than the model's own are treated; as trained if not given.",
        show_default=False,
    ),
]
FullLength = Annotated[
    bool,
    typer.Option(
        "--full-length",
        help="Hear each clip at its own length, where a converted AST cuts or fills up.",
    ),
]
FrameShift = Annotated[
    float,
    typer.Option(min=0, help="Milliseconds a frame; 0 for that of training. Longer is faster."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
