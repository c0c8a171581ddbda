"""Training step and inference on one GPU: our kernels, and the peers on the same clips.

KERAS_BACKEND=jax python train.py batches.npz [--size base] [--peer ELASTICAST] [--json PATH]

batches.npz is from `batches.py`; this script needs no TensorFlow. Each case is a process of its
own, in bfloat16. Ours is trained by `model.fit`, as users do; steps are not waited for one by one.
The useful operations are those of the real tokens and of the pairs of tokens of
one clip; their rate is divided by that of plain matrix products in bfloat16, measured beside it.
The peers learn from the same clips: padded to the longest one of the batch (Hugging Face's AST
with scaled dot-product attention, timm's NaFlexVit), and in the ElasticAST authors' packing, all
under autocast; they need PyTorch, and what is not installed is left out.
"""

import argparse
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

from keras_flexast.settings import SIZES

CLASSES, WIDTH = 10, 256
GROUPS, STEPS = 5, 10  # a time is that of STEPS steps; the median is over GROUPS of them
OURS = ("auto", "clip_triton", "clip_bands", "dense")
CASES = {
    "matrix products": lambda given: products(),
    **{name: lambda given, name=name: ours(given, name) for name in OURS},
    "auto, random patch sizes": lambda given: ours(given, "auto", kind="random"),
    "auto, inference": lambda given: ours(given, "auto", training=False),
    "Hugging Face AST": lambda given: hugging_face(given),
    "NaFlexVit": lambda given: naflexvit(given),
    "ElasticAST authors": lambda given: authors(given),
}


def read(path, kind):
    arrays = np.load(path)
    names = "positions", "segment_ids", "labels", "weights"
    return [dict(zip(names, one, strict=True))
            for one in zip(*(arrays[f"{kind}_{name}"] for name in names), strict=True)]  # fmt: skip


def clip_lengths(batch):
    """Tokens of every clip of a batch."""
    counts = (np.bincount(row)[1:] for row in batch["segment_ids"])
    return np.concatenate([*counts])


def operations(size, lengths):
    """Useful floating-point operations of a training step: forward and twice as many backward."""
    dim, depth, _ = SIZES[size]
    each = 2 * (12 * depth * dim**2 + WIDTH * dim)
    return 3 * float(np.sum(lengths * each) + np.sum(4 * depth * dim * lengths.astype(float) ** 2))


def timed(step, wait, batches):
    """Seconds of a step, after one of each batch; see `summary`."""
    start = time.perf_counter()
    for batch in batches:
        wait(step(batch))
    first, seconds = time.perf_counter() - start, []
    for _ in range(GROUPS):
        start = time.perf_counter()
        for number in range(STEPS):
            last = step(batches[number % len(batches)])
        wait(last)
        seconds.append((time.perf_counter() - start) / STEPS)
    return summary(first, seconds)


def summary(first, seconds):
    """Median, least and most seconds of a step, and those of all that came before."""
    return {"seconds": float(np.median(seconds)), "least": min(seconds), "most": max(seconds),
            "first": first}  # fmt: skip


# === Ours ===


def products(width=8192):
    """Operations a second of matrix products in bfloat16."""
    import jax
    import jax.numpy as jnp

    width = width if jax.default_backend() == "gpu" else 1024
    a, b = (jax.random.normal(jax.random.key(n), (width, width), jnp.bfloat16) for n in range(2))
    many = jax.jit(lambda a, b: jax.lax.fori_loop(0, 8, lambda _, x: (x @ b) * 0.01, a))
    found = timed(lambda batch: many(a, b), jax.block_until_ready, [None])
    return {**found, "rate": 8 * 2 * width**3 / found["seconds"]}


class Watch:
    """Seconds of each epoch."""

    def __init__(self):
        self.seconds = []

    def begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def end(self, epoch, logs=None):  # Keras has waited for the device: it has the losses
        self.seconds.append(time.perf_counter() - self.start)


def ours(given, attention, *, kind="16", training=True):
    import jax
    import keras

    from keras_flexast import ElasticAST
    from keras_flexast.optimizers import compile_packed

    batches, rng = read(given.batches, kind), np.random.default_rng(0)
    shape = batches[0]["segment_ids"].shape
    tokens = jax.device_put(rng.normal(size=(*shape, WIDTH)).astype("float32"))
    data = [
        (
            {"tokens": tokens, **{k: jax.device_put(b[k]) for k in ("positions", "segment_ids")}},
            jax.device_put(b["labels"]), jax.device_put(b["weights"]),
        )
        for b in batches
    ]  # fmt: skip
    model = ElasticAST(
        CLASSES, size=given.size, segments=batches[0]["weights"].shape[1], attention=attention,
        dtype="mixed_bfloat16", remat=given.remat,
    )  # fmt: skip
    if training:
        compile_packed(model, 1e-4, row_length=shape[1])
        watch = Watch()
        model.fit(
            (one for one in itertools.cycle(data)), steps_per_epoch=STEPS, epochs=1 + GROUPS,
            verbose=0, callbacks=[keras.callbacks.LambdaCallback(
                on_epoch_begin=watch.begin, on_epoch_end=watch.end
            )],
        )  # fmt: skip
        found = summary(watch.seconds[0], [one / STEPS for one in watch.seconds[1:]])
    else:
        forward = jax.jit(lambda weights, inputs: model.stateless_call(weights, [], inputs)[0])
        weights = [one.value for one in model.variables]
        found = timed(lambda one: forward(weights, one[0]), jax.block_until_ready, data)
    stats = jax.local_devices()[0].memory_stats() or {}
    lengths = [clip_lengths(batch) for batch in batches]
    done = np.mean([operations(given.size, one) for one in lengths]) / (1 if training else 3)
    return {**found, "clips": float(np.mean([len(one) for one in lengths])),
            "rate": done / found["seconds"], "bytes": stats.get("peak_bytes_in_use")}  # fmt: skip


