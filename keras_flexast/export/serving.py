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
        --model_config_file_poll_wait_seconds=10 \\
        --allow_version_labels_for_unavailable_models \\
        --enable_batching --batching_parameters_file=/models/NAME/batching.config
"""

import functools
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from keras_flexast.export.common import check_backend
from keras_flexast.export.serving_files import batching_config, updated_config, write_warm_up
from keras_flexast.files import SAVED_MODEL, atomic_folder
from keras_flexast.inference.artifacts import artifact_texts, describe_artifact
from keras_flexast.models import embedding_model
from keras_flexast.settings import MAX_SERVED_SECONDS
from tf_data_pipelines.atomic import atomic_write
from tf_data_pipelines.resize import token_count
from tf_data_pipelines.settings import (
    MAX_PEAK,
    MAX_ROW_LENGTH,
    check_positive,
    patch_name,
    patch_pair,
)

TOP = 5  # labels that an answer names
SPREAD = 4  # a group's longest clip has at most 1 + 1 / SPREAD times the tokens of its shortest
PARALLEL = 2  # clips whose features are computed at once
SIZED = {  # signature at the default patch size: the same at a size that it names
    "serving_default": "patch_{}",
    "classify_wav": "classify_wav_{}",
    "embed": "embed_{}",
    "embed_wav": "embed_wav_{}",
}


def write_serving(
    run,
    folder,
    *,
    patch_sizes=(16,),
    default=None,
    version=None,
    max_seconds=MAX_SERVED_SECONDS,
    frame_shift_ms=None,
    name=None,
):
    """Write a run as a new version of a TensorFlow Serving model.

    The signatures, with the batch always in the first axis:

        serving_default   waveform float32 (batch, samples) at the run's sample rate and length
                          int32 (batch,), the samples that count -> scores float32 (batch,
                          classes), top_labels string and top_scores float32 (batch, up to
                          5), error string (batch,)
        classify_wav      wav_bytes string (batch,), 16-bit PCM WAV of any usual rate -> the
                          answer of serving_default
        embed, embed_wav  the same inputs -> embedding float32 (batch, dim), error
        features,         the same inputs -> log_mel float32 (batch, frames, mel_bins),
        features_wav      normalized as the model needs it and padded with zeros; frames int32
                          (batch,); error
        patch_8, classify_wav_8, embed_8, embed_wav_8, ...
                          the first four at each patch size

    A clip that cannot be used (NaN, silent, integers, too short, too long, a length that does
    not fit, not such a WAV) gets zeros, empty labels and a sentence in `error`. The `error` of
    all other clips is "".

    Args:
        run: Run.
        folder: folder of the model. Existing versions stay; in models.config the label
            "stable" moves, and batching.config is written only where it is missing.
        patch_sizes: list of ints or (frequency, time) pairs.
        default: the one of them that signatures without a size in their name have; None for
            the model's base patch, or the nearest to it.
        version: positive int; None for one more than the highest version there.
        max_seconds: length of the longest clip that is accepted. It may be shorter at small
            patch sizes, because a clip has at most 8,192 tokens.
        frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.
        name: name of the model in requests; None for the name of the folder.

    Returns:
        pathlib.Path of the version's folder, which appears whole or not at all.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
        ValueError: a patch size, max_seconds, the version, the name or the models.config that
            is there cannot be used.
        FileExistsError: the version exists. No version is ever replaced, because a server may
            be reading it and would not load it again.
        OSError: the folder cannot be written; the disk is full, say.
    """
    check_backend()
    check_positive("max_seconds", max_seconds)
    folder = pathlib.Path(folder).absolute()
    name = folder.name if name is None else name
    check_name(name)
    version = next_version(folder) if version is None else version
    check_positive("version", version, int)
    target = folder / str(version)
    if target.exists():
        raise FileExistsError(f"{target} exists already. Leave version out for the next one.")
    config = updated_config(folder, name, max([version, *versions(folder)]))
    module = _Serving(run, patch_sizes, max_seconds, frame_shift_ms=frame_shift_ms, default=default)
    with atomic_folder(target, kind=SAVED_MODEL) as partial:
        module.write(partial, name, target)
    atomic_write(folder / "models.config", config)
    if not (folder / "batching.config").exists():
        atomic_write(folder / "batching.config", batching_config())
    return target


def versions(folder):
    """Numbers of the versions in a folder of TensorFlow Serving, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())


