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

from keras_flexast.evaluation import evaluate_run, spread
from keras_flexast.export import export_run
from keras_flexast.figures import accuracy_figure
from keras_flexast.files import RUN, atomic_folder
from keras_flexast.inference.artifacts import scoring_artifacts
from keras_flexast.inference.classifier import load_classifier
from keras_flexast.inference.scoring import PackedPredictor, packed_outputs
from keras_flexast.metrics import accuracy
from keras_flexast.models import ElasticAST
from keras_flexast.runs import Run, save_run, versions
from keras_flexast.schedules import WarmupCosine
from keras_flexast.settings import MAX_SEED, TrainSettings
from keras_flexast.training import compile_packed, time_cells
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.settings import (
    BASE_PATCH,
    PATCH_SIZES,
    AugmentSettings,
    FbankSettings,
    PackSettings,
    check_between,
)

TRAIN_CLIPS, TEST_CLIPS = 9000, 600  # more clips cost seconds, and are most of what noise asks for
FIXED_STEPS, FLEXIBLE_STEPS = 200, 3000  # of 8 rows x 256 tokens, 60 words or so
# Silence around words, and noise, as in the buffer of a phone that hears all of it.
FBANK = FbankSettings(noise_floor_dbfs=-60.0)  # nothing fainter is heard
BUFFERS = AugmentSettings(fill_ms=400.0, noise_snr_db=(20.0, 60.0))
EPOCH_STEPS = 50  # steps in a line of progress
LEARNING_RATE = 1.5e-3
EXPORT_PATCHES = (8, 16, 32)
ARTIFACT_CLIPS = 200  # test clips that every exported model is run on


