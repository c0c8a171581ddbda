"""How many clips a second the input pipeline makes on one core, and where the time goes.

taskset -c 1 python examples/benchmarks/pipeline.py [--json PATH] [--augmentations]

With --augmentations: what each augmentation costs, beside a pipeline without any. Both have the
waveforms in memory and compute log-mel in every epoch.

2026-11-21, one core of an AMD EPYC whose other core was at work (load 1.7), TensorFlow 2.21:
98 s. Processor time of 10 s clips, median of 5 (least to most); a patch size is drawn for
each clip from 8 to 48, or is 16 for all.

                                    8 to 48                 16
read, ms a clip                     0.07    3 %             0.08    3 %
decode, ms a clip                   0.15    6 %             0.14    6 %
log-mel, ms a clip                  1.76   69 %             1.55   65 %
patches, ms a clip                  0.33   13 %             0.42   18 %
pack and batch, ms a clip           0.21    8 %             0.18    8 %
clips a second, from files            383 (340 to 405)        420 (377 to 458)
clips a second, log-mel in memory   1,365 (885 to 1,754)    1,947 (1,246 to 2,616)

The tokens of every clip in the batches are its own, made alone, within 4.8e-07 and 1.2e-07.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import tempfile

import numpy as np
import soundfile
import tensorflow as tf
from features import settled
from rich.console import Console
from rich.table import Table

from tf_data_pipelines import (
    PATCH_SIZES,
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
    batch_rows,
    decode_audio,
    evaluation_batches,
    extract_features,
    features,
    load_source,
    make_tokens,
    pack,
    patch_tokens,
    read_audio,
    scan_source,
    training_batches,
)

RATE, SECONDS = 16000, 10  # AudioSet's clips, at the papers' rate
FILES = 100  # 32 MB, which stay in the system's cache: no disk is measured
CLIPS = 200  # or a few more, a repeat: 0.7 s
REPEATS = 5  # in turn, so that every stage meets the same neighbors on the machine
PACKING = PackSettings(rows=4, row_length=2048)  # the ElasticAST authors' rows
PATCHES = {"patch sizes 8 to 48": PatchSettings(PATCH_SIZES), "patch 16": PatchSettings((16,))}
AUGMENTATIONS = {  # each alone, as strong as in the papers where they have it
    "none": {},
    "gain": {"gain_db": 6.0},
    "silence around": {"fill_ms": 1000.0},
    "noise, every other clip": {"noise_snr_db": (20, 60)},
    "crop to 8 s": {"crop_ms": 8000.0},
    "roll": {"roll": 0.5},
    "mixup, every other clip": {"mixup": 0.5},
    "SpecAugment, 48 bins, 1.9 s": {"freq_mask": 48, "time_mask_ms": 1920.0},
    "SpecAugment, 48 bins, 0.19": {"freq_mask": 48, "time_mask_share": 0.1875},
    "frame shift of a range": {"frame_shift_range_ms": (10, 10)},  # the cost, at equal lengths
    "token dropout 0.5": {"token_dropout": 0.5},
    "patchout 0.3, 0.3": {"drop_freq": 0.3, "drop_time": 0.3},
    "balanced": {"balanced": True},
}
DRAWS = {  # settings of patches, likewise
    "sizes 8 to 48": {"patch_sizes": PATCH_SIZES},
    "sizes 8 to 48 by weight": {"patch_sizes": PATCH_SIZES, "patch_weights": (1,) * 10},
    "sizes 8 to 48 for 12 clips": {"patch_sizes": PATCH_SIZES, "clips_per_draw": 12},
    "2 frames pooled": {"pool_frames": (2,)},
}
STAGES = ("read", "decode", "log-mel", "patches", "pack and batch")
WHOLE = ("from files", "log-mel in memory")


def write_files(folder):
    """16-bit WAV files of two classes: tones in noise."""
    rng, times = np.random.default_rng(0), np.arange(RATE * SECONDS) / RATE
    for number in range(FILES):
        path = folder / f"class{number % 2}" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        tone = 0.3 * np.sin(2 * np.pi * (200 + 50 * number) * times)
        soundfile.write(path, tone + rng.normal(0, 0.03, times.size), RATE)


def decode(path):
    """A clip of the pipeline's first stage."""
    waveform = decode_audio(path, RATE, scanned=True)
    return {"waveform": waveform, "label": 0, "clip_id": tf.constant(0, tf.int64)}


def stages(paths, fbank, patches):
    """{stage: endless dataset of the number of clips that went through this stage}."""
    files = tf.data.Dataset.from_tensor_slices(paths).repeat()
    waveforms = files.map(decode, tf.data.AUTOTUNE)
    spectrograms = extract_features(waveforms, fbank)
    tokens = make_tokens(spectrograms, patches)
    until = {
        "nothing": files,
        "read": files.map(tf.io.read_file, tf.data.AUTOTUNE),
        "decode": waveforms,
        "log-mel": spectrograms,
        "patches": tokens,
    }
    made = {stage: dataset.map(lambda _: 1.0).batch(20) for stage, dataset in until.items()}
    batches = batch_rows(pack(tokens, PACKING), PACKING)
    return {**made, "pack and batch": batches.map(lambda batch: batch["weights"])}


def whole(data, fbank, patches):
    """{way: endless dataset of the weights} of the pipeline as `model.fit` gets it."""
    settings = {"patches": patches, "packing": PACKING}
    evaluation = evaluation_batches(data, fbank, **settings).repeat()
    training = training_batches(data, fbank, **settings)
    return {
        "from files": evaluation.map(lambda x, y, weights, clip_ids: weights),
        "log-mel in memory": training.map(lambda x, y, weights: weights),
    }


