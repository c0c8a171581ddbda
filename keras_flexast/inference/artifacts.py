"""Exported artifacts as classifiers: waveforms of any length in, scores out.

TensorFlow runs a SavedModel, LiteRT or TensorFlow's interpreter a `.tflite`, and onnxruntime an
`.onnx`. Every artifact describes itself by two texts:

labels.txt      one class a line, in the order of the scores
artifact.json   filterbank with its sample rate, patch sizes, precision, kind of labels

`artifact_texts` writes them and `read_texts` reads them. A SavedModel holds them in its assets, a
`.tflite` in the ZIP at its end, an `.onnx` in its metadata_props.
"""

import dataclasses
import functools
import io
import json
import pathlib
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from rich.markup import escape
from rich.progress import Progress

from keras_flexast.files import EMBEDDINGS, refuse_overwrite
from keras_flexast.inference.runtimes import DESCRIPTION, LABELS, OPENERS, model_folder
from keras_flexast.inference.windows import BATCH_SAMPLES, mean_of_windows
from keras_flexast.runs import described, heard_seconds, is_cut, labels_text
from keras_flexast.settings import VERSION
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.hints import PathLike
from tf_data_pipelines.settings import (
    SHARES,
    DataWarning,
    FbankSettings,
    check_positive,
    checked_shares,
    patch_name,
    patch_pair,
)

SAMPLE_RATE = 16000  # Hz, of an artifact that does not name its rate


# === The artifact's description of itself ===


def describe_artifact(
    run, fbank, *, patch_sizes, samples=None, precision="float32", input="waveform"
):
    """What an artifact says of itself: the content of artifact.json.

    Args:
        run: Run.
        fbank: FbankSettings at the artifact's frame shift.
        patch_sizes: dictionary of signature names to (frequency, time) pairs.
        samples: number of samples of every clip; None for clips of any length.
        precision: precision of the weights, one of PRECISIONS.
        input: name of the input, one of INPUTS.

    Returns:
        dictionary for `artifact_texts`.
    """
    return {
        "input": input,
        "precision": precision,
        "patch_sizes": patch_sizes,
        "samples": samples,
        "multi_label": run.multi_label,
        "shares": list(run.shares),
        "fbank": fbank.to_dict(),
        "keras_flexast": VERSION,
    }


def artifact_texts(classes, description):
    """The texts that go into an artifact, {"labels.txt": text, "artifact.json": text}.

    Args:
        classes: class names in the order of the scores.
        description: dictionary of `describe_artifact`, or any other that JSON can hold.
    """
    return {LABELS: labels_text(classes), DESCRIPTION: json.dumps(description, indent=2) + "\n"}