def next_version(folder):
    """Number of the version that comes after those in a folder, 1 in an empty one."""
    return 1 + max(versions(folder), default=0)


def check_name(name):
    """Raise ValueError for a model's name that cannot be part of a URL."""
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        raise ValueError(
            f"name={name!r} cannot be part of a URL. Use letters, digits, '_', '-' and '.', or "
            f"rename the folder."
        )


def nearest_size(pairs, wanted):
    """The (frequency, time) pair by whose factors the wanted one differs least.

    Of two that are as near, the larger one: it makes fewer tokens.
    """

    def distance(pair):
        factors = [abs(math.log(one / other)) for one, other in zip(pair, wanted, strict=True)]
        return round(sum(factors), 9), -math.prod(pair)

    return min(pairs, key=distance)


class _Clips(NamedTuple):
    """Clips of any lengths in one array, which may hold other samples between them.

    Args:
        samples: float32 (samples,).
        start: int64 (clips,), place of each clip's first sample.
        length: int32 (clips,), number of its samples.
    """

    samples: Any
    start: Any
    length: Any


class _Serving:
    """The signatures of a SavedModel as plain TensorFlow functions.

    A signature makes _Clips of its inputs, with an error text for each, and hands them to a
    function of _Clips. What several signatures do is a tf.function of its own, which the graph
    holds once.
    """

    def __init__(self, run, patch_sizes, max_seconds, *, frame_shift_ms=None, default=None):
        self.run = run
        self.fbank, self.frame_shift_scale = run.front_end(frame_shift_ms)
        self.max_seconds = max_seconds
        self.longest = round(max_seconds * self.fbank.sample_rate)  # samples of a clip
        if self.longest < self.fbank.window:
            raise ValueError(
                f"max_seconds={max_seconds} is under one window of {self.fbank.window_ms} ms. "
                f"Choose more."
            )
        self.pairs = {patch_name(pair): pair for pair in map(patch_pair, patch_sizes)}
        if not self.pairs:
            raise ValueError("patch_sizes is empty; give at least one size, such as (16,).")
        base = run.model.backbone.base_patch
        default = nearest_size(self.pairs.values(), base) if default is None else default
        self.default = patch_name(patch_pair(default))
        if self.default not in self.pairs:
            raise ValueError(
                f"default={self.default} is none of the patch sizes {', '.join(self.pairs)}."
            )
        self.patches = {name: run.patches_at([pair]) for name, pair in self.pairs.items()}
        self.limits, self.token_counts = {}, {}
        for name in self.pairs:
            self.limits[name], self.token_counts[name] = self._limit(name)
        self._trace()

    def _trace(self):
        """Make the tf.functions that signatures share."""
        import tensorflow as tf

        from tf_data_pipelines.wav import decode_wav_bytes

        run, spec = self.run, tf.TensorSpec
        embedder = embedding_model(run.model)
        rows = {
            "tokens": spec([None, None, math.prod(run.model.backbone.base_patch)]),
            "positions": spec([None, None, 4]),
            "segment_ids": spec([None, None], tf.int32),
        }
        error, group = spec([None], tf.string), spec([None], tf.int64)
        clips = _Clips(spec([None]), spec([None], tf.int64), spec([None], tf.int32))

        def traced(function, *signature):
            return tf.function(function, input_signature=signature, autograph=False)

        self._embedding = traced(
            lambda rows: tf.cast(embedder(rows, training=False)[:, 0], tf.float32), rows
        )
        head_norm, head = run.model.head_norm, run.model.head  # head computes in float32
        self._logits = traced(lambda rows: head(head_norm(self._embedding(rows))), rows)
        self._log_mel = traced(
            self._make_log_mel, spec([None]), spec([], tf.int64), spec([], tf.int32)
        )
        self._rows, self._checked, self._classify, self._embed = {}, {}, {}, {}
        for patch in [None, *self.patches]:  # None: features, which have no patches
            check = functools.partial(self._check, limit=self.limits.get(patch, self.longest))
            self._checked[patch] = traced(check, clips, error)
        for patch in self.patches:
            make_rows = functools.partial(self._make_rows, patch=patch)
            self._rows[patch] = traced(make_rows, clips, group)
            classify = functools.partial(self.classify, patch=patch)
            self._classify[patch] = traced(classify, clips, error)
            embed = functools.partial(self.embed, patch=patch)
            self._embed[patch] = traced(embed, clips, error)
        self._features = traced(self.features, clips, error)
        self._from_wav = traced(
            lambda wav_bytes: _clips_of_wavs(
                lambda one: decode_wav_bytes(one, self.fbank.sample_rate, self.max_seconds),
                wav_bytes,
            ),
            error,
        )

    def _limit(self, name):
        """At a patch size: samples of the longest clip, and tokens by number of frames, from 1."""
        fbank, patches, limit = self.fbank, self.patches[name], self.longest
        frames = np.arange(1, fbank.frames(limit) + 1)
        if fbank.clip_ms is not None:
            frames = np.array([fbank.clip_frames])  # every clip has as many: all fit, or none
        counts = token_count(frames, fbank.mel_bins, self.pairs[name], patches)
        fits = np.flatnonzero(counts <= MAX_ROW_LENGTH)
        if not len(fits):
            raise ValueError(
                f"patch_size={name} makes more than {MAX_ROW_LENGTH:,} tokens of every clip. "
                f"Choose a larger one."
            )
        if fits[-1] + 1 < len(frames):
            limit = fbank.window + int(frames[fits[-1]]) * fbank.shift - 1
        return limit, counts[: fits[-1] + 1].astype("int32")

    def write(self, folder, name, target):
        """Write the SavedModel, its texts and its warm-up requests into an empty folder.

        Args:
            folder: pathlib.Path of the folder.
            name: name of the model in requests.
            target: where the folder will be, for messages.
        """
        import tensorflow as tf

        # An ExportArchive would hold every weight twice.
        module, signatures, requests = tf.Module(), {}, {}
        module.weights = [weight.value for weight in self.run.model.weights]
        for signature, (function, inputs) in self._endpoints().items():
            traced = tf.function(function, input_signature=inputs, autograph=False)
            signatures[signature] = traced.get_concrete_function()
            requests[signature] = [spec.name for spec in inputs]
        pairs = {}
        for default, sized in SIZED.items():
            pairs[default] = self.pairs[self.default]
            pairs.update((sized.format(patch), pair) for patch, pair in self.pairs.items())
        description = describe_artifact(self.run, self.fbank, patch_sizes=pairs)
        limit = min(self.limits.values()) / self.fbank.sample_rate
        try:
            tf.saved_model.save(module, str(folder), signatures)
            for file, text in artifact_texts(self.run.classes, description).items():
                atomic_write(folder / "assets" / file, text)
            write_warm_up(
                folder, name, requests=requests, sample_rate=self.fbank.sample_rate, seconds=limit
            )
        except (tf.errors.OpError, OSError) as error:  # of a full disk, say
            reason = str(getattr(error, "message", error)).partition("\n")[0].rpartition("; ")[2]
            raise OSError(f"{target} cannot be written: {reason}. Nothing is left there.") from None

    def _endpoints(self):
        """{signature: (function, list of TensorSpecs of its inputs)}."""
        import tensorflow as tf

        sounds = [
            tf.TensorSpec([None, None], tf.float32, "waveform"),
            tf.TensorSpec([None], tf.int32, "length"),
        ]
        wavs = [tf.TensorSpec([None], tf.string, "wav_bytes")]

        def both(function):
            """The function behind each kind of input."""
            return [
                (lambda waveform, length: function(*_clips_of_rows(waveform, length)), sounds),
                (lambda wav_bytes: function(*self._from_wav(wav_bytes)), wavs),
            ]

        endpoints = {}
        for patch in self.patches:
            four = both(self._classify[patch]) + both(self._embed[patch])
            for (default, sized), endpoint in zip(SIZED.items(), four, strict=True):
                endpoints[sized.format(patch)] = endpoint
                if patch == self.default:
                    endpoints[default] = endpoint
        endpoints["features"], endpoints["features_wav"] = both(self._features)
        return endpoints

    # === What the signatures do with clips, each with an error text, "" for a good one ===

    def classify(self, clips, error, patch):
        import tensorflow as tf

        error, usable = self._checked[patch](clips, error)
        logits = self._outputs(
            clips, usable, patch, function=self._logits, width=len(self.run.classes)
        )
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

    def embed(self, clips, error, patch):
        error, usable = self._checked[patch](clips, error)
        width = self.run.model.backbone.dim
        return {
            "embedding": self._outputs(clips, usable, patch, function=self._embedding, width=width),
            "error": error,
        }

    def features(self, clips, error):
        import tensorflow as tf

        error, usable = self._checked[None](clips, error)
        length = tf.where(usable, clips.length, 0)
        log_mel = tf.map_fn(
            lambda one: self._log_mel(clips.samples, *one),
            (clips.start, length),
            fn_output_signature=tf.RaggedTensorSpec([None, self.fbank.mel_bins], tf.float32, 0),
            parallel_iterations=PARALLEL,
        )
        frames = tf.where(usable, tf.cast(log_mel.row_lengths(), tf.int32), 0)
        filled = tf.where(usable[:, None, None], log_mel.to_tensor(), 0.0)
        return {"log_mel": filled, "frames": frames, "error": error}

    # === Parts of the signatures ===

    def _check(self, clips, error, limit):
        """(error, usable): the first problem of each clip, with `error` before all others."""
        import tensorflow as tf

        from tf_data_pipelines.wav import first_problem

        fbank, at_rate = self.fbank, f" samples at {self.fbank.sample_rate} Hz"
        length = tf.where(tf.equal(error, ""), clips.length, 0)

        def extremes(one):
            clip = _cut(clips.samples, *one)
            finite = tf.reduce_all(tf.math.is_finite(clip))
            return finite, tf.reduce_max(clip), tf.reduce_min(clip)

        finite, high, low = tf.map_fn(
            extremes,
            (clips.start, length),
            fn_output_signature=(tf.bool, tf.float32, tf.float32),
            parallel_iterations=PARALLEL,
        )
        here = " at this patch size" if limit < self.longest else ""
        problem = first_problem(
            (
                length < fbank.window,
                ("The clip has ", length, at_rate + f"; expected at least {fbank.window}."),
            ),
            (
                length > limit,
                (
                    "The clip has ", length, at_rate + f"; at most {limit} "
                    f"({limit / fbank.sample_rate:.2f} s) are accepted{here}.",
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
        error = tf.where(tf.equal(error, ""), problem, error)
        return error, tf.equal(error, "")

    def _outputs(self, clips, usable, patch, *, function, width):
        """What a function makes of the usable clips' rows, float32 (clips, width), else zeros.

        The clips go through it in groups of similar length, shortest first, each group padded
        to its own longest. So no clip pays for a longer one, and no more than MAX_ROW_LENGTH
        tokens are in memory at once, however many clips there are.

        Args:
            clips: _Clips.
            usable: bool (clips,).
            patch: name of the patch size.
            function: function of packed rows, one clip in each, to float32 (rows, width).
            width: width of the outputs.
        """
        import tensorflow as tf

        tokens = self._tokens(clips.length, patch)
        order = tf.where(usable)[:, 0]
        order = tf.gather(order, tf.argsort(tf.gather(tokens, order), stable=True))
        tokens = tf.gather(tokens, order)

        def step(first, done):
            group = order[first : first + group_size(tokens[first:])]
            output = function(self._rows[patch](clips, group))
            return first + tf.size(group), tf.concat([done, output], 0)

        _, done = tf.while_loop(
            lambda first, _: first < tf.size(order),
            step,
            (0, tf.zeros([0, width])),
            (tf.TensorShape([]), tf.TensorShape([None, width])),
            parallel_iterations=1,  # more would need the memory of as many groups
        )
        shape = tf.stack([tf.size(usable, tf.int64), width])
        return tf.ensure_shape(tf.scatter_nd(order[:, None], done, shape), [None, width])

    def _tokens(self, length, patch):
        """Number of tokens of clips, int32 (clips,), from their numbers of samples."""
        import tensorflow as tf

        counts = self.token_counts[patch]
        frame = (length - self.fbank.window) // self.fbank.shift
        return tf.gather(counts, tf.clip_by_value(frame, 0, len(counts) - 1))

    def _make_log_mel(self, samples, start, length):
        """Normalized float32 (frames, mel_bins) of one clip."""
        import tensorflow as tf

        from tf_data_pipelines.fbank import features

        log_mel = features(_cut(samples, start, length), self.fbank)
        return tf.ensure_shape(log_mel, [None, self.fbank.mel_bins])

    def _make_rows(self, clips, group, patch):
        """Packed rows of the clips with these numbers, one in each, padded to the longest."""
        import tensorflow as tf

        from tf_data_pipelines.patches import patch_tokens

        settings = self.patches[patch]
        widths = math.prod(settings.base_patch), 4
        ragged = [tf.RaggedTensorSpec([None, width], tf.float32, 0) for width in widths]
        tokens, positions = tf.map_fn(
            lambda one: patch_tokens(
                self._log_mel(clips.samples, *one),
                settings,
                frame_shift_scale=self.frame_shift_scale,
            ),
            (tf.gather(clips.start, group), tf.gather(clips.length, group)),
            fn_output_signature=tuple(ragged),
            parallel_iterations=PARALLEL,
        )
        segment_ids = tf.cast(tf.sequence_mask(tokens.row_lengths()), tf.int32)
        return {
            "tokens": tokens.to_tensor(),
            "positions": positions.to_tensor(),
            "segment_ids": segment_ids,
        }


def group_size(tokens):
    """How many clips go through the model together, the first of these and those after it.

    Args:
        tokens: int32 (clips,), one or more, numbers of tokens in ascending order, each at
            most MAX_ROW_LENGTH.

    Returns:
        int32 scalar, at least 1: together they have at most MAX_ROW_LENGTH tokens, padding
        included, and the longest at most 1 + 1 / SPREAD times those of the shortest.
    """
    import tensorflow as tf

    alike = SPREAD * (tokens - tokens[0]) <= tokens[0]
    fits = tokens * tf.range(1, tf.size(tokens) + 1) <= MAX_ROW_LENGTH
    return tf.reduce_sum(tf.cast(alike & fits, tf.int32))


def _clips_of_rows(waveform, length):
    """(_Clips, error) of waveform float32 (clips, samples) and length int32 (clips,)."""
    import tensorflow as tf

    from tf_data_pipelines.wav import first_problem

    count, samples = tf.unstack(tf.shape(waveform))
    same = tf.debugging.assert_equal(
        tf.size(length), count, "waveform and length differ in their number of clips; give each one"
    )
    with tf.control_dependencies([same]):
        problem = first_problem(
            (
                (length < 0) | (length > samples),
                ("length is ", length, "; expected 0 to ", samples, ", the waveform's samples."),
            ),
        )
    start = tf.range(tf.cast(count, tf.int64)) * tf.cast(samples, tf.int64)
    return _Clips(tf.reshape(waveform, [-1]), start, length), problem


def _clips_of_wavs(decode, wav_bytes):
    """(_Clips, error) of the bytes of files, string (clips,)."""
    import tensorflow as tf

    ragged = tf.RaggedTensorSpec([None], tf.float32, 0, tf.int64)
    waveforms, error = tf.map_fn(
        decode,
        wav_bytes,
        fn_output_signature=(ragged, tf.TensorSpec([], tf.string)),
        parallel_iterations=PARALLEL,
    )
    length = tf.cast(waveforms.row_lengths(), tf.int32)
    return _Clips(waveforms.values, waveforms.row_starts(), length), error


def _cut(samples, start, length):
    """The samples of one clip, float32 (length,)."""
    import tensorflow as tf

    return samples[start : start + tf.cast(length, tf.int64)]
