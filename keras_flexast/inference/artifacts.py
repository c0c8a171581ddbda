"""Exported artifacts as classifiers: waveforms of any length in, scores out.

A SavedModel is run by TensorFlow, a `.tflite` by LiteRT or TensorFlow's interpreter, an
`.onnx` by onnxruntime. Labels come from the artifact itself.
"""

import dataclasses
import json
import pathlib
import zipfile
from collections.abc import Callable

import numpy as np
from rich.progress import Progress

from tf_data_pipelines.settings import patch_name

BATCH_SAMPLES = 60 * 16000  # padded samples that one call gets; a longer clip is alone
SAMPLE_RATE = 16000  # Hz, where an artifact does not say


@dataclasses.dataclass(frozen=True)
class Artifact:
    """One signature of an exported classifier.

    Args:
        path: the `.tflite` or `.onnx` file, or the SavedModel folder (of one version).
        signature: its name inside the artifact.
        classes: names in the order of the scores.
        samples: that every clip has; None where clips have any length.
        sample_rate: Hz of the waveforms.
        multi_label: whether scores are independent (sigmoid); None where nothing says so.
        patch_size: "16", "16x24"; None where nothing says so.
        precision: "float32", "float16", "dynamic" or "int8"; None where nothing says so.
        run: function from padded waveforms float32 (batch, samples) and lengths int32
            (batch,) to scores float32 (batch, classes) and an error text for each clip.
    """

    path: pathlib.Path
    signature: str
    classes: tuple[str, ...]
    samples: int | None
    sample_rate: int
    multi_label: bool | None
    patch_size: str | None
    precision: str | None
    run: Callable = dataclasses.field(repr=False)

    @property
    def name(self):
        """The file's own name, and the signature where the file has several."""
        stem = self.path.stem
        if self.path.is_dir() and stem.isdecimal():  # a version of TF Serving
            stem = self.path.parent.name
        return stem if self.signature == "serving_default" else f"{stem} {self.signature}"

    @property
    def size(self):
        """Bytes of the file, or of the folder's files; its signatures share them."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def scores(self, waveforms):
        """Scores of clips of any lengths.

        With a fixed number of samples, a shorter clip is filled up with zeros, and a longer
        one is cut into windows that overlap by half, the last one up to the clip's end; its
        scores are their mean.

        Args:
            waveforms: list of float32 (samples,) in [-1, 1], at `sample_rate` Hz.

        Returns:
            float32 (clips, classes).

        Raises:
            ValueError: the artifact refused a clip, or gave NaN.
        """
        scores, refused = self.answer(waveforms)
        for number, reason in enumerate(refused):
            if reason:
                raise ValueError(f"{self.path} refused clip {number}: {reason}")
        return scores

    def answer(self, waveforms):
        """`scores`, and a text for each clip: why the artifact refused it, else ""."""
        pieces = [
            (clip, waveform[start : start + self.samples] if self.samples else waveform)
            for clip, waveform in enumerate(waveforms)
            for start in _starts(len(waveform), self.samples)
        ]
        pieces.sort(key=lambda piece: len(piece[1]))  # alike lengths need little padding
        scores = np.zeros((len(waveforms), len(self.classes)), "float32")
        counts, refused = np.zeros((len(waveforms), 1), "float32"), [""] * len(waveforms)
        for clips, batch, lengths in _batches(pieces, self.samples):
            given, reasons = self.run(batch, lengths)
            if not np.isfinite(given).all():
                raise ValueError(f"{self.path} ({self.signature}) gave NaN or infinite scores.")
            np.add.at(scores, clips, given)
            np.add.at(counts, clips, 1)
            for clip, reason in zip(clips, reasons, strict=True):
                refused[clip] = refused[clip] or reason
        return scores / counts, tuple(refused)


def load_artifact(path, signature=None, threads=2):
    """An exported classifier, ready to run.

    Args:
        path: `.tflite`, `.onnx`, a SavedModel folder, or a TF Serving folder of versions
            (its highest is taken).
        signature: such as "patch_16"; None for `serving_default`, or the only one.
        threads: of LiteRT or onnxruntime; TensorFlow takes all cores.

    Returns:
        Artifact.

    Raises:
        FileNotFoundError, ValueError: no such artifact, damaged, of another kind, without
            labels, or without that signature.
        ImportError: onnxruntime is not installed.
    """
    found = load_artifacts(path, threads)
    if signature is None:
        signature = "serving_default" if "serving_default" in found else next(iter(found))
        if len(found) > 1 and signature != "serving_default":
            raise ValueError(
                f"{path} has several signatures, {', '.join(found)}; choose one, such as "
                f"--patch-size {signature.removeprefix('patch_')}."
            )
    if signature not in found:
        raise ValueError(f"{path} has no signature {signature!r}; it has {', '.join(found)}.")
    return found[signature]


def load_artifacts(path, threads=2):
    """{signature: Artifact} of everything in an artifact that scores waveforms.

    Args, Raises: as `load_artifact`.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a SavedModel folder, .tflite or .onnx."
        )
    version = _version(path) if path.is_dir() else path
    kind = "saved_model" if path.is_dir() else path.suffix
    if version is None or kind not in OPENERS:
        raise ValueError(
            f"{path} is neither a SavedModel folder nor a .tflite or .onnx file. `flexast export` "
            f"writes them."
        )
    classes, card = _labels_and_card(version)
    sample_rate = card.get("fbank", {}).get("sample_rate", SAMPLE_RATE)
    artifacts = {}
    for name, (samples, width, run) in OPENERS[kind](version, threads).items():
        if width != len(classes):
            raise ValueError(f"{version} has {width} scores and {len(classes)} labels.")
        pair = card.get("patch_sizes", {}).get(name)
        named = name.removeprefix("patch_") if name.startswith("patch_") else None
        artifacts[name] = Artifact(
            version, name, classes, samples, sample_rate, card.get("multi_label"),
            patch_name(pair) if pair else named, card.get("precision"), run,
        )  # fmt: skip
    if not artifacts:
        raise ValueError(
            f"{version} has no signature from `waveform` (batch, samples) to `scores`. Export "
            f"it with waveforms as input."
        )
    return artifacts


