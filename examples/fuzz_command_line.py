"""Generated command lines over good and damaged files: none may end in a traceback.

python examples/fuzz_command_line.py --commands 10000

Every line is made from its number alone: its command, its options, good and odd values, and files
that are whole or damaged. It runs `flexast` in a process that runs many lines. A line is a fault
unless it ends with 0, 1 or 2 and, where it fails, with a sentence; leaves nothing half-written;
changes no file that is not this program's; and, of `predict --json`, prints JSON. Lines of `demo`
only name folders that it must refuse, because it takes minutes.

10,000 lines take an hour or two of one core; two folders and two seeds share them out.

FOLDER/results.jsonl holds a line for each command line. Started again, the ones that are in it are
left out, and one that ended its process is a fault.
"""

import argparse
import collections
import contextlib
import inspect
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import typing

import typer

RATE = 16000
LINES_OF_A_PROCESS = 300  # every loaded model leaves something in memory
LIMIT_S = 600  # of a line, on a busy machine; only a training and an export take over a minute
LIMIT_GB = 4.0
TIMELINE = ("timeline", "window", "hop", "timeline_out")  # options that belong together
SLOW = ("hour.wav", "minute.wav")  # they take seconds, so they are rare
LONGEST_ERROR = 15  # lines; some name a few files, one on each line
COMMANDS = {
    "predict": 36, "embed": 14, "stats": 10, "evaluate": 10, "convert": 10, "choose": 8, "train": 6,
    "prepare": 5, "export": 4, "demo": 1, "[/b]": 1,
}  # fmt: skip
ODD = (
    "", " ", ".", "-", "--", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e400", "1e-9",
    "1.5", "99999999999999999999", "100000000", "16", "8,16", "16x24", "0x0", "8x1", "200", "16x",
    "x", ",", "1x4000", "8x100000000", "[/b]", "[red]", "$\\frac$", ":dog:", "a\nb", "é猫",
    "\udcff", "a" * 300, "None", "True", "../x", "nowhere/x", "http://x", "%s{}", "\x1b[31m",
)  # fmt: skip
GOOD = {
    "patch_size": ("8", "16", "32", "16x24", "48"),
    "patch_sizes": ("16", "8,32", "16x24"),
    "base_patch": ("16", "8"),
    "stride": ("10", "16"),
    "frame_shift_ms": ("10", "20"),
    "frame_shifts_ms": ("10,20",),
    "window": ("0.1", "0.5", "2"),
    "hop": ("0.05", "1"),
    "split": ("train", "validation", "test", "all"),
    "budget": ("20ms", "0.1s", "1"),
    "formats": ("mobile", "serving", "onnx"),
    "precisions": ("float32", "dynamic"),
    "ignore": ("head.*", "x"),
    "learning_rate": ("0.001",),
    "epochs": ("1",),
    "row_length": ("256", "16"),
    "seconds": ("0.5", "0.2"),
    "max_seconds": ("1", "0.5"),
    "classes": ("3", "7"),
    "validation": ("0.2", "0"),
    "test": ("0.1", "0.3"),
}  # fmt: skip


# === Files ===


