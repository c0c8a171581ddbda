"""One training step of 12 clips of 4-30 s: clip by clip, under a dense mask, and the peers.

KERAS_BACKEND=tensorflow python examples/benchmarks/training_step.py \\
    --peer ElasticAST/ --timm --dense --profile

CPU seconds over seconds is the number of cores at work; without attention the rest of the step
is left, which tells where the time goes.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

CLIPS, CLASSES = 12, 10  # the papers' batch
SEED, REPEATS = 0, 5
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6)}  # dim, depth, heads


def clip_tokens(rng):
    """Tokens of 12 clips, log-normal around 7 s and 4 to 30 s, at patch 16."""
    seconds = np.clip(np.exp(rng.normal(np.log(7), 0.5, CLIPS)), 4, 30)
    frames = 1 + (seconds * 16000 - 400) // 160
    return [8 * int(count) for count in frames // 16]


def rows_of(lengths):
    """The clips in two rows as even as can be, and the tokens of a row."""
    sums = {0: []}
    for clip, count in enumerate(lengths):
        sums.update({total + count: [*chosen, clip] for total, chosen in list(sums.items())})
    half = sum(lengths) / 2
    first = sums[min((total for total in sums if total >= half), default=half)]
    rows = [first, [clip for clip in range(len(lengths)) if clip not in first]]
    longest = max(sum(lengths[clip] for clip in row) for row in rows)
    return rows, -(-longest // 64) * 64


def packed_batch(lengths, rng):
    rows, row_length = rows_of(lengths)
    ids = np.zeros((2, row_length), "int32")
    for row, clips in zip(ids, rows, strict=True):
        counts = [lengths[clip] for clip in clips]
        row[: sum(counts)] = np.repeat(np.arange(1, len(clips) + 1), counts)
    inputs = {
        "tokens": rng.normal(size=(2, row_length, 256)).astype("float32"),
        "positions": np.ones((2, row_length, 4), "float32"),
        "segment_ids": ids,
    }
    weights = np.stack([np.arange(16) < len(clips) for clips in rows]).astype("float32")
    return inputs, rng.integers(0, CLASSES, (2, 16)), weights


def timed(step):
    """Seconds of each of REPEATS steps, after one that compiles; CPU seconds of one; the first."""
    start = time.perf_counter()
    step()
    first, seconds = time.perf_counter() - start, []
    cpu = time.process_time()
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds, (time.process_time() - cpu) / REPEATS, first


def ours(size, lengths, attention="auto", dtype="float32"):
    from keras_flexast import ElasticAST
    from keras_flexast.layers.kernels import KERNELS, Kernel
    from keras_flexast.training import compile_packed

    KERNELS["none"] = Kernel(  # what is left has all matrix products but those of attention
        lambda query, key, value, segment_ids, scale: query + key + value,
        works=lambda site: True,
        preferred=lambda site: False,
        supports_jit=KERNELS["clip_loop"].supports_jit,
    )

    rng = np.random.default_rng(SEED)
    inputs, labels, weights = packed_batch(lengths, rng)
    model = ElasticAST(CLASSES, size=size, dtype=dtype, attention=attention)
    compile_packed(model, 1e-4, row_length=inputs["segment_ids"].shape[1])
    return timed(lambda: float(model.train_on_batch(inputs, labels, sample_weight=weights)[0]))


def products(size, lengths):
    """The useful matrix products of a step alone, forward and twice as many backward."""
    import keras

    dim, depth, heads = SIZES[size]
    rng = np.random.default_rng(SEED)

    def array(*shape):
        return keras.ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))

    tokens = sum(lengths)
    pairs = [(array(tokens, dim), array(dim, dim))] * 4  # query, key, value, output
    pairs += [
        (array(tokens, dim), array(dim, 4 * dim)),
        (array(tokens, 4 * dim), array(4 * dim, dim)),
    ]
    for count in lengths:
        queries = array(heads, count, dim // heads)
        pairs.append((queries, array(heads, dim // heads, count)))
        pairs.append((array(heads, count, count), queries))

    def step():
        for _ in range(3 * depth):
            results = [keras.ops.matmul(a, b) for a, b in pairs]
        for one in results:  # wait for them
            keras.ops.convert_to_numpy(one[..., :1, :1])

    return timed(step)


def peer(size, lengths, checkout):
    """The ElasticAST authors' model and packing, float32 on the CPU, from their checkout."""
    import torch

    dim, depth, heads = SIZES[size]
    path = pathlib.Path(checkout) / "src" / "models" / "elasticast.py"
    spec = importlib.util.spec_from_file_location("elasticast", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.ElasticAST(
        sample_size=(128, 3072), patch_size=16, num_classes=CLASSES, dim=dim, depth=depth,
        heads=heads, channels=1, dim_head=dim // heads,
    ).train()  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, (0.95, 0.999), weight_decay=5e-7)
    generator = torch.Generator().manual_seed(SEED)
    clips = [torch.randn(1, 128, count // 8 * 16, generator=generator) for count in lengths]
    labels = torch.randint(0, CLASSES, (CLIPS,), generator=generator)

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(clips), labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    return timed(step)


def naflexvit(size, lengths):
    """timm's NaFlexVit, which pads each clip of a batch to the longest, under a mask."""
    import torch
    from timm.models.naflexvit import NaFlexVit

    dim, depth, heads = SIZES[size]
    model = NaFlexVit(
        embed_dim=dim, depth=depth, num_heads=heads, in_chans=1, num_classes=CLASSES
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, (0.95, 0.999), weight_decay=5e-7)
    generator, longest = torch.Generator().manual_seed(SEED), max(lengths)
    places = torch.arange(longest)
    batch = {
        "patches": torch.randn(CLIPS, longest, 256, generator=generator),
        "patch_valid": places < torch.tensor(lengths)[:, None],
        "patch_coord": torch.stack([places % 8, places // 8], -1).repeat(CLIPS, 1, 1),
    }
    labels = torch.randint(0, CLASSES, (CLIPS,), generator=generator)

    def step():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    return timed(step)


def measure(name, size, lengths, checkout):
    """Run one contender and print its times as JSON; a process of its own shows its memory."""
    contenders = {
        "by clip": lambda: ours(size, lengths),
        "dense mask": lambda: ours(size, lengths, "dense"),
        "matrix products": lambda: products(size, lengths),
        "without attention": lambda: ours(size, lengths, "none"),
        "in bfloat16": lambda: ours(size, lengths, dtype="mixed_bfloat16"),
        "authors": lambda: peer(size, lengths, checkout),
        "timm NaFlexVit": lambda: naflexvit(size, lengths),
    }
    seconds, cpu, first = contenders[name]()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT", json.dumps({"seconds": seconds, "cpu": cpu, "first": first, "gib": memory}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--peer", help="checkout of the ElasticAST authors' code")
    parser.add_argument("--dense", action="store_true", help="time the dense mask too")
    parser.add_argument("--profile", action="store_true", help="time a step without attention")
    parser.add_argument("--timm", action="store_true", help="time timm's NaFlexVit")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    lengths = clip_tokens(np.random.default_rng(SEED))
    if options.only:
        measure(options.only, options.size, lengths, options.peer)
        return
    from rich.console import Console
    from rich.table import Table

    names = ["by clip", "in bfloat16", "matrix products"]
    names += ["without attention"] * options.profile + ["dense mask"] * options.dense
    names += ["authors"] * bool(options.peer) + ["timm NaFlexVit"] * options.timm
    backend, console, results = os.environ.get("KERAS_BACKEND", "tensorflow"), Console(), {}
    for name in names:
        with console.status(f"Timing {name}"):
            done = subprocess.run(
                [sys.executable, __file__, "--only", name, "--size", options.size]
                + (["--peer", options.peer] if options.peer else []),
                capture_output=True, text=True,
            )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
        results[name] = json.loads(lines[0].removeprefix("RESULT "))
    base = np.median(results["by clip"]["seconds"])
    pairs = sum(count**2 for count in lengths)
    console.print(
        f"{options.size} on {backend}: {CLIPS} clips, {sum(lengths):,} tokens, {pairs:,} pairs"
    )
    table = Table(
        "one training step", "seconds", "spread", "CPU", "against by clip", "first", "peak GiB"
    )
    for name, result in results.items():
        seconds = result["seconds"]
        table.add_row(
            name,
            f"{np.median(seconds):.2f}",
            f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{result['cpu']:.2f}",
            f"{np.median(seconds) / base:.2f}",
            f"{result['first']:.1f}",
            f"{result['gib']:.2f}",
        )
    console.print(table)
    if options.json:
        report = {"backend": backend, "size": options.size, "tokens": lengths, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