def augmented(data, fbank, augment=None, **patches):
    """Endless dataset of the weights of training batches, of waveforms in memory."""
    augment = AugmentSettings(**(augment or {}))
    # A list of frame shifts, also of one, is drawn from in every epoch.
    shifts = () if augment.frame_shift_range_ms else (fbank.frame_shift_ms,)
    patches = PatchSettings(**{"patch_sizes": (16,), "frame_shifts_ms": shifts, **patches})
    batches = training_batches(data, fbank, patches=patches, packing=PACKING, augment=augment)
    return batches.map(lambda x, y, weights: weights)


def measure_augmentations(folder):
    """[{name, milliseconds}]: processor time for one clip with each augmentation."""
    write_files(folder)
    fbank = FbankSettings()
    data = scan_source(load_source(folder, validation=0, test=0), fbank)
    made = {name: augmented(data, fbank, augment) for name, augment in AUGMENTATIONS.items()}
    made |= {name: augmented(data, fbank, **draws) for name, draws in DRAWS.items()}
    made = {name: iter(one) for name, one in made.items()}
    runs = {name: [] for name in made}
    for repeat in range(REPEATS + 1):
        for name, iterator in made.items():
            spent = milliseconds(iterator)
            if repeat:  # the first fills the packer and the memory
                runs[name].append(spent)
    return [{"name": name, "milliseconds": values} for name, values in runs.items()]


def augmentation_table(results):
    title = f"training batches of {SECONDS} s clips, ms a clip on one core, median of {REPEATS}"
    table = Table("", title=title)
    for heading in ("ms (spread)", "more than without"):
        table.add_column(heading, justify="right")
    without = statistics.median(results[0]["milliseconds"])
    for result in results:
        values = result["milliseconds"]
        middle = statistics.median(values)
        text = f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"
        table.add_row(result["name"], text, f"{middle - without:+.2f}")
    return table


def milliseconds(iterator):
    """Processor time for one clip, of all threads, also of those that refill buffers."""
    clips, start = 0, settled()
    while clips < CLIPS:
        clips += float(tf.reduce_sum(next(iterator)))
    return 1000 * (settled() - start) / clips


def difference(data, fbank, patches):
    """Largest difference of the pipeline's tokens from those of each clip on its own."""
    largest, seen = 0.0, 0
    batches = evaluation_batches(data, fbank, patches=patches, packing=PACKING)
    for inputs, _, _, clip_ids in batches:
        inputs = {name: value.numpy() for name, value in inputs.items()}
        for row, slot in np.argwhere(clip_ids.numpy() >= 0):
            here = inputs["segment_ids"][row] == slot + 1
            # The extent on the frequency axis tells which patch size the clip drew.
            size = round(16 * float(inputs["positions"][row][here][0, 2]))
            waveform = read_audio(data.source.clips[int(clip_ids[row, slot])].path)
            expected, _ = patch_tokens(features(waveform, fbank), PatchSettings((size,)))
            largest = max(largest, float(np.abs(inputs["tokens"][row][here] - expected).max()))
            seen += 1
    assert seen == FILES, seen
    return largest


def measure(folder):
    write_files(folder)
    fbank = FbankSettings()
    data = scan_source(load_source(folder, validation=0, test=0), fbank)
    paths = [clip.path for clip in data.source.clips]
    made = {
        name: {**stages(paths, fbank, patches), **whole(data, fbank, patches)}
        for name, patches in PATCHES.items()
    }
    made = {name: {stage: iter(one) for stage, one in ways.items()} for name, ways in made.items()}
    runs = {name: {stage: [] for stage in made[name]} for name in made}
    for repeat in range(REPEATS + 1):
        for name, iterators in made.items():
            for stage, iterator in iterators.items():
                spent = milliseconds(iterator)
                if repeat:  # the first fills the packer and the memory
                    runs[name][stage].append(spent)
    results = []
    for name, patches in PATCHES.items():
        middle = {stage: statistics.median(values) for stage, values in runs[name].items()}
        own = {
            stage: middle[stage] - middle[before]
            for before, stage in itertools.pairwise(("nothing", *STAGES))
        }
        results.append(
            {
                "patches": name,
                "milliseconds": runs[name],
                "share": {stage: own[stage] / middle[STAGES[-1]] for stage in STAGES},
                "own": own,
                "difference": difference(data, fbank, patches),
            }
        )
    return results


def make_table(results):
    title = f"{SECONDS} s WAV files to rows of 2,048 tokens, one core, median of {REPEATS} (spread)"
    table = Table("", title=title)
    for result in results:
        table.add_column(result["patches"], justify="right")
    for stage in STAGES:
        shares = (f"{r['own'][stage]:.2f}  {r['share'][stage]:4.0%}" for r in results)
        table.add_row(f"{stage}, ms a clip", *shares)
    for way in WHOLE:
        runs = ([1000 / ms for ms in r["milliseconds"][way]] for r in results)
        table.add_row(f"clips a second, {way}", *map(spread, runs))
    table.add_row("largest difference", *(f"{r['difference']:.1e}" for r in results))
    return table


def spread(values):
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="also write the numbers here")
    parser.add_argument("--augmentations", action="store_true", help="measure these instead")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) != 1:
        parser.error("run it on one core: taskset -c 1 python examples/benchmarks/pipeline.py")
    ways = (measure, make_table)
    if arguments.augmentations:
        ways = (measure_augmentations, augmentation_table)
    with tempfile.TemporaryDirectory() as folder:
        results = ways[0](pathlib.Path(folder))
    Console(width=110).print(ways[1](results))
    if arguments.json:
        machine = f"one core of {platform.machine()}, TensorFlow {tf.__version__}"
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=2)
