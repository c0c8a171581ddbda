"""From clips to packed batches, as stages that can be put together in other ways.

A stage takes a tf.data.Dataset of dictionaries, one for each clip, and returns another. It
replaces the columns that it uses and passes every other column along:

    load_waveforms     waveform, label, clip_id; in training also epoch
    augment_waveforms  waveform
    extract_features   waveform -> features, frame_shift_scale
    augment_features   features
    make_tokens        features, frame_shift_scale, epoch -> tokens, positions
    pack               clips -> rows
    batch_rows         rows -> batches

`training_batches` and `evaluation_batches` put them together.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from rich.progress import track

from tf_data_pipelines.augment import augment_features, augment_waveforms
from tf_data_pipelines.distillation import TeacherTokens, add_teacher_tokens
from tf_data_pipelines.lengths import check_lengths, longest_training, sample_counts
from tf_data_pipelines.loading import load_waveforms
from tf_data_pipelines.ordering import ordered_waveforms, training_places
from tf_data_pipelines.packing import ARRIVALS, batch_rows, pack
from tf_data_pipelines.settings import (
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
    check_between,
)
from tf_data_pipelines.sources import ScannedSource, WaveformSource
from tf_data_pipelines.stages import drawn_frames, drawn_tokens, extract_features, make_tokens

MAX_START = 2**40  # batches
CACHE_SECONDS = 4 * 3600  # decoded clips up to 4 hours (0.9 GB of float32) stay in memory
Function = TypeVar("Function", bound=Callable[..., Any])
# The stages are graph code already; AutoGraph would read and rewrite the source of all of them.
graph_code: Callable[[Function], Function] = tf.autograph.experimental.do_not_convert


@graph_code
def training_batches(
    data: ScannedSource | WaveformSource,
    fbank: FbankSettings,
    *,
    patches: PatchSettings,
    packing: PackSettings,
    seed: int = 1337,
    augment: AugmentSettings | None = None,
    start: int = 0,
    teacher: TeacherTokens | None = None,
    progress: bool = False,
) -> tf.data.Dataset:
    """Endless packed batches in a new random order in each epoch, for `model.fit`.

    Each clip draws a patch size and a frame shift from the settings; a long clip only one of
    the patch sizes at which it fits a row. With augment.balanced, clips of rare classes come more
    often in an epoch. The order and the draws depend on the seed, the
    epoch and the clip alone, so a run repeats exactly, and may begin at any batch. What does not
    change from epoch to epoch is cached in memory up to CACHE_SECONDS of sound: the features, or
    the waveforms where those or the frame shift change.

    If `data.graph_only`, the whole pipeline is one graph without Python, and tf.data service
    workers can run it:

        batches = training_batches(data, fbank, patches=patches, packing=packing).apply(
            tf.data.experimental.service.distribute(ShardingPolicy.DYNAMIC, "grpc://host:5000"))

    DYNAMIC gives each clip of an epoch to one worker, which packs what it gets; OFF would give
    every worker the same clips in the same order. All workers must see the files. Where iterators
    end often, turn the client's `options.autotune.enabled` off, as it is in these batches.

    Args:
        data: ScannedSource or WaveformSource of the clips to train on.
        fbank: FbankSettings.
        patches: PatchSettings.
        packing: PackSettings.
        seed: random seed of the clip order and of all draws.
        augment: AugmentSettings; None for no augmentation.
        start: number of batches to leave out at the beginning, without reading their clips.
        teacher: TeacherTokens: what a teacher hears of the same clips; None for no teacher.
        progress: whether to show a progress bar while the place of `start` is found.

    Returns:
        tf.data.Dataset of (inputs, labels, weights): inputs a dictionary of `tokens`
        float32 (rows, row_length, 256), `positions` float32 (rows, row_length, 4) and
        `segment_ids` int32 (rows, row_length), with a teacher also of `teacher_tokens`,
        `teacher_positions` and `teacher_segment_ids`, in rows of the teacher's length; labels
        int32 (rows, segments) or, for multi-label data and with mixup, float32 (rows, segments,
        classes); weights float32 (rows, segments).

    Raises:
        ValueError: a clip has more tokens than a row at every patch size, and packing.overlong
            is "error"; the message names it. Or augment contradicts fbank or patches.
    """
    check_between("start", start, 0, MAX_START, kind=int)
    if isinstance(data, ScannedSource) and data.most_seconds is not None:
        raise ValueError("shortened clips are for evaluation; AugmentSettings.crop_ms cuts others.")
    check_lengths(data, fbank, patches, packing, augment=augment)
    how: dict[str, Any] = {"patches": patches, "packing": packing, "seed": seed}
    how |= {"augment": augment, "teacher": teacher}
    waiting = _waiting(data, fbank, start=start, progress=progress, **how) if start else (0,)
    clips = training_clips(data, fbank, start=waiting, **how)
    rows = pack(clips, packing, None if teacher is None else teacher.beside)
    batches = batch_rows(rows, packing, partial=False)
    return batches.map(split_batch).prefetch(tf.data.AUTOTUNE)


@graph_code
def training_clips(
    data: ScannedSource | WaveformSource,
    fbank: FbankSettings,
    *,
    patches: PatchSettings,
    packing: PackSettings | None = None,
    seed: int = 1337,
    augment: AugmentSettings | None = None,
    start: Sequence[int] = (0,),
    teacher: TeacherTokens | None = None,
) -> tf.data.Dataset:
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
    same_waveforms = not (
        augment.changes_waveforms or patches.frame_shifts_ms or augment.frame_shift_range_ms
    )

    def prepare(clips):
        return extract_features(clips, fbank) if same_waveforms else clips

    cached = np.sum(data.durations) <= CACHE_SECONDS
    ordered = ordered_waveforms(
        data, fbank.sample_rate, augment=augment, seed=seed, start=start, prepare=prepare,
        cached=cached, with_place=patches.clips_per_draw > 1,
    )  # fmt: skip
    return training_tokens(
        ordered, fbank, patches=patches, packing=packing, augment=augment, seed=seed,
        longest=longest_training(data, fbank, augment), teacher=teacher,
    )  # fmt: skip


@graph_code
def training_tokens(
    clips: tf.data.Dataset,
    fbank: FbankSettings,
    *,
    patches: PatchSettings,
    augment: AugmentSettings,
    seed: int,
    packing: PackSettings | None = None,
    longest: int | None = None,
    teacher: TeacherTokens | None = None,
) -> tf.data.Dataset:
    """Waveforms of training clips, or their features, to tokens: every draw but the order.

    Args:
        clips: Dataset of dictionaries with `waveform`, or `features` and `frame_shift_scale`, see
            `extract_features`; with `epoch` and, where several clips in turn share a patch size,
            `place`, see `training_order`.
        fbank, patches, augment, seed, teacher: as in `training_batches`.
        packing: PackSettings of the rows to come, see `make_tokens`.
        longest: number of samples that silence fills a clip up to at most; None for any.

    Returns:
        Dataset of dictionaries with `tokens` and `positions`, see `make_tokens`.

    Raises:
        ValueError: augment contradicts fbank or patches.
    """
    _check_augment(augment, fbank, patches)
    if "waveform" in clips.element_spec:
        clips = augment_waveforms(
            clips, augment, seed, sample_rate=fbank.sample_rate, longest=longest
        )
        shifts = {"frame_shifts_ms": patches.frame_shifts_ms}
        shifts["frame_shift_range_ms"] = augment.frame_shift_range_ms
        clips = extract_features(clips, fbank, **shifts, seed=seed)
    clips = augment_features(clips, augment, fbank, seed)
    clips = add_teacher_tokens(clips, teacher, fbank)
    return make_tokens(clips, patches, seed=seed, packing=packing, augment=augment)


def _check_augment(augment, fbank, patches):
    """Raise a ValueError where augmentation contradicts the other settings."""
    if augment.frame_shift_range_ms and patches.frame_shifts_ms:
        raise ValueError(
            f"frame_shift_range_ms={augment.frame_shift_range_ms} must be () where "
            f"frame_shifts_ms={patches.frame_shifts_ms} lists the frame shifts. Give one of them."
        )
    if 0 < augment.crop_ms < fbank.window_ms:
        raise ValueError(
            f"crop_ms={augment.crop_ms} must be at least window_ms={fbank.window_ms}, the length "
            f"of a frame; or 0 to crop nothing."
        )


def _waiting(data, fbank, *, patches, packing, seed, augment, start, teacher, progress):
    """Places of the clips not yet packed after `start` batches, then that of the next clip.

    The clips are packed by their lengths alone, without being read.
    """
    augment = augment or AugmentSettings()
    samples = tf.constant(sample_counts(data, fbank), tf.int32)
    how = {"patches": patches, "augment": augment, "seed": seed}
    how["longest"] = longest_training(data, fbank, augment)

    def light(clip):
        size = tf.gather(samples, clip["clip_id"])
        empty = tf.zeros([drawn_tokens(clip, size, fbank, packing=packing, **how), 0])
        columns = {"tokens": empty, "positions": empty, "label": 0, "clip_id": clip["place"]}
        if teacher is not None:
            columns |= teacher.empty(drawn_frames(clip, size, fbank, **how))
        return columns

    clips = training_places(data, augment, seed).map(light, tf.data.AUTOTUNE)
    rows = pack(clips, packing, teacher and teacher.beside)
    rows = rows.take(start * packing.rows).batch(ARRIVALS).as_numpy_iterator()
    if progress:
        rows = track(rows, "Finding the place", -(-start * packing.rows // ARRIVALS))
    waiting, following = [], 0  # places, ascending: what no row has had, and the next one
    for row in rows:
        packed, before = row["clip_ids"], following
        following = max(before, int(packed.max()) + 1)
        waiting = np.setdiff1d([*waiting, *range(before, following)], packed).tolist()
    return (*waiting, following)


@graph_code
def evaluation_batches(
    data: ScannedSource | WaveformSource,
    fbank: FbankSettings,
    *,
    patches: PatchSettings,
    packing: PackSettings,
    seed: int = 0,
    cache: bool = False,
) -> tf.data.Dataset:
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
        cache: whether to keep the batches for the next epochs in memory, up to a quarter of
            CACHE_SECONDS of sound, or the features up to CACHE_SECONDS.

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
    seconds, kept = np.sum(data.durations), None
    if cache and seconds <= CACHE_SECONDS:
        # At patch 8, tokens are four times the features, as all have the area of 16 x 16.
        kept = "batches" if seconds <= CACHE_SECONDS / 4 else "features"
    return every_clip_once(clips, fbank, patches=patches, packing=packing, seed=seed, kept=kept)


@graph_code
def counted(batches: tf.data.Dataset) -> tf.data.Dataset:
    """The same batches with a known number of them; they are all read once to count them.

    TensorFlow's `model.evaluate` counts the fetch that finds no more batches as a batch of
    loss 0, so that the loss of N batches comes out as N / (N + 1) of itself.

    Args:
        batches: finite Dataset, such as `evaluation_batches(..., cache=True)`.
    """
    count = int(batches.reduce(np.int64(0), lambda count, _: count + 1))
    return batches.apply(tf.data.experimental.assert_cardinality(count))


@graph_code
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
    return every_clip_once(dataset, fbank, patches=patches, packing=packing, seed=0)


def every_clip_once(clips, fbank, *, patches, packing, seed, kept=None):
    """Waveforms to the batches of `evaluation_batches`; "features" or "batches" may be cached."""
    clips = extract_features(clips, fbank, frame_shifts_ms=patches.frame_shifts_ms, seed=seed)
    if kept == "features":
        clips = clips.cache()
    clips = make_tokens(clips, patches, seed=seed, packing=packing)
    batches = batch_rows(pack(clips, packing), packing)
    batches = batches.map(lambda batch: (*split_batch(batch), batch["clip_ids"]))
    if kept == "batches":
        batches = batches.cache()
    return batches.prefetch(tf.data.AUTOTUNE)


def split_batch(batch):
    """(inputs, labels, weights) of a batch of rows."""
    ends = ("tokens", "positions", "segment_ids")
    inputs = {name: value for name, value in batch.items() if name.endswith(ends)}
    return inputs, batch["labels"], batch["weights"]
