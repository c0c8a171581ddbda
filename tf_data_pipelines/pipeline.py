"""From clips to packed batches, as stages that can be put together in other ways.

A stage takes a tf.data.Dataset of dictionaries, one for each clip, and returns another. It
replaces the columns that it uses and passes every other column along:

    load_waveforms     waveform, label, clip_id; epoch, where there are several
    augment_waveforms  waveform
    extract_features   waveform -> features, frame_shift_scale
    augment_features   features
    make_tokens        features, frame_shift_scale, epoch -> tokens, positions
    pack               clips -> rows
    batch_rows         rows -> batches

`training_batches` and `evaluation_batches` put them together.
"""

import dataclasses
import os

import numpy as np
import tensorflow as tf

from tf_data_pipelines.augment import augment_features, augment_waveforms, drawn_length
from tf_data_pipelines.decode import decode_audio
from tf_data_pipelines.distillation import add_teacher_tokens
from tf_data_pipelines.draws import PATCH, SHIFT, choice, training_order
from tf_data_pipelines.fbank import features, log_mel_at, normalize
from tf_data_pipelines.packing import ARRIVALS, batch_rows, pack
from tf_data_pipelines.patches import check_patches, patch_tokens, token_counts
from tf_data_pipelines.resize import token_count
from tf_data_pipelines.settings import (
    MAX_ROW_LENGTH,
    AugmentSettings,
    PackSettings,
    check_between,
    patch_name,
    round_row_length,
    training_row_length,
)
from tf_data_pipelines.shards import (
    Records,
    decode_record,
    record_key,
    stored_clips,
    training_blocks,
)
from tf_data_pipelines.sources import ScannedSource, WaveformSource
from tf_data_pipelines.wav import decode_wav

MAX_START = 2**40  # batches
CACHE_SECONDS = 4 * 3600  # decoded clips up to 4 hours (0.9 GB of float32) stay in memory


def training_batches(
    data, fbank, *, patches, packing, seed=1337, augment=None, start=0, teacher=None
):
    """Endless packed batches in a new random order in each epoch, for `model.fit`.

    Each clip draws a patch size and a frame shift from the settings; a long clip only one of
    the patch sizes at which it fits a row. The order and the draws depend on the seed, the
    epoch and the clip alone, so a run repeats exactly, and may begin at any batch. What does not
    change from epoch to epoch is cached in memory up to CACHE_SECONDS of sound: the features, or
    the waveforms where those or the frame shift change.

    If `data.graph_only`, the whole pipeline is one graph without Python, and tf.data service
    workers can run it:

        batches = training_batches(data, fbank, patches=patches, packing=packing).apply(
            tf.data.experimental.service.distribute(ShardingPolicy.DYNAMIC, "grpc://host:5000"))

    DYNAMIC gives each clip of an epoch to one worker, which packs what it gets; OFF would give
    every worker the same clips in the same order. All workers must see the files.

    Args:
        data: ScannedSource or WaveformSource of the clips to train on.
        fbank: FbankSettings.
        patches: PatchSettings.
        packing: PackSettings.
        seed: random seed of the clip order and of all draws.
        augment: AugmentSettings; None for no augmentation.
        start: number of batches to leave out at the beginning, without reading their clips.
        teacher: TeacherTokens: what a teacher hears of the same clips; None for no teacher.

    Returns:
        tf.data.Dataset of (inputs, labels, weights): inputs a dictionary of `tokens`
        float32 (rows, row_length, 256), `positions` float32 (rows, row_length, 4) and
        `segment_ids` int32 (rows, row_length), with a teacher also of `teacher_tokens`,
        `teacher_positions` and `teacher_segment_ids`, in rows of the teacher's length; labels
        int32 (rows, segments) or, for multi-label data, float32 (rows, segments, classes);
        weights float32 (rows, segments).

    Raises:
        ValueError: a clip has more tokens than a row at every patch size, and packing.overlong
            is "error"; the message names it.
    """
    check_between("start", start, 0, MAX_START, kind=int)
    check_lengths(data, fbank, patches, packing)
    how = {"patches": patches, "packing": packing, "seed": seed, "augment": augment}
    how["teacher"] = teacher
    waiting = _waiting(data, fbank, start=start, **how) if start else (0,)
    clips = training_clips(data, fbank, start=waiting, **how)
    rows = pack(clips, packing, teacher and teacher.beside)
    batches = batch_rows(rows, packing, partial=False)
    return batches.map(_split_batch).prefetch(tf.data.AUTOTUNE)