def run_demo(out="flexast-demo", *, seed=TrainSettings.seed, overwrite=False):
    """Make data, train, evaluate, export and check; write a run with a report to `out`.

    Args:
        out: folder; it becomes a run, with `speech/` (the corpus), `export/`, `accuracy.png`,
            `report.json` and TensorBoard `logs/` beside the model.
        seed: random seed of the corpus, the weights and the draws.
        overwrite: replace an existing folder.

    Returns:
        the report, a dictionary.

    Raises:
        FileExistsError: `out` exists.
        ImportError: espeakng-loader is not installed.
    """
    check_between("seed", seed, 0, MAX_SEED, kind=int)
    console, stage = Console(), _Stages()
    with atomic_folder(out, overwrite, kind=RUN) as folder:
        data = _make_data(folder / "speech", seed, stage=stage)
        train, test = data.split("train"), data.split("test")
        run = _new_run(data, seed)
        curves = _train_and_test(run, folder, train=train, test=test, seed=seed, stage=stage)
        with stage("packing", "5  Packed and alone: the same numbers?"):
            sample = spread(test, ARTIFACT_CLIPS)
            difference = _packed_difference(run, sample)
            row_fill = _row_fill(run, test, seed)
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
            written = export_run(
                folder, folder / "export", patch_sizes=EXPORT_PATCHES, precisions=("float32",)
            )
        with stage("artifacts", "8  Running the exported models on test files"):
            checks = _check_artifacts(run, sample, written)
        report = {
            "accuracy": {
                name: {result["name"]: result["value"] for result in results}
                for name, results in curves.items()
            },
            "clips": len(data.source),
            "clips_by_split": {"train": len(train.source), "test": len(test.source)},
            "row_fill": round(row_fill, 4),
            "packed_max_abs_difference": difference,
            "export": checks,
            "seconds": {**stage.seconds, "total": round(sum(stage.seconds.values()), 1)},
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        atomic_write(folder / "report.json", json.dumps(report, indent=2) + "\n")
    _print_report(console, report)
    console.print(
        f"\nThe run is in {out}. Now try:\n"
        f"  flexast predict {out} {out}/speech/test/seven/*.wav --patch-size 24\n"
        f"  flexast export {out} --data {out}/speech\n"
        f"  tensorboard --logdir {out}/logs\n",
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=True,
    )
    return report


class _Stages:
    """Headlines of the demo's stages, and how many seconds each took."""

    def __init__(self):
        self.console = Console()
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, name, text):
        self.console.rule(f"[bold]{text}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def _make_data(folder, seed, *, stage):
    """Speak the corpus into a folder and read it: ScannedSource."""
    from tf_data_pipelines.sources import read_data
    from tf_data_pipelines.speech import make_corpus

    with stage("corpus", "1  Speaking: ten digits, espeak-ng voices, as audio files"):
        make_corpus(
            folder, clips=TRAIN_CLIPS, test_clips=TEST_CLIPS, validation_clips=0, seed=seed,
            progress=True,
        )  # fmt: skip
    with stage("scan", "2  Reading every file once: lengths, mean and deviation"):
        data = read_data(folder, FBANK, progress=True)
        counts = {name: len(data.split(name).source) for name in ("train", "test")}
        stage.console.print(
            f"{counts['train']} training clips, {counts['test']} test clips by other voices, "
            f"{data.durations.min():.2f} to {data.durations.max():.2f} s"
        )
    return data


def _new_run(data, seed):
    """An untrained nano ElasticAST with the settings of these clips."""
    keras.utils.set_random_seed(seed)
    fbank = dataclasses.replace(FBANK, mean=data.mean, std=data.std)
    packing = PackSettings(rows=8, row_length=256, segments=16)
    model = ElasticAST(
        len(data.source.classes),
        size="nano",
        grid=(fbank.mel_bins // BASE_PATCH, time_cells(data.split("train"), fbank)),
        segments=packing.segments,
    )
    return Run(
        model,
        fbank,
        patches=model.patch_settings(PATCH_SIZES),
        packing=packing,
        classes=data.source.classes,
        clip_seconds=round(float(data.durations.max()), 3),
        made_by={
            "command": "demo",
            "seed": seed,
            "augment": BUFFERS.to_dict(),
            "versions": versions(),
        },
    )


def _train_and_test(run, folder, *, train, test, seed, stage):
    """Train at the base patch, then at random sizes; {stage: results of `evaluate_run`}."""
    from tf_data_pipelines.pipeline import training_batches

    model, curves = run.model, {}
    compile_packed(
        model,
        WarmupCosine(LEARNING_RATE, [FIXED_STEPS, FLEXIBLE_STEPS]),
        row_length=run.packing.row_length,
    )
    for number, name, patches, augment, steps, text in (
        (3, "fixed", model.patch_settings(), None, FIXED_STEPS, f"patch {BASE_PATCH} only"),
        (4, "flexible", run.patches, BUFFERS, FLEXIBLE_STEPS, "random patch sizes, and on noise"),
    ):
        batches = training_batches(
            train, run.fbank, patches=patches, packing=run.packing, seed=seed, augment=augment
        )
        with stage(f"train_{name}", f"{number}  Training on {text}"):
            model.fit(
                batches,
                steps_per_epoch=EPOCH_STEPS,
                epochs=steps // EPOCH_STEPS,
                callbacks=[keras.callbacks.TensorBoard(folder / "logs" / name)],
                shuffle=False,
            )
        with stage(f"evaluate_{name}", f"{number}  Testing at {len(PATCH_SIZES)} patch sizes"):
            curves[name] = evaluate_run(run, test, patch_sizes=PATCH_SIZES, progress=True)
    return curves


def _packed_difference(run, data):
    """Largest difference between the logits of clips in packed rows and of clips alone."""
    from tf_data_pipelines.pipeline import evaluation_batches

    alone = dataclasses.replace(run.packing, segments=1)
    predictor = PackedPredictor(run.model)
    outputs = [
        packed_outputs(
            predictor,
            evaluation_batches(data, run.fbank, patches=run.patches, packing=packing),
            len(data.source),
            text,
        )[0]
        for packing, text in ((run.packing, "Packed with neighbors"), (alone, "One clip a row"))
    ]
    return float(np.abs(outputs[0] - outputs[1]).max())


def _row_fill(run, data, seed, count=20):
    """Share of the places in training rows that hold a token."""
    from tf_data_pipelines.pipeline import training_batches

    batches = training_batches(data, run.fbank, patches=run.patches, packing=run.packing, seed=seed)
    return float(np.mean([inputs["segment_ids"] > 0 for inputs, _, _ in batches.take(count)]))


def _check_artifacts(run, data, paths):
    """Each artifact's scores against the run's for test clips, and its own accuracy."""
    waveforms = [clip.read(run.fbank.sample_rate) for clip in data.source.clips]
    expected = {str(size): load_classifier(run, size).predict(waveforms) for size in EXPORT_PATCHES}
    checks = {}
    artifacts = [one for path in paths for one in scoring_artifacts(path)]
    for artifact in track(artifacts, "Running artifacts"):
        scores = artifact.scores(waveforms)
        difference = np.abs(scores - expected[artifact.patch_size]).max()
        checks[artifact.name] = {
            "max_abs_difference": float(difference),
            "accuracy": accuracy(data.source.targets(), scores),
            "megabytes": round(artifact.size / 1e6, 2),
        }
    return checks


def _print_report(console, report):
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