def scoring_artifacts(path, threads=2):
    """As `load_artifacts`, but each set of weights and patch size once.

    A `serving_default` beside `patch_...` is one of them under another name.
    """
    found = load_artifacts(path, threads)
    sized = {name: one for name, one in found.items() if name.startswith("patch_")}
    return sized or found


def is_artifact(path):
    """Whether a path is, or by its name would be, an exported artifact."""
    path = pathlib.Path(path)
    return _version(path) is not None if path.is_dir() else path.suffix in OPENERS


def file_scores(artifact, paths, description=None):
    """Scores of sound files of any format, rate and length.

    Args:
        artifact: Artifact.
        paths: of the files.
        description: text beside a progress bar; None shows none.

    Returns:
        scores float32 (usable files, classes), the usable files' paths in their order, and
        (path, reason) of each file that could not be decoded or that the artifact refused.
    """
    from tf_data_pipelines.decode import AudioError, read_audio

    scores, rejected, waiting = {}, {}, {}  # by the file's number; waiting: waveforms

    def flush():
        given, refused = artifact.answer(list(waiting.values()))
        for number, score, reason in zip(waiting, given, refused, strict=True):
            if reason:
                rejected[number] = f"{paths[number]}: {reason}"
            else:
                scores[number] = score
        waiting.clear()

    with Progress(disable=description is None) as progress:
        for number, path in enumerate(progress.track(paths, description=description or "")):
            try:
                waiting[number] = read_audio(path, artifact.sample_rate)
            except AudioError as error:
                rejected[number] = str(error)
            if sum(map(len, waiting.values())) > BATCH_SAMPLES:
                flush()
        flush()
    table = np.zeros((len(scores), len(artifact.classes)), "float32")
    table[:] = list(scores.values()) or table
    failed = tuple((paths[number], rejected[number]) for number in sorted(rejected))
    return table, [paths[number] for number in scores], failed


