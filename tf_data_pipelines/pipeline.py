"""From a scanned source of clips to packed batches: decode, fbank, patches, pack, batch."""

import dataclasses

import numpy as np
import tensorflow as tf

from tf_data_pipelines.decode import decode_audio, decode_wav
from tf_data_pipelines.fbank import log_mel, log_mel_at, normalize
from tf_data_pipelines.packing import batch_rows, pack
from tf_data_pipelines.patches import patch_tokens
from tf_data_pipelines.resize import token_count

CACHE_SECONDS = 4 * 3600  # decoded clips up to 4 hours (0.9 GB of float32) stay in memory


def training_batches(data, fbank, patches, packing, seed=1337):
    """Endless packed batches in a new random order each pass, for `model.fit`.

    Each clip draws a patch size and a frame shift from the settings; the draw depends on
    the seed and on how many clips came before, so a run repeats exactly.

    Where `data.graph_only`, the whole pipeline is one graph without Python, and
    tf.data service workers can do its work:

        batches = training_batches(data, fbank, patches, packing).apply(
            tf.data.experimental.service.distribute(ShardingPolicy.DYNAMIC, "grpc://host:5000"))

    DYNAMIC hands each clip of a pass to one worker, which packs what it gets; OFF would give
    every worker the same clips in the same order. All of them must see the files.

    Args:
        data: ScannedSource of the clips to train on.
        fbank: FbankSettings.
        patches: PatchSettings.
        packing: PackSettings.
        seed: int, of the order and of the draws.

    Returns:
        tf.data.Dataset of (inputs, labels, weights): inputs a dictionary of `tokens`
        float32 (rows, row_length, 256), `positions` float32 (rows, row_length, 4) and
        `segment_ids` int32 (rows, row_length); labels int32 (rows, segments) or, for
        multi-label data, float32 (rows, segments, classes); weights float32
        (rows, segments).

    Raises:
        ValueError: a clip has more tokens than a row; it is named.
    """
    check_lengths(data, fbank, patches, packing)
    sounds = _sounds(data, fbank, patches, seed)
    clips = _tokenize(sounds.repeat(), fbank, patches, packing, seed)
    rows = _pack(data, clips, packing)
    return batch_rows(rows, packing, partial=False).map(_split_batch).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(data, fbank, patches, packing, seed=0):
    """Packed batches that hold every clip exactly once, the last partial one included.

    On the tf.data service too, with ShardingPolicy.DYNAMIC; each worker then has a last
    partial batch.

    Args: as `training_batches`. With several patch sizes each clip keeps the same draw in
        every pass.

    Returns:
        tf.data.Dataset of (inputs, labels, weights, clip_ids): clip_ids int64
        (rows, segments) index data.source.clips, -1 for an empty slot.
    """
    check_lengths(data, fbank, patches, packing)
    clips = _tokenize(_sounds(data, fbank, patches), fbank, patches, packing, seed)
    batches = batch_rows(_pack(data, clips, packing), packing)
    return batches.map(lambda batch: (*_split_batch(batch), batch["clip_ids"])).prefetch(
        tf.data.AUTOTUNE
    )


def clip_tokens(data, fbank, patches):
    """Tokens of every clip at every patch size.

    Returns:
        int (patch sizes, clips), at the finest of the frame shifts.
    """
    finest = min(patches.frame_shifts_ms or (fbank.frame_shift_ms,))
    samples = np.rint(np.asarray(data.durations) * fbank.sample_rate).astype("int64")
    frames = dataclasses.replace(fbank, frame_shift_ms=finest).frames(samples)
    return np.stack(
        [token_count(frames, fbank.mel_bins, size, patches) for size in patches.patch_sizes]
    )