def read_texts(texts):
    """Class names and description from the texts of an artifact.

    Args:
        texts: {file name: text}, as `artifact_texts` gives it. Other files are ignored.

    Returns:
        tuple of class names, empty without labels.txt; and the description, an empty
        dictionary without artifact.json.

    Raises:
        ValueError: artifact.json is not a JSON object.
    """
    classes = tuple(line for line in texts.get(LABELS, "").split("\n") if line)
    try:
        description = json.loads(texts.get(DESCRIPTION, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{DESCRIPTION} in the artifact is damaged: {error}.") from None
    if not isinstance(description, dict):
        raise ValueError(f"{DESCRIPTION} in the artifact is damaged: it is no JSON object.")
    return classes, description


# === Artifacts ===


@dataclasses.dataclass(frozen=True)
class Artifact:
    """One signature of an exported classifier.

    Args:
        path: the `.tflite` or `.onnx` file, or the SavedModel folder (of one version).
        signature: name of the signature inside the artifact.
        classes: class names in the order of the scores.
        samples: number of samples of every clip; None where clips have any length.
        sample_rate: sample rate of the waveforms in Hz.
        multi_label: whether scores are independent (sigmoid); None if unknown.
        patch_size: name of the patch size, such as "16" or "16x24"; None if unknown.
        precision: "float32", "float16", "dynamic" or "int8"; None if unknown.
        takes_length: whether it is told the length of a clip, and so hears the clip alone.
        fbank: FbankSettings of its front end; None if unknown.
        dim: width of the embeddings; None where the artifact has none.
        shares: shares of validation and test clips at its training, see Run.
        run: function from padded waveforms float32 (batch, samples) and lengths int32
            (batch,) to scores float32 (batch, classes) and a list of error texts, one per clip.
        embed: function like `run` that gives embeddings float32 (batch, dim) in place of the
            scores; None where the artifact has none.
    """

    path: pathlib.Path
    signature: str
    _: dataclasses.KW_ONLY
    classes: tuple[str, ...]
    samples: int | None
    sample_rate: int
    multi_label: bool | None
    patch_size: str | None
    precision: str | None
    takes_length: bool = False
    fbank: FbankSettings | None = None
    dim: int | None = None
    shares: tuple = SHARES
    run: Callable = dataclasses.field(repr=False)
    embed: Callable | None = dataclasses.field(default=None, repr=False)

    @property
    def name(self):
        """The file's own name, followed by the signature where the file has several."""
        stem = self.path.stem
        if self.path.is_dir() and stem.isdecimal():  # a version of TF Serving
            stem = self.path.parent.name
        return stem if self.signature == "serving_default" else f"{stem} {self.signature}"

    @property
    def min_samples(self):
        """Number of samples of the shortest clip: one window of the filterbank."""
        return (self.fbank or FbankSettings(sample_rate=self.sample_rate)).window

    @property
    def size(self):
        """Bytes of the file, or of all files in the folder; its signatures share them."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def scores(self, waveforms):
        """Scores of clips of any lengths.

        An artifact for clips of one length gets a shorter clip with zeros at its end, and its
        length where it takes one. A longer clip is cut into windows that overlap by half, the
        last one ending with the clip; its scores are the mean of theirs.

        Args:
            waveforms: list of float32 (samples,) in [-1, 1], at `sample_rate` Hz.

        Returns:
            float32 (clips, classes).

        Raises:
            ValueError: the artifact refused a clip, or gave NaN.
        """
        scores, refused = self.answer(waveforms)
        self._check_refused(refused)
        return scores

    def answer(self, waveforms):
        """Scores of clips of any lengths, with a reason for each clip that the artifact refuses.

        Args:
            waveforms: as for `scores`.

        Returns:
            float32 (clips, classes), zeros for a refused clip; and a tuple of texts, one per
            clip: the reason of the refusal, or "".

        Raises:
            ValueError: the artifact gave NaN.
        """
        return self._mean_of_windows(self.run, waveforms, len(self.classes))

    def embeddings(self, waveforms):
        """Embeddings of clips of any lengths: one vector per clip, before the head.

        Args:
            waveforms: as for `scores`.

        Returns:
            float32 (clips, dim).

        Raises:
            ValueError: the artifact has no embeddings, refused a clip, or gave NaN.
        """
        embeddings, refused = self.answer_embeddings(waveforms)
        self._check_refused(refused)
        return embeddings

    def answer_embeddings(self, waveforms):
        """Embeddings of clips of any lengths, with reasons as `answer` gives them."""
        self.check_embeds()
        return self._mean_of_windows(self.embed, waveforms, self.dim)

    def check_embeds(self):
        """Raise a ValueError if the artifact has no embeddings."""
        if self.embed is None:
            raise ValueError(
                f"{self.path} ({self.signature}) has no embeddings. Use a SavedModel that "
                f"`flexast export` wrote."
            )

    def _mean_of_windows(self, function, waveforms, width):
        """Outputs (clips, width) of `run` or `embed`, and the reasons of refused clips."""
        outputs, refused = mean_of_windows(function, waveforms, width, self.samples)
        if not np.isfinite(outputs).all():
            raise ValueError(f"{self.path} ({self.signature}) gave NaN or infinite numbers.")
        return outputs, refused

    def _check_refused(self, refused):
        for number, reason in enumerate(refused):
            if reason:
                raise ValueError(f"{self.path} refused clip {number}: {reason}")


def load_artifact(path, signature=None, threads=2):
    """An exported classifier, ready to run.

    Args:
        path: `.tflite` file, `.onnx` file, SavedModel folder, or TF Serving folder, of which
            the highest version is taken.
        signature: name of a signature, such as "patch_16"; None for `serving_default`, or
            for the only one.
        threads: number of threads of LiteRT or onnxruntime; TensorFlow takes all cores.

    Returns:
        Artifact.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path is damaged, no artifact, without labels or without that signature.
        ImportError: onnxruntime is not installed.
    """
    found = load_artifacts(path, threads)
    if signature is None:
        signature = "serving_default" if "serving_default" in found else next(iter(found))
        if len(found) > 1 and signature != "serving_default":
            raise ValueError(
                f"{path} has several signatures, {', '.join(found)}; choose one, such as "
                f"patch_size={signature.removeprefix('patch_')} (--patch-size)."
            )
    if signature not in found:
        raise ValueError(f"{path} has no signature {signature!r}; it has {', '.join(found)}.")
    return found[signature]


def load_artifacts(path, threads=2):
    """Every signature of an artifact that scores waveforms.

    Args:
        path: as for `load_artifact`.
        threads: as for `load_artifact`.

    Returns:
        {signature: Artifact}.

    Raises:
        FileNotFoundError, ValueError, ImportError: as for `load_artifact`.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a SavedModel folder, .tflite or .onnx."
        )
    check_positive("threads", threads, int)
    version = model_folder(path) if path.is_dir() else path
    kind = "saved_model" if path.is_dir() else path.suffix
    if version is None or kind not in OPENERS:
        raise ValueError(
            f"{path} is neither a SavedModel folder nor a .tflite or .onnx file. `flexast export` "
            f"writes them."
        )
    signatures, texts = OPENERS[kind](version, threads)
    classes, description = _classes_and_description(version, texts)
    try:
        sizes = {
            name: patch_pair(pair) for name, pair in description.get("patch_sizes", {}).items()
        }
        shares = checked_shares(description.get("shares", SHARES))
        fbank = FbankSettings.from_dict(description["fbank"]) if "fbank" in description else None
        rate = fbank.sample_rate if fbank else SAMPLE_RATE
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{DESCRIPTION} in {version} is damaged: {described(error)}. Export again."
        ) from error
    embedders = {name: signatures.pop(name) for name in [*signatures] if name.startswith("embed")}
    artifacts = {}
    for name, one in signatures.items():
        if one.width != len(classes):
            raise ValueError(f"{version} has {one.width} scores and {len(classes)} labels.")
        pair = sizes.get(name)
        named = name.removeprefix("patch_") if name.startswith("patch_") else None
        embed = embedders.get(f"embed_{named}")
        if name == "serving_default" or (pair and pair == sizes.get("embed")):
            embed = embedders.get("embed")
        artifacts[name] = Artifact(
            version,
            name,
            classes=classes,
            samples=one.samples,
            sample_rate=rate,
            multi_label=description.get("multi_label"),
            patch_size=patch_name(pair) if pair else named,
            precision=description.get("precision"),
            dim=embed.width if embed else None,
            shares=shares,
            takes_length=one.takes_length,
            fbank=fbank,
            run=one.run,
            embed=embed.run if embed else None,
        )
    if not artifacts:
        raise ValueError(
            f"{version} has no signature from `waveform` (batch, samples) to `scores`. Export "
            f"it with waveforms as input."
        )
    return artifacts


