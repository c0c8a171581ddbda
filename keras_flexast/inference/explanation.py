"""What a model attends to in a sound: maps over its mel spectrogram."""

import dataclasses
import os
import pathlib

import numpy as np
from keras import ops

from keras_flexast.inference.artifacts import is_artifact
from keras_flexast.layers.attention import slot_mask
from keras_flexast.runs import Run, configured_run, is_cut, warn_of_cuts
from tf_data_pipelines.hints import PatchSize, PathLike
from tf_data_pipelines.resize import axis_grid
from tf_data_pipelines.settings import MAX_ROW_LENGTH, FbankSettings, patch_name, patch_pair

QUERIES = 256  # whose attention is in memory at a time


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One sound as a run hears it, and where in it the run looks.

    Attributes:
        name: name of the file.
        classes: names of the classes.
        scores: float32 (classes,), in [0, 1].
        spectrogram: float32 (frames, mel_bins), the normalized log-mel features.
        attention: float32 (frames, mel_bins): how much pooling attends to each patch, or, where a
            model has [CLS] tokens or takes the mean, how much its last block does. It is spread
            over the patch, and its largest value is 1; where patches overlap, the larger one
            counts.
        rollout: the same through all blocks, see `attention_map`.
        patch_size: name of the patch size, "16" or "16x24".
        fbank: FbankSettings that made the spectrogram, with its frame shift.
    """

    name: str
    classes: tuple[str, ...]
    scores: np.ndarray
    spectrogram: np.ndarray
    attention: np.ndarray
    rollout: np.ndarray
    patch_size: str
    fbank: FbankSettings

    def top(self, count: int) -> list[tuple[str, float]]:
        """The best classes with their scores, the best one first."""
        best = np.argsort(-self.scores, kind="stable")[:count]
        return [(self.classes[place], float(self.scores[place])) for place in best]


def explain_file(
    run: Run | PathLike,
    path: PathLike,
    patch_size: PatchSize | None = None,
    *,
    frame_shift_ms: float | None = None,
    resize: str | None = None,
    full_length: bool = False,
) -> Explanation:
    """Where in one sound a run looks, at any patch size.

    Args:
        run: Run, or the folder of one.
        path: sound file of any format, rate and length that fits a row.
        patch_size: int or (frequency, time); smaller patches have a finer map. None for the
            model's own.
        frame_shift_ms, resize, full_length: as in `load_classifier`.

    Returns:
        Explanation.

    Raises:
        FileNotFoundError, ValueError: no run, no such patch size, or a file that cannot be used.

    Example:
        found = explain_file("run", "bark.wav", 8)
        print(found.top(3), found.attention.shape)
    """
    from tf_data_pipelines.audio import read_audio
    from tf_data_pipelines.lengths import overlong_reason
    from tf_data_pipelines.patches import check_patches

    if not isinstance(run, Run) and is_artifact(run):
        raise ValueError(
            f"{run} is an exported artifact, which gives scores and no attention. Give the run "
            f"that it was exported from."
        )
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; give one sound file.")
    run = configured_run(run, resize=resize, full_length=full_length)
    pair = run.model.backbone.base_patch if patch_size is None else patch_pair(patch_size)
    patches = run.patches_at([pair], frame_shift_ms)
    check_patches(patches, run.fbank.mel_bins)
    waveform = read_audio(path, run.fbank.sample_rate, min_samples=run.fbank.window)
    seconds = len(waveform) / run.fbank.sample_rate
    if overlong_reason(path, seconds, fbank=run.fbank, patches=patches):
        raise ValueError(
            f"{path} ({seconds:.1f} s) has more than {MAX_ROW_LENGTH:,} tokens at patch "
            f"{patch_name(pair)}. Use a larger patch size, or a part of the recording."
        )
    warn_of_cuts(run, int(is_cut(run.fbank, seconds)), 1)
    spectrogram, inputs = _one_clip(run, waveform, patches)
    maps = []
    for rollout in (False, True):
        weights = attention_map(run.model, inputs, rollout)[0, patches.prefix_tokens :]
        maps.append(over_spectrogram(weights, spectrogram.shape, patches).T)
    return Explanation(
        name=pathlib.Path(path).name,
        classes=tuple(run.classes),
        scores=run.scores(run.model(inputs, training=False)[0, 0]),
        spectrogram=spectrogram,
        attention=maps[0],
        rollout=maps[1],
        patch_size=patch_name(pair),
        fbank=run.front_end(frame_shift_ms)[0],
    )


def _one_clip(run, waveform, patches):
    """(spectrogram, packed batch of one row) of a clip."""
    import tensorflow as tf

    from tf_data_pipelines import extract_features, make_tokens

    clip = {"waveform": waveform, "label": 0, "clip_id": np.int64(0)}
    clips = tf.data.Dataset.from_tensors(clip)
    clips = extract_features(clips, run.fbank, frame_shifts_ms=patches.frame_shifts_ms)
    clips = clips.map(lambda clip: {**clip, "spectrogram": clip["features"]})
    (clip,) = make_tokens(clips, patches).as_numpy_iterator()
    inputs = {name: clip[name][None] for name in ("tokens", "positions")}
    inputs["segment_ids"] = np.ones((1, len(clip["tokens"])), "int32")
    return clip["spectrogram"], inputs


def patch_starts(shape, patches):
    """Where the patches begin on each axis, (bins, frames) of a (frames, mel_bins) spectrogram."""
    frames, mel_bins = shape
    policy = {"remainder": patches.remainder, "position": patches.position}
    (patch_f, patch_t), (axis_f, axis_t) = patches.patch_sizes[0], patches.axes
    return (
        axis_grid(mel_bins, patch_f, axis=axis_f, name="frequency", **policy)[0],
        axis_grid(max(frames, patch_t), patch_t, axis=axis_t, name="time", **policy)[0],
    )


def over_spectrogram(weights, shape, patches):
    """The weights of a clip's patches, spread over them: float32 (mel_bins, frames), at most 1.

    Args:
        weights: float (tokens,), in the order of the tokens, without prefix tokens.
        shape: (frames, mel_bins) of the spectrogram.
        patches: PatchSettings with one patch size.
    """
    starts_f, starts_t = patch_starts(shape, patches)
    patch_f, patch_t = patches.patch_sizes[0]
    spread = np.zeros(shape[::-1], "float32")
    for place, weight in enumerate(weights):  # tokens run through time inside each band
        band, column = divmod(place, len(starts_t))
        rows = slice(starts_f[band], starts_f[band] + patch_f)
        part = spread[rows, starts_t[column] : starts_t[column] + patch_t]
        np.maximum(part, weight, out=part)
    return spread / max(spread.max(), 1e-9)


def attention_map(model, inputs, rollout=False):
    """How much the answer of a clip attends to each of its tokens, a mean over the heads.

    With attention pooling it is the attention of the learned query, with [CLS]-like tokens theirs
    in the last block, and with mean pooling that of all tokens there.

    Args:
        model: PackedAST, or a model with its `backbone` and `pooling`.
        inputs: packed batch with one clip in each row.
        rollout: whether to follow attention back through all blocks, half of each block's
            output being its input (the residual), to the patches that the tokens were made of.

    Returns:
        float32 (rows, length), with the sum 1 in each row and 0 for padding.

    Reference: attention rollout, Abnar and Zuidema 2020 (arXiv:2005.00928).
    """
    backbone, pooling = model.backbone, model.pooling
    inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
    ids, positions = inputs["segment_ids"], inputs["positions"]
    tokens = backbone.patch_embed(inputs["tokens"]) + backbone.position_embed(positions)
    if backbone.prefix is not None:
        tokens = backbone.prefix(tokens, positions)
    mask, real = slot_mask(ids, 1), ops.cast(ops.greater(ids, 0), "float32")
    before = []  # the tokens that each block gets
    for block in backbone.blocks:
        before.append(tokens)
        tokens = block(tokens, ids, training=False)
    if hasattr(pooling, "query"):
        tokens = backbone.norm(tokens)
        query = ops.broadcast_to(ops.cast(pooling.query, tokens.dtype), tokens[:, :1].shape)
        weights = pooling.weights_of(query, tokens, mask)
    else:
        is_prefix = ops.equal(positions[..., 2], 0)
        of_prefix = model.pooling_name.startswith("cls")
        chosen = is_prefix if of_prefix else ops.logical_not(is_prefix)
        chosen = ops.cast(chosen, "float32") * real
        weights = (chosen / ops.sum(chosen, -1, keepdims=True))[:, None]
        if not rollout:
            weights = _attended(backbone.blocks[-1], before[-1], mask, weights)
    if rollout:
        for block, tokens in zip(reversed(backbone.blocks), reversed(before), strict=True):
            weights = (weights + _attended(block, tokens, mask, weights)) / 2
    return ops.convert_to_numpy(weights[:, 0] * real).astype("float32")


def _attended(block, tokens, mask, weights):
    """What queries with these weights attend to in a block, float32 (rows, 1, length).

    QUERIES at a time, and only those with a weight: a long clip has a square of attention.
    """
    normed, total = block.attention_norm(tokens), ops.zeros_like(weights)
    for start in range(0, tokens.shape[1], QUERIES):
        part = weights[:, :, start : start + QUERIES]
        if not ops.any(ops.not_equal(part, 0)):
            continue
        queries = normed[:, start : start + QUERIES]
        total += ops.matmul(part, block.self_attention.weights_of(queries, normed, mask))
    return total