def training_clips(
    data, fbank, *, patches, packing=None, seed=1337, augment=None, start=(0,), teacher=None
):
    """The clips of `training_batches` before they are packed, where columns can be added.

    Args:
        data, fbank, patches, seed, augment, teacher: as in `training_batches`.
        packing: PackSettings of the rows to come, see `make_tokens`; None for any length.
        start: places of the first clips in the order of all epochs, ascending; all clips after
            the last of them follow.

    Returns:
        Endless Dataset of dictionaries with `tokens`, `positions`, `label` and `clip_id`.
    """
    augment = augment or AugmentSettings()
    shifts = patches.frame_shifts_ms
    cached = np.sum(data.durations) <= CACHE_SECONDS
    same_waveforms = not shifts and not augment.changes_waveforms

    order = _from(_order(data, seed, start[0]), start)
    if _records(data) is not None:  # next to nothing is to be decoded
        ordered = order.map(_stored_waveform(data), tf.data.AUTOTUNE)
        if same_waveforms:
            ordered = extract_features(ordered, fbank)
    else:
        clips = load_waveforms(data, fbank.sample_rate)
        if same_waveforms:
            clips = extract_features(clips, fbank)
        if cached:
            clips = clips.cache()
        ordered = order.map(
            lambda at: {**tf.data.experimental.at(clips, at["clip_id"]), "epoch": at["epoch"]},
            tf.data.AUTOTUNE,
        )
    if not same_waveforms:
        longest = int(_samples(data, fbank).max())
        ordered = augment_waveforms(
            ordered, augment, seed, sample_rate=fbank.sample_rate, longest=longest
        )
        ordered = extract_features(ordered, fbank, frame_shifts_ms=shifts, seed=seed)
    ordered = augment_features(ordered, augment, fbank, seed)
    ordered = add_teacher_tokens(ordered, teacher, fbank)
    return make_tokens(ordered, patches, seed=seed, packing=packing)


def _samples(data, fbank):
    """Number of samples of every clip, int32 (clips,)."""
    return np.rint(np.asarray(data.durations) * fbank.sample_rate).astype("int32")


def _records(data):
    """The Records of a prepared data set; None for any other data."""
    clips = data.source.clips if isinstance(data, ScannedSource) else None
    return clips if isinstance(clips, Records) else None


def _order(data, seed, start=0, read=True):
    """`training_order` of the clips; of those in shards with their records."""
    if _records(data) is not None:
        return training_blocks(_records(data), seed, start, read)
    return training_order(len(data.durations), seed, start)


def _from(order, start):
    """The clips of `_order` at these places, and all after the last of them."""
    if len(start) == 1:
        return order
    start = tf.constant(start, tf.int64)
    return order.filter(lambda at: (at["place"] > start[-1]) | tf.reduce_any(at["place"] == start))


