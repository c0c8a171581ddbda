"""The main job on a built-in default: spoken digits, one flexible model, exported, checked."""

import contextlib
import dataclasses
import json
import os
import platform
import time

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from keras_flexast.evaluation import clip_outputs, evaluate_run
from keras_flexast.export.folder import export_folder
from keras_flexast.figures import accuracy_figure
from keras_flexast.files import atomic_folder, atomic_write
from keras_flexast.inference.artifacts import scoring_artifacts
from keras_flexast.inference.scoring import fixed_scores
from keras_flexast.metrics import accuracy
from keras_flexast.models import ElasticAST
from keras_flexast.runs import Run, save_run
from keras_flexast.training import WarmupCosine, compile_packed, time_cells
from tf_data_pipelines.settings import (
    BASE_PATCH,
    PATCH_SIZES,
    FbankSettings,
    PackSettings,
    patch_name,
)

TRAIN_CLIPS, TEST_CLIPS = 3000, 600
FIXED_STEPS, FLEXIBLE_STEPS = 200, 900  # of 8 rows x 256 tokens, 60 words or so
EPOCH_STEPS = 50  # a line of progress
LEARNING_RATE = 1.5e-3
EXPORT_PATCHES = (8, 16, 32)
ARTIFACT_CLIPS = 200  # test clips that every exported model is run on