def is_artifact(path):
    """Whether a path is an exported artifact; a file is judged by its name alone."""
    path = pathlib.Path(path)
    return model_folder(path) is not None if path.is_dir() else path.suffix in OPENERS


def scoring_artifacts(path, patch_sizes=None, threads=2):
    """The signatures of an artifact that score waveforms, each patch size once.

    `serving_default` is left out where there are signatures named `patch_...`, because it is
    one of them under another name.

    Args:
        path, threads: as for `load_artifacts`.
        patch_sizes: ints or (frequency, time) pairs, those that are wanted; None for all.

    Returns:
        list of Artifact, in the order of `patch_sizes`.

    Raises:
        FileNotFoundError, ImportError: as for `load_artifacts`.
        ValueError: so, too; or there is no such patch size.
    """
    signatures = load_artifacts(path, threads)
    sized = [one for name, one in signatures.items() if name.startswith("patch_")]
    found = sized or [*signatures.values()]
    if patch_sizes is None:
        return found
    named, chosen = {one.patch_size: one for one in found}, []
    for wanted in (patch_name(patch_pair(size)) for size in patch_sizes):
        if wanted not in named:
            names = [name or "one that it does not name (leave the option out)" for name in named]
            raise ValueError(f"{path} has no patch size {wanted}; it has {', '.join(names)}.")
        chosen.append(named[wanted])
    if not chosen:
        raise ValueError("patch_sizes is empty; give at least one size, such as (16,).")
    return chosen


def check_settled(path, **options):
    """Raise for options that an exported artifact has fixed."""
    for name, value in options.items():
        if value:
            raise ValueError(
                f"{name}={value!r} cannot be changed in an exported artifact, {path}; export again."
            )