def _starts(length, window):
    """Where the windows of a clip begin: half a window apart, the last up to its end."""
    if window is None or length <= window:
        return [0]
    return [*range(0, length - window, window // 2), length - window]


def _batches(pieces, samples):
    """(clips, float32 (batch, samples), int32 lengths) of pieces sorted by length."""
    while pieces:
        count = 1
        while count < len(pieces) and (
            (count + 1) * (samples or len(pieces[count][1])) <= BATCH_SAMPLES
        ):
            count += 1
        taken, pieces = pieces[:count], pieces[count:]
        batch = np.zeros((count, samples or len(taken[-1][1])), "float32")
        for row, (_, waveform) in zip(batch, taken, strict=True):
            row[: len(waveform)] = waveform
        lengths = np.array([len(waveform) for _, waveform in taken], "int32")
        yield [clip for clip, _ in taken], batch, lengths


def _version(folder):
    """A SavedModel folder: this one, or its highest version; None if there is none."""
    if (folder / "saved_model.pb").exists():
        return folder
    versions = [
        child
        for child in folder.iterdir()
        if child.name.isdecimal() and (child / "saved_model.pb").exists()
    ]
    return max(versions, key=lambda child: int(child.name), default=None)


def _labels_and_card(path):
    """Class names, and what card.json says ({} without one): inside, or labels beside."""
    texts = {}
    if path.is_dir():
        for name in ("labels.txt", "card.json"):
            if (path / "assets" / name).exists():
                texts[name] = (path / "assets" / name).read_text()
    elif zipfile.is_zipfile(path):  # the tail that carries a .tflite's associated files
        with zipfile.ZipFile(path) as archive:
            for name in {"labels.txt", "card.json"} & set(archive.namelist()):
                texts[name] = archive.read(name).decode()
    place = path / "assets" / "labels.txt" if path.is_dir() else path.with_suffix(".labels.txt")
    if "labels.txt" not in texts and place.exists():
        texts["labels.txt"] = place.read_text()
    if "labels.txt" not in texts:
        raise ValueError(f"{path} has no labels. Write one class a line into {place}.")
    classes = tuple(line for line in texts["labels.txt"].split("\n") if line)
    return classes, json.loads(texts.get("card.json", "{}"))


def _open_saved_model(path, threads):
    """{signature: (samples, classes, run)}; `threads` is TensorFlow's own matter."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    return {
        name: _saved_model_signature(loaded, serve)
        for name, serve in loaded.signatures.items()
        if "waveform" in serve.structured_input_signature[1]
        and "scores" in serve.structured_outputs
    }


def _saved_model_signature(loaded, serve):
    import tensorflow as tf

    given = serve.structured_input_signature[1]

    def run(batch, lengths, loaded=loaded):  # the signature does not keep its model alive
        inputs = {"waveform": tf.constant(batch)}
        if "length" in given:
            inputs["length"] = tf.constant(lengths)
        outputs = serve(**inputs)
        errors = outputs["error"].numpy() if "error" in outputs else [b""] * len(batch)
        return outputs["scores"].numpy(), [error.decode() for error in errors]

    return given["waveform"].shape[1], serve.structured_outputs["scores"].shape[-1], run


def _open_tflite(path, threads):
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter  # noqa: N806, a class

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from None
    runners = {
        name: interpreter.get_signature_runner(name)
        for name, sides in interpreter.get_signature_list().items()
        if sides["inputs"] == ["waveform"] and "scores" in sides["outputs"]
    }
    return {name: _tflite_signature(runner) for name, runner in runners.items()}


def _tflite_signature(runner):
    def run(batch, lengths):
        rows = [runner(waveform=waveform[None])["scores"][0] for waveform in batch]
        return np.stack(rows), [""] * len(batch)

    samples = runner.get_input_details()["waveform"]["shape"][-1]
    return int(samples), int(runner.get_output_details()["scores"]["shape"][-1]), run


def _open_onnx(path, threads):
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            f"{path} needs onnxruntime. Install it with `pip install onnxruntime`."
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise ValueError(f"{path} cannot be loaded: {error}") from None
    inputs = {one.name: one.shape for one in session.get_inputs()}
    outputs = {one.name: one.shape for one in session.get_outputs()}
    if list(inputs) != ["waveform"] or "scores" not in outputs:
        return {}

    def run(batch, lengths):
        rows = [session.run(["scores"], {"waveform": waveform[None]})[0] for waveform in batch]
        return np.concatenate(rows), [""] * len(batch)

    return {"serving_default": (inputs["waveform"][1], outputs["scores"][-1], run)}


OPENERS = {"saved_model": _open_saved_model, ".tflite": _open_tflite, ".onnx": _open_onnx}