def run_demo(out="flexast-demo", seed=1337, overwrite=False):
    """Make data, train, evaluate, export and check; write a run with a report to `out`.

    Args:
        out: folder; it becomes a run, with `speech/` (the corpus), `export/`, `accuracy.png`,
            `report.json` and TensorBoard `logs/` beside the model.
        seed: of the corpus, the weights and the draws.
        overwrite: replace an existing folder.

    Returns:
        the report, a dictionary.

    Raises:
        FileExistsError: `out` exists.
        ImportError: espeakng-loader is not installed.
    """
    from tf_data_pipelines.pipeline import evaluation_batches, training_batches
    from tf_data_pipelines.sources import load_source, scan_source
    from tf_data_pipelines.speech import make_corpus

    console = Console()
    seconds = {}

    @contextlib.contextmanager
    def stage(name, text):
        console.rule(f"[bold]{text}", align="left")
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 1)

    with atomic_folder(out, overwrite) as folder:
        with stage("corpus", "1  Speaking: ten digits, espeak-ng voices, as audio files"):
            make_corpus(
                folder / "speech", clips=TRAIN_CLIPS, test_clips=TEST_CLIPS,
                validation_clips=0, seed=seed, progress=True,
            )  # fmt: skip
        with stage("scan", "2  Reading every file once: lengths, mean and deviation"):
            found = scan_source(load_source(folder / "speech"), FbankSettings(), progress=True)
            train, test = found.split("train"), found.split("test")
            console.print(
                f"{len(train.source)} training clips, {len(test.source)} test clips by other "
                f"voices, {found.durations.min():.2f} to {found.durations.max():.2f} s"
            )

        keras.utils.set_random_seed(seed)
        fbank = FbankSettings(mean=train.mean, std=train.std)
        packing = PackSettings(rows=8, row_length=256, segments=16)
        model = ElasticAST(
            len(train.source.classes),
            size="nano",
            grid=(fbank.mel_bins // BASE_PATCH, time_cells(train, fbank)),
            segments=packing.segments,
        )
        flexible, fixed = model.patch_settings(PATCH_SIZES), model.patch_settings()
        run = Run(
            model, fbank, flexible, packing, train.source.classes,
            clip_seconds=round(float(found.durations.max()), 3),
        )  # fmt: skip
        compile_packed(model, WarmupCosine(LEARNING_RATE, [FIXED_STEPS, FLEXIBLE_STEPS]))

        curves = {}
        for number, name, patches, steps, text in (
            (3, "fixed", fixed, FIXED_STEPS, f"patch {BASE_PATCH} only"),
            (4, "flexible", flexible, FLEXIBLE_STEPS, "a random patch size for each clip"),
        ):
            with stage(f"train_{name}", f"{number}  Training on {text}"):
                model.fit(
                    training_batches(train, fbank, patches, packing, seed),
                    steps_per_epoch=EPOCH_STEPS,
                    epochs=steps // EPOCH_STEPS,
                    callbacks=[keras.callbacks.TensorBoard(folder / "logs" / name)],
                    shuffle=False,
                )
            with stage(f"evaluate_{name}", f"{number}  Testing at {len(PATCH_SIZES)} patch sizes"):
                results = evaluate_run(run, test, PATCH_SIZES, progress=True)
                curves[name] = {patch_name(r["patch_size"]): r["value"] for r in results}

        with stage("packing", "5  Packed and alone: the same numbers?"):
            sample = _first_clips(test, ARTIFACT_CLIPS)
            packed, alone = (
                clip_outputs(
                    model,
                    evaluation_batches(sample, fbank, flexible, how),
                    ARTIFACT_CLIPS,
                    text,
                )[0]
                for how, text in (
                    (packing, "Packed with neighbors"),
                    (dataclasses.replace(packing, segments=1), "One clip a row"),
                )
            )
            difference = float(np.abs(packed - alone).max())
            row_fill = _row_fill(training_batches(test, fbank, flexible, packing, seed))

        with stage("save", "6  Saving the run and drawing the figure"):
            save_run(run, folder)
            accuracy_figure(
                {
                    f"trained at patch {BASE_PATCH}": curves["fixed"],
                    "random patch sizes (FlexiAST)": curves["flexible"],
                },
                folder / "accuracy.png",
                f"One model, ten patch sizes: {len(test.source)} spoken digits by new voices",
            )
        with stage("export", "7  Exporting: a server's model, and a .tflite for three patch sizes"):
            written = export_folder(
                folder, folder / "export", EXPORT_PATCHES, precisions=("float32",)
            )
        with stage("artifacts", "8  Running the exported models on test files"):
            checks = _check_artifacts(run, sample, written)

        report = {
            "accuracy": curves,
            "clips": len(found.source),
            "clips_by_split": {"train": len(train.source), "test": len(test.source)},
            "row_fill": round(row_fill, 4),
            "packed_max_abs_difference": difference,
            "export": checks,
            "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        atomic_write(folder / "report.json", json.dumps(report, indent=2) + "\n")
    _print_table(console, report)
    console.print(
        f"\nThe run is in [bold]{out}[/]. Now try:\n"
        f"  flexast predict {out} {out}/speech/test/seven/*.wav --patch-size 24\n"
        f"  flexast export {out} --data {out}/speech\n"
        f"  tensorboard --logdir {out}/logs\n",
        highlight=False,
        soft_wrap=True,
    )
    return report


def _first_clips(data, count):
    """A ScannedSource of `count` clips, spread over the classes."""
    every = max(1, len(data.source) // count)
    clips = data.source.clips[::every][:count]
    source = dataclasses.replace(data.source, clips=clips)
    return dataclasses.replace(data, source=source, durations=data.durations[::every][:count])


def _row_fill(batches, count=20):
    return float(np.mean([inputs["segment_ids"] > 0 for inputs, _, _ in batches.take(count)]))


def _check_artifacts(run, data, paths):
    """Each artifact's scores against Keras's, and its own accuracy, on padded test clips."""
    from tf_data_pipelines.decode import read_audio

    samples = round(run.clip_seconds * run.fbank.sample_rate)
    waveforms = np.zeros((len(data.source), samples), "float32")
    for row, clip in zip(waveforms, data.source.clips, strict=True):
        waveform = read_audio(clip.path)[:samples]
        row[: len(waveform)] = waveform
    labels = [clip.labels[0] for clip in data.source.clips]
    expected = {str(size): fixed_scores(run, size, waveforms) for size in EXPORT_PATCHES}
    checks = {}
    artifacts = [one for path in paths for one in scoring_artifacts(path).values()]
    for artifact in track(artifacts, "Running artifacts"):
        scores = artifact.scores(list(waveforms))
        difference = np.abs(scores - expected[artifact.patch_size]).max()
        checks[artifact.name] = {
            "max_abs_difference": float(difference),
            "accuracy": accuracy(labels, scores),
            "megabytes": round(artifact.size / 1e6, 2),
        }
    return checks


def _print_table(console, report):
    table = Table(title="Accuracy on held-out voices (%)", title_justify="left")
    for column in ("patch size", f"trained at {BASE_PATCH}", "random patch sizes"):
        table.add_column(column, justify="right")
    curves = report["accuracy"]
    for name, value in curves["fixed"].items():
        table.add_row(name, f"{100 * value:.1f}", f"{100 * curves['flexible'][name]:.1f}")
    console.print(table)
    facts = Table(show_header=False)
    facts.add_row("row fill in training", f"{100 * report['row_fill']:.1f} %")
    facts.add_row("packed against alone", f"{report['packed_max_abs_difference']:.1e}")
    for name, check in report["export"].items():
        facts.add_row(
            name,
            f"{check['max_abs_difference']:.1e} from Keras, accuracy "
            f"{100 * check['accuracy']:.1f} %, {check['megabytes']} MB",
        )
    facts.add_row("time", f"{report['seconds']['total']:.0f} s on {report['backend']}")
    console.print(facts)
