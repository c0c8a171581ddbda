"""One clip of 10 s through `.tflite` files of the base model, and through PyTorch's AST.

KERAS_BACKEND=tensorflow python examples/benchmarks/mobile.py --precision float32,dynamic,int8

The files hear the waveform; PyTorch is given its features. Needs ai-edge-litert, and torch
and transformers for the peer.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

SAMPLES = 400 + 1023 * 160  # 1,024 frames
CLASSES, PATCHES, SEED = 527, (16, 32), 0
PEER = "PyTorch, patch 16"


def build(folder, precisions, size):
    """Write a file for each precision and patch size, of random weights."""
    import keras

    from keras_flexast import ElasticAST
    from keras_flexast.export import FixedOptions, write_tflite
    from keras_flexast.runs import Run
    from tf_data_pipelines import FbankSettings, PackSettings

    keras.utils.set_random_seed(SEED)
    names = tuple(f"class {index}" for index in range(CLASSES))
    model = ElasticAST(CLASSES, size)
    run = Run(
        model, FbankSettings(), patches=model.patch_settings(), packing=PackSettings(),
        classes=names, multi_label=True, clip_seconds=SAMPLES / 16000,
    )  # fmt: skip
    noise = np.random.default_rng(SEED).normal(scale=0.1, size=(4, SAMPLES)).astype("float32")
    for precision in precisions:
        options = FixedOptions(precision=precision, calibration=noise)
        for patch in PATCHES:
            path = folder / f"{precision}, patch {patch}.tflite"
            write_tflite(run, path, patch_size=patch, options=options)


def tflite(path, threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    waveform = np.random.default_rng(SEED).normal(scale=0.1, size=(1, SAMPLES))
    interpreter.set_tensor(given["index"], waveform.astype("float32"))
    return interpreter.invoke


def peer(size, threads):
    """Hugging Face's AST in PyTorch, eager, at stride 16: as many tokens as patch 16 has."""
    import torch
    from transformers import ASTConfig, ASTForAudioClassification

    from keras_flexast.settings import SIZES

    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    dim, depth, heads = SIZES[size]
    config = ASTConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * dim, frequency_stride=16, time_stride=16, num_labels=CLASSES,
    )  # fmt: skip
    model = ASTForAudioClassification(config).eval()
    features = torch.randn(1, 1024, 128)

    @torch.inference_mode()
    def forward():
        return model(features).logits

    return forward


def serve(name, path, size, threads):
    """Time one clip for each line that comes in, after three that warm up."""
    forward = peer(size, threads) if name == PEER else tflite(path, threads)
    for _ in range(3):
        forward()
    print("READY", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        forward()
        print("SECONDS", time.perf_counter() - start, flush=True)


def answer(worker, word):
    """The rest of the next line that begins with a word; libraries print others."""
    for line in worker.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise SystemExit(f"{worker.args[-1]} ended with {worker.wait()}.")


def time_in_turns(again, paths, rounds):
    """{name: seconds of each round}, of {name: path}."""
    from rich.progress import track

    # A process each, so that no thread pool disturbs another; they take turns.
    workers = {
        name: subprocess.Popen(
            [*again, "--serve", name, str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for name, path in paths.items()
    }  # fmt: skip
    for worker in workers.values():
        answer(worker, "READY")
    seconds = {name: [] for name in paths}
    for _ in track(range(rounds), "Timing in turns"):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            seconds[name].append(float(answer(worker, "SECONDS")))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="base")
    parser.add_argument("--precision", default="float32", help="float32,float16,dynamic,int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--build", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    precisions = options.precision.split(",")
    if options.build:
        build(options.build, precisions, options.size)
        return
    if options.serve:
        serve(*options.serve, options.size, options.threads)
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    again = [
        sys.executable, __file__, "--size", options.size, "--precision", options.precision,
        "--threads", str(options.threads),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        with console.status("Writing the files"):
            done = subprocess.run([*again, "--build", folder], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"writing the files failed:\n{done.stderr[-2000:]}")
        paths = {path.stem: path for path in pathlib.Path(folder).glob("*.tflite")}
        megabytes = {name: path.stat().st_size / 1e6 for name, path in paths.items()}
        names = sorted(paths) + [PEER] * (not options.no_peer)
        seconds = time_in_turns(
            again, {name: paths.get(name, "") for name in names}, options.rounds
        )
    base = np.median(seconds.get("float32, patch 16", next(iter(seconds.values()))))
    threads = "thread" if options.threads == 1 else "threads"
    console.print(f"{options.size}, 10 s, {options.threads} {threads}, {options.rounds} rounds")
    table = Table("one clip", "ms", "spread", "times as fast", "MB")
    for name, times in seconds.items():
        table.add_row(
            name,
            f"{1e3 * np.median(times):.1f}",
            f"{1e3 * min(times):.1f}-{1e3 * max(times):.1f}",
            f"{base / np.median(times):.2f}",
            f"{megabytes[name]:.1f}" if name in megabytes else "",
        )
    console.print(table)
    if options.json:
        report = {
            "size": options.size, "threads": options.threads, "seconds": seconds,
            "megabytes": megabytes,
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