def _waiting(data, fbank, *, patches, packing, seed, augment, start, teacher):
    """Places of the clips not yet packed after `start` batches, then that of the next clip.

    The clips are packed by their lengths alone, without being read.
    """
    augment, samples = augment or AugmentSettings(), _samples(data, fbank)
    fbanks = [fbank.with_frame_shift(ms) for ms in patches.frame_shifts_ms] or [fbank]

    def light(clip):
        size = drawn_length(
            clip,
            tf.gather(samples, clip["clip_id"]),
            augment,
            seed=seed,
            sample_rate=fbank.sample_rate,
            longest=int(samples.max()),
        )
        frames = tf.stack(
            [one.clip_frames or 1 + (size - one.window) // one.shift for one in fbanks]
        )
        frames = frames[choice(len(fbanks), clip, seed, SHIFT)]
        drawn = _drawn_size(clip, frames, fbank.mel_bins, patches, packing=packing, seed=seed)
        tokens = token_counts(frames, fbank.mel_bins, patches, _max_tokens(packing))[drawn]
        empty = tf.zeros([tokens, 0])
        columns = {"tokens": empty, "positions": empty, "label": 0, "clip_id": clip["place"]}
        return {**columns, **(teacher.empty(frames) if teacher else {})}

    clips = _order(data, seed, read=False).map(light, tf.data.AUTOTUNE)
    rows = pack(clips, packing, teacher and teacher.beside)
    rows = rows.take(start * packing.rows).batch(ARRIVALS)
    waiting, following = [], 0  # places, ascending: what no row has had, and the next one
    for row in rows.as_numpy_iterator():
        packed, before = row["clip_ids"], following
        following = max(before, int(packed.max()) + 1)
        waiting = np.setdiff1d([*waiting, *range(before, following)], packed).tolist()
    return (*waiting, following)


def evaluation_batches(data, fbank, *, patches, packing, seed=0, cache=False):
    """Packed batches that hold every clip exactly once, also in the last partial batch.

    How many they are shows only when they are read; `counted` gives `model.fit` and
    `model.evaluate` the number, without which TensorFlow reports another loss. On the tf.data
    service too, with ShardingPolicy.DYNAMIC; each worker then has a last partial batch. Clips
    are never augmented.

    Args:
        data: ScannedSource of files, or WaveformSource of arrays.
        fbank: FbankSettings.
        patches: PatchSettings.
        packing: PackSettings.
        seed: random seed of the draws of patch size and frame shift; each clip has the same
            draw in every epoch.
        cache: whether to keep the features for the next epochs in memory, up to CACHE_SECONDS
            of sound.

    Returns:
        tf.data.Dataset of (inputs, labels, weights, clip_ids), see `training_batches`;
        clip_ids int64 (rows, segments) is the place of the clip in `data`, -1 for an empty
        slot.

    Raises:
        ValueError: a clip has more tokens than a row at every patch size, and packing.overlong
            is "error"; the message names it.
    """
    check_lengths(data, fbank, patches, packing)
    clips = load_waveforms(data, fbank.sample_rate)
    cache = cache and np.sum(data.durations) <= CACHE_SECONDS
    return _every_clip_once(clips, fbank, patches=patches, packing=packing, seed=seed, cache=cache)


def counted(batches):
    """The same batches with a known number of them; they are all read once to count them.

    TensorFlow's `model.evaluate` counts the fetch that finds no more batches as a batch of
    loss 0, so that the loss of N batches comes out as N / (N + 1) of itself.

    Args:
        batches: finite Dataset, such as `evaluation_batches(..., cache=True)`.
    """
    count = int(batches.reduce(np.int64(0), lambda count, _: count + 1))
    return batches.apply(tf.data.experimental.assert_cardinality(count))


def prediction_batches(waveforms, fbank, *, patches, packing):
    """`evaluation_batches` of clips in memory, which may be others in each iteration.

    So one dataset, traced once, serves many predictions.

    Args:
        waveforms: function without arguments to a list of float32 (samples,) at the
            filterbank's sample rate; it is called when an iteration begins.
        fbank, patches, packing: as in `evaluation_batches`.

    Returns:
        Dataset as `evaluation_batches`; clip_ids index the list.
    """

    def clips():
        for number, waveform in enumerate(waveforms()):
            yield {"waveform": waveform, "label": 0, "clip_id": number}

    scalar = tf.TensorSpec([], tf.int32), tf.TensorSpec([], tf.int64)
    spec = {"waveform": tf.TensorSpec([None]), "label": scalar[0], "clip_id": scalar[1]}
    dataset = tf.data.Dataset.from_generator(clips, output_signature=spec)
    return _every_clip_once(dataset, fbank, patches=patches, packing=packing, seed=0)


def _every_clip_once(clips, fbank, *, patches, packing, seed, cache=False):
    """Waveforms to the batches of `evaluation_batches`."""
    clips = extract_features(clips, fbank, frame_shifts_ms=patches.frame_shifts_ms, seed=seed)
    if cache:
        clips = clips.cache()
    clips = make_tokens(clips, patches, seed=seed, packing=packing)
    batches = batch_rows(pack(clips, packing), packing)
    return batches.map(lambda batch: (*_split_batch(batch), batch["clip_ids"])).prefetch(
        tf.data.AUTOTUNE
    )


def load_waveforms(data, sample_rate):
    """Every clip of a source once.

    Args:
        data: ScannedSource of files, or WaveformSource of arrays.
        sample_rate: sample rate of the waveforms in Hz.

    Returns:
        Dataset of dictionaries: `waveform` float32 (samples,); `label` int32 () or, for
        multi-label data, float32 (classes,); `clip_id` int64 (), the place of the clip in
        the source.

    Raises:
        ValueError: arrays have another sample rate.
    """
    count = len(data.durations)
    if _records(data) is not None:
        return stored_clips(_records(data)).map(_stored_waveform(data), tf.data.AUTOTUNE)
    if isinstance(data, WaveformSource):
        columns, load = _from_arrays(data, sample_rate)
    else:
        columns, load = _from_files(data, sample_rate)
    clips = tf.data.Dataset.from_tensor_slices({**columns, "clip_id": np.arange(count)})
    return clips.map(load, tf.data.AUTOTUNE)


def _from_files(data, sample_rate):
    """Columns of a ScannedSource with `path` (and the part), and the function that replaces it."""
    clips = data.source.clips
    columns = {"path": [os.fsencode(clip.path) for clip in clips], "label": data.source.targets()}
    if not all(clip.whole for clip in clips):
        columns["start"] = np.array([clip.start for clip in clips], "float64")
        stops = (np.inf if clip.stop is None else clip.stop for clip in clips)
        columns["stop"] = np.fromiter(stops, "float64")

    def load(clip):
        path = clip.pop("path")
        if not data.graph_only:
            part = {name: clip.pop(name) for name in ("start", "stop") if name in clip}
            return {**clip, "waveform": decode_audio(path, sample_rate, scanned=True, **part)}
        waveform = decode_wav(path, sample_rate)
        whole = tf.size(waveform) > 0
        with tf.control_dependencies([tf.debugging.Assert(whole, ["changed file:", path])]):
            return {**clip, "waveform": tf.identity(waveform)}

    return columns, load


def _stored_waveform(data):
    """The function that replaces `record` by `waveform` and `label`."""
    clips, classes = _records(data), len(data.source.classes)
    labels, ends = tf.constant(clips.labels), tf.constant(clips.ends)
    starts = tf.constant(np.r_[0, clips.ends[:-1]])
    keys, samples = tf.constant(clips.keys()), tf.constant(clips.samples)

    def load(clip):
        clip.pop("place", None)
        waveform, id = decode_record(clip.pop("record"))
        same = tf.equal(record_key(id), keys[clip["clip_id"]])
        same &= tf.equal(tf.size(waveform), samples[clip["clip_id"]])
        with tf.control_dependencies([tf.debugging.Assert(same, ["changed shard:", id])]):
            waveform = tf.identity(waveform)
        start, end = tf.gather(starts, clip["clip_id"]), tf.gather(ends, clip["clip_id"])
        label = labels[start:end]
        label = (
            tf.reduce_max(tf.one_hot(label, classes), 0) if data.source.multi_label else label[0]
        )
        return {**clip, "waveform": waveform, "label": label}

    return load


def _from_arrays(data, sample_rate):
    """Columns of a WaveformSource with `start` and `end`, and the function that replaces them."""
    if sample_rate != data.sample_rate:
        raise ValueError(
            f"sample_rate={data.sample_rate} of the waveforms differs from the filterbank's "
            f"{sample_rate}. Resample them first, for example with soxr."
        )
    samples = tf.constant(np.concatenate(data.waveforms))
    ends = np.cumsum([len(waveform) for waveform in data.waveforms])

    def load(clip):
        waveform = samples[clip.pop("start") : clip.pop("end")]
        return {**clip, "waveform": waveform}

    columns = {"start": np.r_[0, ends[:-1]], "end": ends, "label": np.zeros(len(ends), "int32")}
    return columns, load


def extract_features(clips, fbank, *, frame_shifts_ms=(), seed=0):
    """Replace `waveform` by `features`, the normalized log-mel filterbank.

    Args:
        clips: Dataset of dictionaries with `waveform` float32 (samples,).
        fbank: FbankSettings.
        frame_shifts_ms: frame shifts in milliseconds from which each clip draws one. An
            empty tuple uses the filterbank's own frame shift.
        seed: random seed of the draws.

    Returns:
        Dataset of dictionaries with `features` float32 (frames, mel_bins) and
        `frame_shift_scale` float32 (), the clip's frame shift over the filterbank's own.
    """

    def extract(clip):
        waveform = clip.pop("waveform")
        if frame_shifts_ms:
            drawn = choice(len(frame_shifts_ms), clip, seed, SHIFT)
            mel = normalize(log_mel_at(waveform, fbank, drawn, frame_shifts_ms), fbank)
            shift = tf.gather(tf.constant(frame_shifts_ms, tf.float32), drawn)
            scale = shift / fbank.frame_shift_ms
        else:
            mel, scale = features(waveform, fbank), tf.constant(1.0)
        mel = tf.ensure_shape(mel, [None, fbank.mel_bins])
        return {**clip, "features": mel, "frame_shift_scale": scale}

    return clips.map(extract, tf.data.AUTOTUNE)


def make_tokens(clips, patches, *, seed=0, packing=None):
    """Replace `features` and `frame_shift_scale` by `tokens` and `positions`.

    Args:
        clips: Dataset of dictionaries with `features` float32 (frames, mel_bins), mel_bins
            static, and `frame_shift_scale` float32 ().
        patches: PatchSettings; each clip draws one of its patch sizes.
        seed: random seed of the draws.
        packing: PackSettings of the rows to come. A clip draws only from the patch sizes at
            which it fits a row; where there are none it draws from all of them, and with
            overlong="crop" it loses its last patches. None lets clips have any length.

    Returns:
        Dataset of dictionaries with `tokens` float32 (tokens, 256) and `positions` float32
        (tokens, 4), see `patch_tokens`.
    """
    check_patches(
        patches, clips.element_spec["features"].shape[1]
    )  # inside it, TensorFlow wraps it

    def tokenize(clip):
        features = clip.pop("features")
        frames, mel_bins = tf.shape(features)[0], features.shape[1]
        tokens, positions = patch_tokens(
            features,
            patches,
            choice=_drawn_size(clip, frames, mel_bins, patches, packing=packing, seed=seed),
            frame_shift_scale=clip.pop("frame_shift_scale"),
            max_tokens=_max_tokens(packing),
        )
        clip.pop("epoch", None)
        return {**clip, "tokens": tokens, "positions": positions}

    return clips.map(tokenize, tf.data.AUTOTUNE)


def _drawn_size(clip, frames, mel_bins, patches, *, packing, seed):
    """Index of the patch size that a clip of so many frames draws, int32 ()."""
    sizes = np.arange(len(patches.patch_sizes))
    if packing is not None and len(sizes) > 1:
        fits = token_counts(frames, mel_bins, patches) <= packing.row_length
        sizes = tf.boolean_mask(sizes, fits | ~tf.reduce_any(fits))
    return tf.gather(sizes, choice(tf.size(sizes), clip, seed, PATCH))


def _max_tokens(packing):
    """Number of tokens to which clips are cut; None where none is cut."""
    return packing.row_length if packing and packing.overlong == "crop" else None


def _split_batch(batch):
    ends = ("tokens", "positions", "segment_ids")
    inputs = {name: value for name, value in batch.items() if name.endswith(ends)}
    return inputs, batch["labels"], batch["weights"]


def clip_tokens(data, fbank, patches):
    """Number of tokens of every clip at every patch size, at the finest of the frame shifts.

    Args:
        data: ScannedSource or WaveformSource.
        fbank: FbankSettings.
        patches: PatchSettings.

    Returns:
        int (patch sizes, clips).
    """
    return _tokens_of(data.durations, fbank, patches)


def _tokens_of(durations, fbank, patches):
    """`clip_tokens` of clips of these lengths in seconds."""
    finest = min(patches.frame_shifts_ms or (fbank.frame_shift_ms,))
    samples = np.rint(np.asarray(durations) * fbank.sample_rate).astype("int64")
    frames = fbank.with_frame_shift(finest).frames(samples)
    return np.stack(
        [token_count(frames, fbank.mel_bins, size, patches) for size in patches.patch_sizes]
    )


def drawn_sizes(tokens, packing):
    """Which patch sizes each clip draws from: those at which it fits a row, else all of them.

    Args:
        tokens: int (patch sizes, clips), see `clip_tokens`.
        packing: PackSettings.

    Returns:
        bool (patch sizes, clips).
    """
    fits = tokens <= packing.row_length
    return fits | ~fits.any(0)


def check_lengths(data, fbank, patches, packing):
    """Raise a ValueError that names the clip if it fits into a row at no patch size."""
    tokens = clip_tokens(data, fbank, patches)
    clip = np.argmax(tokens.min(0))
    size = np.argmin(tokens[:, clip])
    if tokens[size, clip] > packing.row_length and packing.overlong == "error":
        patch_f, patch_t = patches.patch_sizes[size]
        raise ValueError(
            f"clip {data.clip_name(clip)!r} ({data.durations[clip]:.1f} s) has "
            f"{tokens[size, clip]:,} tokens at patch {patch_f}x{patch_t}, more than the row "
            f"length {packing.row_length:,}. Raise row_length (--row-length), pass larger "
            f'patch_sizes (--patch-sizes), or pass overlong="crop" (--overlong crop).'
        )
    for patch_f, patch_t in patches.patch_sizes:
        column = token_count(patch_t, fbank.mel_bins, (patch_f, patch_t), patches)
        if column > packing.row_length:  # cropping shortens a clip to one column at best
            raise ValueError(
                f"the {fbank.mel_bins} mel bins give {column:,} tokens at patch "
                f"{patch_f}x{patch_t} in a single column, more than the row length "
                f"{packing.row_length:,}. Raise row_length (--row-length), or leave this patch "
                f"size out (--patch-sizes)."
            )


def lengths_warning(splits, fbank, *, patches, packing):
    """A message that counts the clips that cannot have every patch size, and those that are cut.

    Args:
        splits: list of ScannedSource or WaveformSource, such as the training and validation clips.
        fbank: FbankSettings.
        patches: PatchSettings.
        packing: PackSettings.

    Returns:
        str, or None where every clip fits a row at every patch size.
    """
    tokens = np.concatenate([clip_tokens(split, fbank, patches) for split in splits], 1)
    drawn, length = drawn_sizes(tokens, packing), f"a row of {packing.row_length:,} tokens"
    parts, limited = [], ~drawn.all(0)
    cut = (tokens.min(0) > packing.row_length) & (packing.overlong == "crop")
    if limited.any():
        sizes = zip(patches.patch_sizes, (~drawn).sum(1), strict=True)
        listed = ", ".join(f"{count} not from {patch_name(size)}" for size, count in sizes if count)
        parts.append(
            f"{limited.sum()} of {len(limited)} clips are too long for {length} at some patch "
            f"sizes, so they draw only from the others ({listed})."
        )
    if cut.any():
        parts.append(
            f"{cut.sum()} of {len(cut)} clips are too long for {length} at every patch size, so "
            f"they lose their end."
        )
    if parts:
        parts.append("A larger row_length (--row-length) holds more.")
    return " ".join(parts) or None


def training_packing(
    splits,
    fbank,
    *,
    patches,
    batch_tokens,
    row_length=None,
    segments=PackSettings.segments,
    overlong=PackSettings.overlong,
):
    """Pack settings for training on these clips, with rows that the other splits fit as well.

    Args:
        splits: list of ScannedSource, such as the training, validation and test clips.
        fbank: FbankSettings.
        patches: PatchSettings.
        batch_tokens: number of tokens in a batch; a batch has at least one row.
        row_length: number of tokens in a row. None makes rows long enough for the longest
            clip of any split, see `training_row_length`; a longer clip draws only from the
            patch sizes at which it fits.
        segments: number of clip slots in a row.
        overlong: rule for a clip with more tokens than a row at every patch size, see
            PackSettings.

    Returns:
        PackSettings.
    """
    if row_length is None:
        row_length = training_row_length(
            max(int(clip_tokens(split, fbank, patches).max()) for split in splits)
        )
    rows = max(1, batch_tokens // row_length)
    return PackSettings(rows, row_length, segments, overlong=overlong)


def packing_for(data, fbank, patches, packing, crop=False):
    """Pack settings for evaluation, with rows long enough for every clip at every patch size.

    The given rows are kept if every clip fits, so that the model compiles once. A few clips
    that together need less than one such row get one row. Other row lengths are multiples from
    `round_row_length`, so that a compiled model in a cache serves the next clips too.

    Args:
        data: ScannedSource or WaveformSource.
        fbank: FbankSettings.
        patches: PatchSettings.
        packing: PackSettings of the training.
        crop: whether clips that need more than MAX_ROW_LENGTH tokens lose their end.

    Returns:
        PackSettings.

    Raises:
        ValueError: a clip needs more than MAX_ROW_LENGTH tokens, without `crop`; the message
            names it.
    """
    tokens = clip_tokens(data, fbank, patches).max(0)
    most, total = int(tokens.max()), int(tokens.sum())
    if total <= packing.row_length and len(tokens) <= packing.segments:
        row_length = min(packing.row_length, round_row_length(total))
        return dataclasses.replace(packing, rows=1, row_length=row_length)
    if most <= packing.row_length:
        return packing
    if most > MAX_ROW_LENGTH and not crop:
        clip = int(tokens.argmax())
        name, seconds = data.clip_name(clip), data.durations[clip]
        raise ValueError(overlong_reason(name, seconds, fbank=fbank, patches=patches))
    row_length = min(MAX_ROW_LENGTH, round_row_length(most))
    rows = max(1, packing.rows * packing.row_length // row_length)
    overlong = "crop" if most > MAX_ROW_LENGTH else packing.overlong
    return dataclasses.replace(packing, row_length=row_length, rows=rows, overlong=overlong)


def overlong_reason(name, seconds, *, fbank, patches):
    """Why a clip is too long for any row; None if it is not.

    Args:
        name: name of the clip for the message.
        seconds: length of the clip.
        fbank: FbankSettings.
        patches: PatchSettings.
    """
    tokens = int(_tokens_of([seconds], fbank, patches).max())
    if tokens <= MAX_ROW_LENGTH:
        return None
    return (
        f"{name} ({seconds:.1f} s) has {tokens:,} tokens, more than {MAX_ROW_LENGTH:,}. Use a "
        f"larger patch size, a timeline (--timeline), or cut the recording into shorter files."
    )