# === Peers ===


def on_torch(given, make, data_of):
    """Time a PyTorch model's training step on the clips at patch 16, under autocast."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batches = [clip_lengths(batch) for batch in read(given.batches, "16")]
    model = make().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    data = [
        (data_of(one, device), torch.randint(0, CLASSES, (len(one),), device=device))
        for one in batches
    ]

    def step(one):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            scores = model(one[0])
            scores = getattr(scores, "logits", scores)
            loss = torch.nn.functional.cross_entropy(scores.float(), one[1])
        loss.backward()
        optimizer.step()
        return loss

    found = timed(step, float, data)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    done = np.mean([operations(given.size, one) for one in batches])
    return {**found, "clips": float(np.mean([len(one) for one in batches])),
            "rate": done / found["seconds"], "bytes": peak}  # fmt: skip


def hugging_face(given):
    import torch
    from transformers import ASTConfig, ASTForAudioClassification

    dim, depth, heads = SIZES[given.size]

    frames = max(int(clip_lengths(one).max()) for one in read(given.batches, "16")) // 8 * 16

    def make():
        return ASTForAudioClassification(
            ASTConfig(
                hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads,
                intermediate_size=4 * dim, frequency_stride=16, time_stride=16,
                max_length=frames, num_labels=CLASSES, attn_implementation="sdpa",
            )
        )  # fmt: skip

    return on_torch(
        given, make, lambda lengths, device: torch.randn(len(lengths), frames, 128, device=device)
    )


def naflexvit(given):
    import torch
    from timm.models.naflexvit import NaFlexVit

    dim, depth, heads = SIZES[given.size]

    def data_of(lengths, device):
        places = torch.arange(int(lengths.max()), device=device)
        return {
            "patches": torch.randn(len(lengths), len(places), WIDTH, device=device),
            "patch_valid": places < torch.tensor(lengths, device=device)[:, None],
            "patch_coord": torch.stack([places % 8, places // 8], -1).repeat(len(lengths), 1, 1),
        }

    return on_torch(
        given,
        lambda: NaFlexVit(
            embed_dim=dim, depth=depth, num_heads=heads, in_chans=1, num_classes=CLASSES
        ),
        data_of,
    )


def authors(given):
    import torch

    dim, depth, heads = SIZES[given.size]
    path = pathlib.Path(given.peer or "") / "src" / "models" / "elasticast.py"
    if not path.exists():
        raise ImportError("a checkout of the authors' code (--peer)")
    spec = importlib.util.spec_from_file_location("elasticast", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return on_torch(
        given,
        lambda: module.ElasticAST(
            sample_size=(128, 3072), patch_size=16, num_classes=CLASSES, dim=dim, depth=depth,
            heads=heads, channels=1, dim_head=dim // heads,
        ),
        lambda lengths, device: [
            torch.randn(1, 128, int(count) // 8 * 16, device=device) for count in lengths
        ],
    )  # fmt: skip


# === All cases ===


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("batches", type=pathlib.Path)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--peer", help="checkout of the ElasticAST authors' code")
    parser.add_argument("--remat", action="store_true", help="gradient checkpointing in ours")
    parser.add_argument("--cases", help="names, separated by semicolons; all of them otherwise")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        try:
            found = CASES[given.only](given)
        except ImportError as error:
            found = {"missing": getattr(error, "name", None) or str(error)}
        print("RESULT", json.dumps(found))
        return
    results, best = {}, None
    print(f"{given.size}, bfloat16, {given.batches}")
    for name in given.cases.split(";") if given.cases else CASES:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", name],
            capture_output=True, text=True, env={"KERAS_BACKEND": "jax", **os.environ},
        )  # fmt: skip
        lines = [one for one in done.stdout.splitlines() if one.startswith("RESULT ")]
        found = json.loads(lines[0][7:]) if lines else {"failed": done.stderr[-1500:]}
        results[name] = found
        if given.json:
            given.json.write_text(json.dumps({"size": given.size, "results": results}, indent=1))
        if "seconds" not in found:
            missing = found.get("missing")
            print(f"{name:26}{'needs ' + missing if missing else 'failed: ' + found['failed']}")
            continue
        best = found["rate"] if name == "matrix products" else best
        share = f"{100 * found['rate'] / best:5.1f} %" if best else ""
        clips = f"{found['clips'] / found['seconds']:9.1f} clips/s" if "clips" in found else ""
        memory = f"{found['bytes'] / 2**30:6.2f} GiB" if found.get("bytes") else ""
        print(
            f"{name:26}{found['seconds']:8.4f} s ({found['least']:.4f}-{found['most']:.4f})  "
            f"{found['rate'] / 1e12:7.2f} TFLOP/s {share} {clips} {memory}",
            flush=True,
        )


if __name__ == "__main__":
    main()