@dataclasses.dataclass(frozen=True)
class FileScores:
    """Scores of sound files.

    Args:
        scores: float32 (usable files, classes).
        paths: list of the usable files' paths as str, in their order.
        rejected: tuple of (path, reason) for each file that has no scores.
    """

    scores: np.ndarray
    paths: list[str]
    rejected: tuple[tuple[str, str], ...] = ()

    def top(self, classes: Sequence[str], k: int = 3) -> list[list[tuple[str, float]]]:
        """The best k classes of each file: a list of lists of (class name, score), best first."""
        check_positive("k", k, int)
        best = np.argsort(-self.scores, axis=1, kind="stable")[:, :k]
        return [
            [(classes[one], float(row[one])) for one in places]
            for row, places in zip(self.scores, best, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class FileEmbeddings:
    """One vector for each of several sound files.

    Args:
        embeddings: float32 (usable files, width).
        paths: list of the usable files' paths as str, in their order.
        rejected: tuple of (path, reason) for each file that has no embedding.
    """

    embeddings: np.ndarray
    paths: list[str]
    rejected: tuple[tuple[str, str], ...] = ()

    def save(self, path: PathLike) -> None:
        """Write `files` (paths) and `embeddings` as NumPy's .npz, whole or not at all.

        Raises:
            FileExistsError: another file than one of embeddings is there.
        """
        refuse_overwrite(path, True, kind=EMBEDDINGS)
        content = io.BytesIO()
        np.savez(content, files=self.paths, embeddings=self.embeddings)
        atomic_write(path, content.getvalue())


def file_scores(artifact, paths, description=None):
    """Scores of sound files of any format, sample rate and length.

    Args:
        artifact: Artifact.
        paths: list of file names; a Clip of a data set may stand for its part of a file.
        description: text beside a progress bar; None shows no bar.

    Returns:
        FileScores. A file is rejected when it cannot be decoded, or when the artifact
        refuses it.
    """
    return FileScores(*_over_files(artifact, paths, artifact.answer, description))


def file_embeddings(artifact, paths, description=None):
    """Embeddings of sound files of any format, sample rate and length.

    Args:
        artifact, paths, description: as for `file_scores`.

    Returns:
        FileEmbeddings.

    Raises:
        ValueError: the artifact has no embeddings.
    """
    artifact.check_embeds()
    return FileEmbeddings(*_over_files(artifact, paths, artifact.answer_embeddings, description))


def warn_of_unheard(artifact, lengths):
    """Warn where clips of so many samples are longer than what an artifact hears of them."""
    if artifact.samples or artifact.fbank is None:  # a fixed length goes on in windows
        return
    lengths = list(lengths)
    cut = sum(is_cut(artifact.fbank, length / artifact.sample_rate) for length in lengths)
    if cut:
        warnings.warn(
            f"{cut} of {len(lengths)} clips are longer than the "
            f"{heard_seconds(artifact.fbank):.2f} s that {artifact.path} hears; the rest of them "
            f"is not heard.",
            DataWarning,
            stacklevel=3,
        )


def _over_files(artifact, paths, answer, description):
    """(outputs (usable files, width), their paths, rejected) of a function like `answer`."""
    from tf_data_pipelines.audio import AudioError, read_audio
    from tf_data_pipelines.clips import Clip

    files, rate = list(paths), artifact.sample_rate
    least = {"min_samples": artifact.min_samples}
    paths = [one.name if isinstance(one, Clip) else str(one) for one in files]
    outputs, rejected, unscored = {}, {}, {}  # by the file's number; unscored holds waveforms
    lengths = []

    def flush():
        given, refused = answer(list(unscored.values()))
        for number, output, reason in zip(unscored, given, refused, strict=True):
            if reason:
                rejected[number] = f"{paths[number]}: {reason}"
            else:
                outputs[number] = output
        unscored.clear()
        return given.shape[1]

    with Progress(disable=description is None) as progress:
        for number, one in enumerate(progress.track(files, description=escape(description or ""))):
            try:
                read = one.read if isinstance(one, Clip) else functools.partial(read_audio, one)
                unscored[number] = wave = read(rate, **least)
                lengths.append(len(wave))
            except AudioError as error:
                rejected[number] = str(error)
            if sum(map(len, unscored.values())) > BATCH_SAMPLES:
                flush()
        width = flush()
    warn_of_unheard(artifact, lengths)
    table = np.zeros((len(outputs), width), "float32")
    table[:] = list(outputs.values()) or table
    failed = tuple((paths[number], rejected[number]) for number in sorted(rejected))
    return table, [paths[number] for number in outputs], failed


def _classes_and_description(path, texts):
    """Class names and description from an artifact's texts, or from labels beside it."""
    place = path / "assets" / LABELS if path.is_dir() else path.with_suffix(f".{LABELS}")
    if LABELS not in texts and place.exists():
        texts = {**texts, LABELS: place.read_text(encoding="utf-8")}
    try:
        classes, description = read_texts(texts)
    except ValueError as error:
        raise ValueError(f"{path}: {error} Export again.") from None
    if not classes:
        raise ValueError(f"{path} has no labels. Write one class a line into {place}.")
    return classes, description