def make_files(root):
    """Good files below `root`, {kind: paths}, and damaged ones under the kind + "?"."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)

    def sound(path, seconds=0.3, channels=1, rate=RATE, **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(round(rate * seconds)) / rate
        tone = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 2000) * time)[:, None]
        soundfile.write(path, tone + rng.normal(0, 0.01, (len(time), channels)), rate, **options)
        return path

    data, rows = root / "data", ["path,label,split"]
    for name in ("low", "[mid]", "$high"):
        for number in range(8):
            path = sound(data / name / f"{number}.wav", 0.2 + 0.03 * number)
            split = ("train", "validation", "test")[max(0, number - 5)]
            rows.append(f"{path},{name},{split}")
    manifests = [root / name for name in ("clips.csv", "labels.csv")]
    manifests[0].write_text("\n".join(rows) + "\n")
    manifests[1].write_text("\n".join(row.replace(",low", ",low;x") for row in rows) + "\n")
    sounds = root / "sounds"
    kinds = {
        "sound": [
            sound(sounds / "a.wav"),
            sound(sounds / "[/b].wav", rate=22050, channels=2),
            sound(sounds / "$c$.flac", rate=44100),
            sound(sounds / "d e.ogg"),
            sound(sounds / "é猫.mp3", rate=48000),
            sound(sounds / "no utf.wav").rename(sounds / os.fsdecode(b"\xff.wav")),
            sound(sounds / "float.wav", subtype="FLOAT"),
            sound(sounds / "short.wav", 0.01),
            sound(sounds / "tiny.wav", 0.03),
            sound(sounds / "minute.wav", 60.0, rate=8000),
            _hour(sounds / "hour.wav"),
        ],
        "data": [data, sounds, *manifests],
    }
    kinds["run"] = [_tiny_run(root / "run")]
    kinds["export"] = [_export(kinds["run"][0], root / "export", manifests[0])]
    made = kinds["export"][0]
    kinds["artifact"] = [
        *sorted(made.glob("*/*.tflite")),
        *made.glob("onnx/*.onnx"),
        made / "serving",
    ]
    checkpoints = pathlib.Path(__file__).parents[1] / "tests" / "data"
    kinds["checkpoint"] = [_checkpoint(root / "vit.npz"), checkpoints / "hf_ast_plain"]
    kinds["checkpoint"] += sorted((checkpoints / "torch").glob("*.pth"))
    for kind in ("sound", "data", "run", "export", "artifact", "checkpoint"):
        kinds[f"{kind}?"] = _damaged(
            kinds[kind], root / "damaged" / kind, 6 * len(kinds[kind]) + 20
        )
    return {kind: [os.fspath(path) for path in paths] for kind, paths in kinds.items()}


def _hour(path):
    """A sparse WAV of an hour, silent but for its beginning."""
    size = 3600 * RATE * 2
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    with open(path, "wb") as file:
        file.write(b"RIFF" + struct.pack("<I", size + 36) + b"WAVE" + form)
        file.write(b"data" + struct.pack("<I", size) + random.Random(0).randbytes(RATE))
        file.truncate(size + 44)
    return path


def _tiny_run(folder):
    from keras_flexast import FlexiAST, Run
    from keras_flexast.runs import save_run
    from tf_data_pipelines.settings import FbankSettings, PackSettings

    classes = ("$high", "[mid]", "low")
    model = FlexiAST(len(classes), dim=8, depth=1, num_heads=2, grid=(8, 64), segments=4)
    packing = PackSettings(rows=2, row_length=256, segments=4)
    run = Run(
        model, FbankSettings(), patches=model.patch_settings(), packing=packing, classes=classes,
        clip_seconds=0.4,
    )  # fmt: skip
    folder.mkdir()
    save_run(run, folder)
    return folder


def _export(run, out, data):
    from keras_flexast import export_run

    export_run(
        run, out, patch_sizes=[16, 32], formats=["serving", "mobile", "onnx"],
        precisions=["float32"], data=data,
    )  # fmt: skip
    return out


def _checkpoint(path):
    import numpy as np

    np.savez(path, **{"patch_embed.proj.weight": np.ones((8, 3, 16, 16), "float32")})
    return path


def _damaged(paths, folder, count):
    """Copies of files, or of folders with one file damaged."""
    rng, made = random.Random(os.fspath(folder)), []
    for number in range(count):
        original = rng.choice(paths)
        copy = folder / str(number) / original.name
        if original.is_dir():
            shutil.copytree(original, copy)
            file = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file()))
        else:
            copy.parent.mkdir(parents=True)
            if original.stat().st_size > 10**7:
                continue  # the hour
            shutil.copy(original, copy)
            file = copy
        _damage(file, rng)
        made.append(copy)
    return made


def _damage(file, rng):
    content, way = bytearray(file.read_bytes()), rng.randrange(8)
    middle = rng.randrange(len(content) or 1)
    if way == 0:
        file.unlink()
        return
    if way == 1:
        content = b""
    elif way == 2:
        content = content[:middle]
    elif way == 3:
        content = b"not what it says\n" * rng.randrange(1, 100)
    elif way == 4:
        content = content[:middle] + rng.randbytes(64) + content[middle:]
    elif way == 5:
        content[middle : middle + 4] = b"\xff\xff\xff\x7f"
    elif way == 6:
        content = content + content
    else:
        for place in rng.sample(range(len(content)), min(len(content), rng.randrange(1, 30))):
            content[place] = rng.randrange(256)
    file.write_bytes(content)


def make_scratch(folder, run):
    """What a user has: nothing of it may change, but for a run or picture that is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in (
        ("docs/thesis.tex", "mine"), ("mine/low/0.wav", "sound"), ("x.partial/a", "."),
        ("x.wav", "sound"), ("x.csv", "start,end,a\n0,1,0.5\n"), ("x.png", "a"), ("x.npz", "b"),
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    shutil.copytree(run, folder / "old")
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("docs")
    (folder / "link.png").symlink_to("x.wav")


OUTPUTS = (
    "new", "new.png", "new.npz", "deep/er/new", "docs", "x.wav", "x.csv", "x", "x.png", "x.npz",
    "mine", "mine/low", "mine/low/0.wav", "old", "empty", "link", "link.png", "x.wav/new", "/", ".",
    "..", "/dev/null", "/proc/new", "[/b].png", "[/b].npz", "new\n.png",
)  # fmt: skip


# === Command lines ===


def command_line(number, seed, files, cli):
    """The arguments of line `number`."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choices(list(COMMANDS), COMMANDS.values())[0]
    commands = typer.main.get_command(cli.app).commands
    if name not in commands or rng.random() < 0.01:
        return [name, *rng.choices(ODD, k=rng.randrange(4))]
    words, with_timeline = [], rng.random() < 0.15
    for param in commands[name].params:
        if param.name in TIMELINE and not with_timeline:
            continue
        is_argument = param.param_type_name == "argument"
        wanted = 0.98 if is_argument or param.required else 0.06
        if param.name in ("help", "batch_clips", "batch_tokens") or rng.random() > wanted:
            continue
        many = is_argument and param.nargs == -1 and not with_timeline
        count = rng.choice((1, 1, 2, 3)) if many else 1
        values = [_value(rng, cli, param, files=files, command=name) for _ in range(count)]
        if is_argument:
            words += values
        else:
            words += [param.opts[0]] + ([] if param.is_flag else values)
    if name == "predict" and with_timeline:
        words += ["--timeline"]
    if name == "evaluate" and rng.random() < 0.9:  # not at ten patch sizes
        words += ["--patch-sizes", "16"]
    if name == "demo":
        words = ["--out", rng.choice(("docs", "mine", "x.wav", "link", ".", "old"))]
    if name == "train":  # a training takes a minute, so it is rare, and short
        words += ["--size", "nano", "--epochs", "1", "--batch-tokens", "64"]
        words += (
            [] if rng.random() < 0.03 else ["--patch-sizes", rng.choice(("300", "16x", "200,16"))]
        )
    if name == "export":  # so is an export
        words += ["--patch-sizes", "16" if rng.random() < 0.02 else rng.choice(("300", "0", "8x"))]
        words += ["--precisions", "float32"] if rng.random() < 0.5 else []
    return [name, *words]


def _value(rng, cli, param, *, files, command):
    """A value for an argument or an option."""
    kind = {
        "files": "sound", "data": "data", "folder": "export", "source": "checkpoint", "init": "run",
    }.get(param.name)  # fmt: skip
    if param.name == "run":
        kind = "run" if command == "export" or rng.random() < 0.12 else "artifact"
    chance = rng.random()
    if param.name in ("out", "figure", "timeline_out"):
        if chance < 0.6:
            return "new" + {"embed": ".npz"}.get(command, ".png" * (param.name == "figure"))
        return rng.choice(OUTPUTS) if chance < 0.95 else rng.choice(ODD)
    if kind:
        if chance < 0.05:
            return rng.choice([*ODD, "docs", "mine", "x.wav", "empty", "old", "/dev/null"])
        if chance < 0.1:
            kind = rng.choice(("sound", "data", "run", "export", "artifact", "checkpoint"))
        pool = files[kind + "?" * (rng.random() < 0.4)]
        if command == "embed" and kind == "artifact":  # the others have no embeddings
            pool = [path for path in pool if path.endswith("serving")]
        if rng.random() < 0.98:
            pool = [path for path in pool if not path.endswith(SLOW)]
        return rng.choice(pool)
    if chance < 0.15:
        return rng.choice(ODD)
    choices = _choices(inspect.signature(getattr(cli, command)).parameters[param.name].annotation)
    if choices:
        return rng.choice(choices)
    return rng.choice(GOOD.get(param.name, ("1", "2", "3")))


def _choices(annotation):
    """The texts of a Literal inside an annotation; () if there is none."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return inner
    return next(filter(None, map(_choices, inner)), ())


# === Running and judging ===


class TooLongError(BaseException):
    """No command catches it."""


def run_line(cli, words, scratch):
    """(exit code, standard output, standard error, exception that was not caught)."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    failed, code, argv, here = None, 0, sys.argv, os.getcwd()
    os.chdir(scratch)
    sys.argv = ["flexast", *words]
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException as error:  # what a user would see as a traceback
        failed = error
    finally:
        signal.alarm(0)
        os.chdir(here)
        sys.argv = argv
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return code, *texts, failed


def judge(words, code, *, out, err, failed):
    """What is wrong with how a line ended; "" for nothing."""
    if failed is not None:
        trace, last = failed.__traceback__, ""
        while trace:
            last, trace = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
        return f"{type(failed).__name__}: {str(failed)[:300]} ({last})"
    if code not in (0, 1, 2):
        return f"exit code {code!r}"
    for sign in ("Traceback", "in user code", 'File "', "object at 0x", "Errno", "{{node"):
        if sign in err:
            return f"{sign!r} in the error"
    if code == 1 and "Error: " not in err:
        return "no sentence"
    if code == 1 and err.count("\n") > LONGEST_ERROR:
        return "an error of many lines"
    options = words[: words.index("--")] if "--" in words else words
    if words[0] == "predict" and "--json" in options and code != 2:
        try:
            if not isinstance(json.loads(out), list):
                return "the JSON is no list"
        except ValueError:
            return "no JSON"
    return ""


def contents(*folders):
    """{path: (size, time of change)} of every file."""
    found = {}
    for folder in folders:
        for path, _, names in os.walk(folder):
            for name in names:
                state = os.lstat(os.path.join(path, name))
                found[os.path.join(path, name)] = state.st_size, state.st_mtime_ns
    return found


def run_some(root, seed, numbers):
    """Run these lines and add them to the results."""

    def too_long(*_):
        raise TooLongError(f"over {LIMIT_S} s")

    signal.signal(signal.SIGALRM, too_long)
    sys.argv[0] = "flexast"
    from keras_flexast import cli

    files, scratch = json.loads((root / "files.json").read_text()), root / "scratch"
    inputs = contents(root / "files")
    for number in numbers:
        words = command_line(number, seed, files, cli)
        make_scratch(scratch, files["run"][0])
        mine = contents(*(scratch / name for name in ("docs", "mine", "x.partial")))
        mine |= {path: one for path, one in contents(scratch).items() if "/x." in path}
        (root / "current.json").write_text(json.dumps({"number": number, "words": words}))
        start, before = time.perf_counter(), _gigabytes()
        code, out, err, failed = run_line(cli, words, scratch)
        fault = judge(words, code, out=out, err=err, failed=failed)
        seconds = time.perf_counter() - start
        lost = [path for path, state in {**mine, **inputs}.items() if _state(path) != state]
        left = [path for path in contents(scratch) if "/." in path and ".partial" in path]
        if lost or left:
            fault = f"{fault} lost {lost[:3]} left {left[:3]}"
        if _gigabytes() > max(LIMIT_GB, before + 1):
            fault = f"{fault} {_gigabytes():.1f} GB"
        result = {
            "number": number, "words": words, "code": code, "seconds": round(seconds, 2),
            "fault": fault, "error": err[-400:],
        }  # fmt: skip
        with open(root / "results.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
    (root / "current.json").unlink(missing_ok=True)


def _state(path):
    try:
        state = os.lstat(path)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _gigabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_results(root):
    path = root / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record_death(root, status):
    """Add the line that ended its process to the results."""
    current = root / "current.json"
    if current.exists():
        died = {**json.loads(current.read_text()), "code": None, "seconds": 0}
        died |= {"fault": f"the process ended with {status}", "error": ""}
        with open(root / "results.jsonl", "a") as file:
            file.write(json.dumps(died) + "\n")
        current.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commands", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, default="/tmp/flexast-fuzz")
    parser.add_argument("--only", help="numbers to run in this process, such as 3,17")
    options = parser.parse_args()
    root = options.folder.absolute()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["HF_HUB_OFFLINE"] = "1"  # names that do not exist are looked up nowhere
    if not (root / "files.json").exists():
        shutil.rmtree(root / "files", ignore_errors=True)
        (root / "files").mkdir(parents=True)
        (root / "files.json").write_text(json.dumps(make_files(root / "files")))
    if options.only:
        run_some(root, options.seed, [int(one) for one in options.only.split(",")])
        return
    record_death(root, "a kill")
    while True:
        done = {one["number"] for one in read_results(root)}
        numbers = [n for n in range(options.commands) if n not in done][:LINES_OF_A_PROCESS]
        if not numbers:
            break
        some = [
            "--folder",
            root,
            "--seed",
            str(options.seed),
            "--only",
            ",".join(map(str, numbers)),
        ]
        status = subprocess.run([sys.executable, __file__, *some]).returncode
        record_death(root, status)
        print(f"{len(done) + len(numbers)} lines", flush=True)
    results = read_results(root)
    codes = collections.Counter(one["code"] for one in results)
    faults = [one for one in results if one["fault"]]
    print(f"{len(results)} lines, exit codes {dict(codes)}, {len(faults)} faults")
    for one in faults[:50]:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
