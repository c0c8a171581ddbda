"""One batch of mixed clips of 1-10 s: packed rows, against Hugging Face's AST on padded clips.

python examples/benchmarks/inference.py --size base [--json PATH]   # needs transformers, torch

The same weights on two threads: Hugging Face pads each clip to 1,024 frames, as its extractor
does; ours are one packed row of the clips' own lengths. Features are made before.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

CLIPS, CLASSES, FRAMES, STRIDE = 16, 527, 1024, 16
SEED, REPEATS, THREADS = 0, 5, 2
SIZES = {"tiny": (192, 12, 3), "base": (768, 12, 12)}  # dim, depth, heads
CONTENDERS = {"TensorFlow": "tensorflow", "JAX": "jax", "Hugging Face": None}


def write_inputs(folder, size):
    """The weights, the clips padded and packed, and one clip of full length for both."""
    import tensorflow as tf
    from transformers import ASTConfig, ASTForAudioClassification

    from tf_data_pipelines import PackSettings, PatchSettings, pack, patch_tokens
    from tf_data_pipelines.packing import batch_rows

    dim, depth, heads = SIZES[size]
    config = ASTConfig(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * dim, max_length=FRAMES, num_mel_bins=128, patch_size=16,
        frequency_stride=STRIDE, time_stride=STRIDE, num_labels=CLASSES,
    )  # fmt: skip
    ASTForAudioClassification(config).save_pretrained(folder / "ast")
    rng = np.random.default_rng(SEED)
    frames = 1 + (rng.uniform(1, 10, CLIPS) * 16000 - 400).astype(int) // 160
    clips = [rng.normal(0, 0.5, (count, 128)).astype("float32") for count in frames]
    full = rng.normal(0, 0.5, (FRAMES, 128)).astype("float32")
    patches = PatchSettings((16,), remainder="crop", position="grid", prefix_tokens=2)

    def packed(spectrograms):
        def clip(number):
            tokens, positions = cut[number]
            return {"tokens": tokens, "positions": positions, "label": 0, "clip_id": number}

        cut = [patch_tokens(one, patches) for one in spectrograms]
        row_length = -(-sum(len(tokens) for tokens, _ in cut) // 128) * 128
        settings = PackSettings(1, row_length, len(cut))
        width = {"tokens": (None, 256), "positions": (None, 4), "label": (), "clip_id": ()}
        types = dict.fromkeys(("tokens", "positions"), tf.float32)
        types |= {"label": tf.int32, "clip_id": tf.int64}
        spec = {name: tf.TensorSpec(width[name], types[name]) for name in width}
        source = tf.data.Dataset.from_generator(
            lambda: map(clip, range(len(cut))), output_signature=spec
        )
        (batch,) = batch_rows(pack(source, settings), settings).as_numpy_iterator()
        return {name: batch[name] for name in ("tokens", "positions", "segment_ids")}

    padded = np.stack([np.pad(one, [[0, FRAMES - len(one)], [0, 0]]) for one in clips])
    np.savez(folder / "padded.npz", clips=padded, full=full[None])
    for name, spectrograms in (("clips", clips), ("full", [full])):
        np.savez(folder / f"packed_{name}.npz", **packed(spectrograms))
    return frames


def ours(folder):
    """Function of "clips" or "full" to logits, by the packed model."""
    from keras_flexast import convert_checkpoint
    from keras_flexast.inference.scoring import PackedPredictor

    predictor = PackedPredictor(convert_checkpoint(str(folder / "ast")))
    inputs = {name: dict(np.load(folder / f"packed_{name}.npz")) for name in ("clips", "full")}

    def logits(name):
        return predictor(inputs[name])

    return logits


def hugging_face(folder):
    import torch
    from transformers import ASTForAudioClassification

    torch.set_num_threads(THREADS)
    model = ASTForAudioClassification.from_pretrained(folder / "ast").eval()
    inputs = {name: torch.from_numpy(x) for name, x in np.load(folder / "padded.npz").items()}

    def logits(name):
        with torch.inference_mode():
            return model(inputs[name]).logits.numpy()

    return logits


def serve(name, folder):
    """Answer each line of the input: the seconds of one more batch, after one that compiles."""
    logits = (ours if CONTENDERS[name] else hugging_face)(folder)
    np.save(folder / f"{name}.npy", logits("full").reshape(-1, CLASSES)[0])
    logits("clips")
    print("READY", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        logits("clips")
        print("SECONDS", time.perf_counter() - start, flush=True)


def start(name, size, folder):
    backend = CONTENDERS[name] or "tensorflow"
    command = [sys.executable, __file__, "--size", size, "--serve", name, "--folder", str(folder)]
    with open(folder / f"{name}.err", "w") as log:
        process = subprocess.Popen(
            command, env={**os.environ, "KERAS_BACKEND": backend}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
        )  # fmt: skip
    answer(process, "READY", folder / f"{name}.err")
    return process


def answer(process, word, log):
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise SystemExit(f"a contender ended:\n{log.read_text()[-2000:]}")


def measure(size, folder):
    """Seconds of each contender, in turn, so that all meet the same neighbors."""
    frames = write_inputs(folder, size)
    seconds = {name: [] for name in CONTENDERS}
    with contextlib.ExitStack() as stack:
        processes = {}
        for name in CONTENDERS:
            processes[name] = stack.enter_context(start(name, size, folder))
            stack.callback(processes[name].stdin.close)
        for _ in range(REPEATS):
            for name, process in processes.items():
                process.stdin.write("go\n")
                process.stdin.flush()
                seconds[name].append(float(answer(process, "SECONDS", folder / f"{name}.err")))
    one, *others = (np.load(folder / f"{name}.npy") for name in CONTENDERS)
    difference = max(float(np.abs(one - other).max()) for other in others)
    return {"size": size, "frames": frames.tolist(), "seconds": seconds, "difference": difference}


def main():
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])  # and of its children
    console = Console()
    with console.status("Timing"), tempfile.TemporaryDirectory() as folder:
        result = measure(options.size, pathlib.Path(folder))
    peer = statistics.median(result["seconds"]["Hugging Face"])
    table = Table(f"{options.size}, {CLIPS} clips", "seconds", "spread", "Hugging Face's over it")
    for name, seconds in result["seconds"].items():
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
        table.add_row(name, f"{middle:.2f}", spread, f"{peer / middle:.2f}")
    console.print(table)
    console.print(
        f"Largest difference of logits, a clip of full length: {result['difference']:.1e}"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
