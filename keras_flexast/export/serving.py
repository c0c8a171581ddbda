"""A run as a model folder for TensorFlow Serving: named signatures over one set of weights.

FOLDER/<version>/         SavedModel, with labels.txt and artifact.json in assets and warm-up
                          requests in assets.extra
FOLDER/models.config      for --model_config_file
FOLDER/batching.config    for --batching_parameters_file

Every clip is tokenized on its own and has a row of its own, so neither the other clips of a batch
nor the padding of its waveform can change its scores. Writing needs the TensorFlow backend, running
needs TensorFlow alone. With FOLDER mounted at /models/NAME the server starts as

    tensorflow_model_server --rest_api_port=8501 \\
        --model_config_file=/models/NAME/models.config \\
        --allow_version_labels_for_unavailable_models \\
        --enable_batching --batching_parameters_file=/models/NAME/batching.config
"""

import contextlib
import math
import pathlib
import re

import numpy as np

from keras_flexast.export.common import check_backend
from keras_flexast.export.serving_files import batching_config, models_config, write_warm_up
from keras_flexast.files import SAVED_MODEL, atomic_folder, atomic_write, refuse_overwrite
from keras_flexast.inference.artifacts import artifact_texts, describe_artifact
from keras_flexast.models import embedding_model
from keras_flexast.settings import MAX_PEAK, MAX_SERVED_SECONDS
from tf_data_pipelines.resize import token_count
from tf_data_pipelines.settings import MAX_ROW_LENGTH, check_positive, patch_name, patch_pair

TOP = 5  # labels that an answer names


def write_serving(
    run,
    folder,
    *,
    patch_sizes=(16,),
    version=None,
    max_seconds=MAX_SERVED_SECONDS,
    frame_shift_ms=None,
    name=None,
    overwrite=False,
):
    """Write a run as a new version of a TensorFlow Serving model.

    The signatures, with the batch always in the first axis:

        serving_default   waveform float32 (batch, samples) at the run's sample rate and length
                          int32 (batch,), the samples that count -> scores float32 (batch,
                          classes), top_labels string and top_scores float32 (batch, up to
                          5), error string (batch,)
        patch_8, ...      the same at each patch size; serving_default is the first of them
        classify_wav      wav_bytes string (batch,), 16-bit PCM WAV of any usual rate -> the
                          answer of serving_default
        features          waveform, length -> log_mel float32 (batch, frames, mel_bins),
                          normalized as the model needs it and padded with zeros; frames int32
                          (batch,); error
        embed             waveform, length -> embedding float32 (batch, dim), error

    A clip that cannot be used (NaN, silent, integers, too short, too long, a length that does
    not fit, not such a WAV) gets zeros, empty labels and a sentence in `error`. The `error` of
    all other clips is "".

    Args:
        run: Run.
        folder: folder of the model. Existing versions stay; models.config is written again,
            batching.config only where it is missing.
        patch_sizes: list of ints or (frequency, time) pairs.
        version: positive int; None for one more than the highest version there.
        max_seconds: length of the longest clip that is accepted. It may be shorter at small
            patch sizes, because a clip has at most 8,192 tokens.
        frame_shift_ms: frame shift in milliseconds; None for that of training.
        name: name of the model in requests; None for the name of the folder.
        overwrite: whether to replace an existing version.

    Returns:
        pathlib.Path of the version's folder, which appears whole or not at all.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
        ValueError: a patch size, max_seconds, the version or the name cannot be used.
        FileExistsError: the version exists.
    """
    check_backend()
    check_positive("max_seconds", max_seconds)
    folder = pathlib.Path(folder).absolute()
    name = folder.name if name is None else name
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ValueError(
            f"name={name!r} cannot be part of a URL. Use letters, digits, '_', '-' and '.', or "
            f"rename the folder."
        )
    versions = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    version = 1 + max(versions, default=0) if version is None else version
    check_positive("version", version, int)
    target = folder / str(version)
    refuse_overwrite(target, overwrite, kind=SAVED_MODEL)
    module = _Serving(run, patch_sizes, max_seconds, frame_shift_ms)
    created = not folder.exists()
    try:
        with atomic_folder(target, overwrite, kind=SAVED_MODEL) as partial:
            module.write(partial, name)
    except BaseException:
        if created:
            with contextlib.suppress(OSError):  # not empty if another export writes there too
                folder.rmdir()
        raise
    atomic_write(folder / "models.config", models_config(name, max([version, *versions])))
    if not (folder / "batching.config").exists():
        atomic_write(folder / "batching.config", batching_config())
    return target