def check_lengths(data, fbank, patches, packing):
    """Raise, naming clip and patch size, when a clip cannot fit into a row."""
    tokens = clip_tokens(data, fbank, patches)
    size, clip = np.unravel_index(np.argmax(tokens), tokens.shape)
    if tokens[size, clip] > packing.row_length and packing.overlong == "error":
        patch_f, patch_t = patches.patch_sizes[size]
        raise ValueError(
            f"clip {data.source.clips[clip].path!r} ({data.durations[clip]:.1f} s) has "
            f"{tokens[size, clip]:,} tokens at patch {patch_f}x{patch_t}, more than the row "
            f'length {packing.row_length:,}. Raise row_length, or pass overlong="crop".'
        )
    for patch_f, patch_t in patches.patch_sizes:
        column = token_count(patch_t, fbank.mel_bins, (patch_f, patch_t), patches)
        if column > packing.row_length:  # cropping shortens a clip to one column at best
            raise ValueError(
                f"the {fbank.mel_bins} mel bins give {column:,} tokens at patch "
                f"{patch_f}x{patch_t} in a single column, more than the row length "
                f"{packing.row_length:,}. Raise row_length, or choose larger patches."
            )


def _sounds(data, fbank, patches, seed=None):
    """(sound, label, clip_id) of every clip once; shuffled when a seed is given.

    A sound is the waveform where frame shifts are drawn, else the normalized log-mel.
    """
    source = data.source
    if source.multi_label:
        labels = np.zeros((len(source), len(source.classes)), "float32")
        for row, clip in zip(labels, source.clips, strict=True):
            row[list(clip.labels)] = 1
    else:
        labels = np.array([clip.labels[0] for clip in source.clips], "int32")
    paths = [clip.path for clip in source.clips]
    dataset = tf.data.Dataset.from_tensor_slices(
        (paths, labels, np.arange(len(source), dtype="int64"))
    )

    def decode(path, label, clip_id):
        if data.graph_only:
            sound = decode_wav(path, fbank.sample_rate)
            whole = tf.size(sound) > 0
            with tf.control_dependencies([tf.debugging.Assert(whole, ["changed file:", path])]):
                sound = tf.identity(sound)
        else:
            sound = decode_audio(path, fbank.sample_rate, scanned=True)
        if not patches.frame_shifts_ms:
            sound = normalize(log_mel(sound, fbank), fbank)
        return sound, label, clip_id

    small = np.sum(data.durations) <= CACHE_SECONDS
    if seed is not None and not small:
        dataset = dataset.shuffle(len(source), seed)
    dataset = dataset.map(decode, tf.data.AUTOTUNE)
    if seed is not None and small:
        dataset = dataset.cache().shuffle(len(source), seed)
    return dataset


def _tokenize(sounds, fbank, patches, packing, seed):
    max_tokens = packing.row_length if packing.overlong == "crop" else None
    shifts = patches.frame_shifts_ms

    def tokenize(count, clip):
        sound, label, clip_id = clip
        choice = _draw(len(patches.patch_sizes), seed, 2 * count)
        if shifts:
            shift = _draw(len(shifts), seed, 2 * count + 1)
            sound = normalize(log_mel_at(sound, fbank, shift, shifts), fbank)
            scale = tf.gather(tf.constant(shifts, tf.float32), shift) / fbank.frame_shift_ms
        else:
            scale = 1.0
        sound = tf.ensure_shape(sound, [None, fbank.mel_bins])
        tokens, positions = patch_tokens(sound, patches, choice, scale, max_tokens)
        return {"tokens": tokens, "positions": positions, "label": label, "clip_id": clip_id}

    return sounds.enumerate().map(tokenize, tf.data.AUTOTUNE)


def _draw(choices, seed, count):
    return tf.random.stateless_uniform([], [seed, count], 0, choices, tf.int32)


def _pack(data, clips, packing):
    if data.source.multi_label:
        return pack(clips, packing, (len(data.source.classes),), tf.float32)
    return pack(clips, packing)


def _split_batch(batch):
    inputs = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
    return inputs, batch["labels"], batch["weights"]