class _Serving:
    """The signatures of a SavedModel as plain TensorFlow functions."""

    def __init__(self, run, patch_sizes, max_seconds, frame_shift_ms):
        import tensorflow as tf

        self.run = run
        self.fbank, self.frame_shift_scale = run.front_end(frame_shift_ms)
        self.max_seconds = max_seconds
        self.patches = {}  # name: PatchSettings
        for pair in map(patch_pair, patch_sizes):
            self.patches[patch_name(pair)] = run.patches_at([pair])
        if not self.patches:
            raise ValueError("patch_sizes is empty; give at least one size, such as (16,).")
        self.limits = {name: self._limit(name) for name in self.patches}  # samples
        rows = {
            "tokens": tf.TensorSpec([None, None, math.prod(run.model.backbone.base_patch)]),
            "positions": tf.TensorSpec([None, None, 4]),
            "segment_ids": tf.TensorSpec([None, None], tf.int32),
        }

        # Two tf.functions, so that the graph holds one copy of the encoder for all signatures.
        @tf.function(input_signature=[rows], autograph=False)
        def logits(rows):
            return _row_by_row(run.model, rows, len(run.classes))

        embedder = embedding_model(run.model)

        @tf.function(input_signature=[rows], autograph=False)
        def embedding(rows):
            return _row_by_row(embedder, rows, run.model.backbone.dim)

        self._logits, self._embedding = logits, embedding

    def _limit(self, name):
        """Samples of the longest clip at a patch size: max_seconds, or what its tokens allow."""
        fbank, patches = self.fbank, self.patches[name]
        (pair,) = patches.patch_sizes
        limit = round(self.max_seconds * fbank.sample_rate)
        if limit < fbank.window:
            raise ValueError(
                f"max_seconds={self.max_seconds} is under one window of {fbank.window_ms} ms. "
                f"Choose more."
            )
        frames = np.arange(1, fbank.frames(limit) + 1)
        if fbank.clip_ms is not None:
            frames = np.array([fbank.clip_frames])  # every clip has as many: all fit, or none
        fits = np.flatnonzero(token_count(frames, fbank.mel_bins, pair, patches) <= MAX_ROW_LENGTH)
        if not len(fits):
            raise ValueError(
                f"patch_size={name} makes more than {MAX_ROW_LENGTH:,} tokens of every clip. "
                f"Choose a larger one."
            )
        if fits[-1] + 1 < len(frames):
            limit = fbank.window + int(frames[fits[-1]]) * fbank.shift - 1
        return limit

    def write(self, folder, name):
        """Write the SavedModel, its texts and its warm-up requests into an empty folder."""
        import tensorflow as tf

        first = next(iter(self.patches))
        waveform = tf.TensorSpec([None, None], tf.float32, "waveform")
        sounds = [waveform, tf.TensorSpec([None], tf.int32, "length")]
        wavs = [tf.TensorSpec([None], tf.string, "wav_bytes")]

        def classify(patch):
            return lambda waveform, length: self.classify(waveform, length, patch)

        endpoints = {
            "serving_default": (classify(first), sounds),
            **{f"patch_{patch}": (classify(patch), sounds) for patch in self.patches},
            "classify_wav": (lambda wav_bytes: self.classify_wav(wav_bytes, first), wavs),
            "features": (lambda waveform, length: self.features(waveform, length, first), sounds),
            "embed": (lambda waveform, length: self.embed(waveform, length, first), sounds),
        }
        # An ExportArchive would hold every weight twice.
        module, signatures = tf.Module(), {}
        module.weights = [weight.value for weight in self.run.model.weights]
        for endpoint, (function, signature) in endpoints.items():
            traced = tf.function(function, input_signature=signature, autograph=False)
            signatures[endpoint] = traced.get_concrete_function()
        tf.saved_model.save(module, str(folder), signatures)
        pairs = {f"patch_{patch}": one.patch_sizes[0] for patch, one in self.patches.items()}
        default = self.patches[first].patch_sizes[0]
        names = ("serving_default", "classify_wav", "embed")
        description = describe_artifact(
            self.run, self.fbank, patch_sizes={**pairs, **dict.fromkeys(names, default)}
        )
        for file, text in artifact_texts(self.run.classes, description).items():
            atomic_write(folder / "assets" / file, text)
        requests = {
            endpoint: [spec.name for spec in specs] for endpoint, (_, specs) in endpoints.items()
        }
        limit = min(self.limits.values()) / self.fbank.sample_rate
        write_warm_up(
            folder, name, requests=requests, sample_rate=self.fbank.sample_rate, seconds=limit
        )

    # === Signatures ===

    def classify(self, waveform, length, patch):
        import tensorflow as tf

        error, usable, length = self._checked(waveform, length, self.limits[patch])
        logits = self._logits(self._rows(waveform, length, patch))
        scores = tf.nn.sigmoid(logits) if self.run.multi_label else tf.nn.softmax(logits)
        scores = tf.where(usable[:, None], scores, 0.0)
        top_scores, places = tf.math.top_k(scores, min(TOP, len(self.run.classes)))
        labels = tf.gather(tf.constant(self.run.classes), places)
        return {
            "scores": scores,
            "top_labels": tf.where(usable[:, None], labels, ""),
            "top_scores": top_scores,
            "error": error,
        }

    def classify_wav(self, wav_bytes, patch):
        import tensorflow as tf

        from tf_data_pipelines.wav import decode_wav_bytes

        def decode(contents):
            return decode_wav_bytes(contents, self.fbank.sample_rate, self.max_seconds)

        ragged = tf.RaggedTensorSpec([None], tf.float32, 0)
        waveforms, error = tf.map_fn(
            decode, wav_bytes, fn_output_signature=(ragged, tf.TensorSpec([], tf.string))
        )
        length = tf.cast(waveforms.row_lengths(), tf.int32)
        answer = self.classify(waveforms.to_tensor(), length, patch)
        answer["error"] = tf.where(tf.equal(error, ""), answer["error"], error)
        return answer

    def features(self, waveform, length, patch):
        import tensorflow as tf

        error, usable, length = self._checked(waveform, length, self.limits[patch])
        ragged = tf.RaggedTensorSpec([None, self.fbank.mel_bins], tf.float32, 0)
        log_mel = tf.map_fn(self._log_mel, (waveform, length), fn_output_signature=ragged)
        frames = tf.where(usable, tf.cast(log_mel.row_lengths(), tf.int32), 0)
        filled = tf.where(usable[:, None, None], log_mel.to_tensor(), 0.0)
        return {"log_mel": filled, "frames": frames, "error": error}

    def embed(self, waveform, length, patch):
        import tensorflow as tf

        error, usable, length = self._checked(waveform, length, self.limits[patch])
        embedding = self._embedding(self._rows(waveform, length, patch))
        return {"embedding": tf.where(usable[:, None], embedding, 0.0), "error": error}

    # === Parts of the signatures ===

    def _checked(self, waveform, length, limit):
        """(error, usable, length); the length becomes 0 where a clip has an error."""
        import tensorflow as tf

        from tf_data_pipelines.wav import first_problem

        fbank = self.fbank
        samples = tf.shape(waveform)[1]
        counts = tf.sequence_mask(length, samples)
        finite = tf.reduce_all(tf.math.is_finite(waveform) | ~counts, 1)
        high = tf.reduce_max(tf.where(counts, waveform, -np.inf), 1)
        low = tf.reduce_min(tf.where(counts, waveform, np.inf), 1)
        at_rate = f" samples at {fbank.sample_rate} Hz"
        error = first_problem(
            (
                (length < 0) | (length > samples),
                ("length is ", length, "; expected 0 to ", samples, ", the waveform's samples."),
            ),
            (
                length < fbank.window,
                ("The clip has ", length, at_rate + f"; expected at least {fbank.window}."),
            ),
            (
                length > limit,
                (
                    "The clip has ", length, at_rate + f"; at most {limit} "
                    f"({limit / fbank.sample_rate:.2f} s) are accepted at this patch size.",
                ),
            ),
            (~finite, "The clip has NaN or infinite samples; expected numbers in [-1, 1]."),
            (
                tf.maximum(high, -low) > MAX_PEAK,
                f"The clip has samples beyond {MAX_PEAK:g}; expected numbers in [-1, 1]. Divide "
                "16-bit integers by 32768.",
            ),
            (high <= low, "The clip is silent: all its samples are equal; expected sound."),
        )  # fmt: skip
        usable = tf.equal(error, "")
        return error, usable, tf.where(usable, length, 0)

    def _log_mel(self, clip):
        """(waveform, length) of one clip -> normalized float32 (frames, mel_bins)."""
        import tensorflow as tf

        from tf_data_pipelines.fbank import features

        waveform, length = clip
        log_mel = features(waveform[:length], self.fbank)
        return tf.ensure_shape(log_mel, [None, self.fbank.mel_bins])

    def _rows(self, waveform, length, patch):
        """Packed rows with one clip in each, padded to the longest."""
        import tensorflow as tf

        from tf_data_pipelines.patches import patch_tokens

        settings = self.patches[patch]
        widths = math.prod(settings.base_patch), 4
        ragged = [tf.RaggedTensorSpec([None, width], tf.float32, 0) for width in widths]
        tokens, positions = tf.map_fn(
            lambda clip: patch_tokens(
                self._log_mel(clip), settings, frame_shift_scale=self.frame_shift_scale
            ),
            (waveform, length),
            fn_output_signature=tuple(ragged),
        )
        segment_ids = tf.cast(tf.sequence_mask(tokens.row_lengths()), tf.int32)
        return {
            "tokens": tokens.to_tensor(),
            "positions": positions.to_tensor(),
            "segment_ids": segment_ids,
        }


def _row_by_row(model, rows, width):
    """The first slot's output of every row, float32 (rows, width).

    Attention has memory for MAX_ROW_LENGTH squared pairs of tokens, and so many rows at a time
    go through the model.
    """
    import tensorflow as tf

    count, length = tf.unstack(tf.shape(rows["segment_ids"]))
    group = tf.maximum(1, MAX_ROW_LENGTH**2 // tf.maximum(1, length * length))

    def step(start, done):
        part = {name: values[start : start + group] for name, values in rows.items()}
        output = tf.cast(model(part, training=False)[:, 0], tf.float32)
        return start + group, tf.concat([done, output], 0)

    _, done = tf.while_loop(
        lambda start, _: start < count,
        step,
        (0, tf.zeros([0, width])),
        (tf.TensorShape([]), tf.TensorShape([None, width])),
        parallel_iterations=1,  # more would need the memory of as many groups
    )
    return done
