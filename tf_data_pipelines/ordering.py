"""The training clips in the order of their epochs, read, each with its partner for mixup."""

import tensorflow as tf

from tf_data_pipelines.augment import drawn_share
from tf_data_pipelines.blocks import training_blocks
from tf_data_pipelines.clips import ScannedSource, sampling_weights
from tf_data_pipelines.draws import PARTNER, choice, training_order
from tf_data_pipelines.loading import clip_loader, load_waveforms, records_of


def balanced_weights(data, augment):
    """`sampling_weights` of the clips where they are balanced, float64 (clips,); else None."""
    if not augment.balanced:
        return None
    if isinstance(data, ScannedSource):
        return sampling_weights(data.source.clips)
    return sampling_weights(data.label_columns)


def training_places(data, augment, seed, start=0, *, read=False):
    """`training_order` of the clips of a source; of those in shards with their records.

    Args:
        data: ScannedSource or WaveformSource.
        augment: AugmentSettings; this uses balanced and mixup.
        seed: random seed of the orders.
        start: number of clips to leave out at the beginning.
        read: whether to read the shards, and to draw partners for mixup.

    Returns:
        Dataset of dictionaries, see `training_order` and `training_blocks`.
    """
    weights, records = balanced_weights(data, augment), records_of(data)
    partners = read and augment.mixup > 0
    if records is not None:
        how = {"weights": weights, "partners": partners}
        return training_blocks(records, seed, start, read, **how)
    count = len(data.durations)
    order = training_order(count, seed, start, weights)
    if not partners:
        return order

    def with_partner(at):
        return {**at, "partner": tf.cast(choice(count, at, seed, PARTNER), tf.int64)}

    return order.map(with_partner)


def ordered_waveforms(data, sample_rate, *, augment, seed, start, prepare, cached, with_place):
    """The training clips of all epochs, without end.

    Args:
        data: ScannedSource or WaveformSource.
        sample_rate: sample rate of the waveforms in Hz.
        augment: AugmentSettings; this uses balanced and mixup.
        seed: random seed of the orders and partners.
        start: places of the first clips, ascending; all clips after the last of them follow.
        prepare: stage from Dataset to Dataset that changes no clip from epoch to epoch.
        cached: whether to keep what it gives in memory; clips in shards are read again.
        with_place: whether the clips have a column `place`, see `training_order`.

    Returns:
        Dataset of dictionaries: what `prepare` makes of `load_waveforms`, `epoch`, perhaps
        `place`, and for mixup `partner_waveform` and `partner_label`, with float32 (classes,)
        in `label` too; a clip that is not mixed has an empty partner.
    """
    order = _from(training_places(data, augment, seed, start[0], read=True), start)
    cached = cached and records_of(data) is None  # of a record next to nothing is to be decoded
    if cached:
        clips = prepare(load_waveforms(data, sample_rate)).cache()

        def load(at):  # only of a cache: TensorFlow does not guard a map that parallel calls share
            return tf.data.experimental.at(clips, at["clip_id"])

    else:
        load = clip_loader(data, sample_rate)

    kept = ("epoch", "place") if with_place else ("epoch",)

    def read(at):
        record = {"record": at["record"]} if "record" in at else {}
        clip = load({"clip_id": at["clip_id"], **record})
        clip = {**clip, **{name: at[name] for name in kept}}
        if "partner" not in at:
            return clip
        return _with_partner(clip, at, load, augment=augment, data=data, seed=seed)

    ordered = order.map(read, tf.data.AUTOTUNE)
    return ordered if cached else prepare(ordered)


def _with_partner(clip, at, load, *, augment, data, seed):
    """The clip with its partner, which is read only where the clip draws a mixture."""
    in_files = isinstance(data, ScannedSource)
    classes = len(data.source.classes) if in_files else data.label_width

    def soft(label):
        return label if label.dtype.is_floating else tf.one_hot(label, classes)

    def partner():
        record = {"record": at["partner_record"]} if "partner_record" in at else {}
        other = load({"clip_id": at["partner"], **record})
        return other["waveform"], soft(other["label"])

    def nobody():
        return tf.zeros([0]), tf.zeros([classes])

    waveform, label = tf.cond(drawn_share(clip, augment, seed) < 1, partner, nobody)
    label = tf.ensure_shape(label, [classes])
    columns = {"partner_waveform": waveform, "partner_label": label}
    return {**clip, "label": soft(clip["label"]), **columns}


def _from(order, start):
    """The clips of an order at these places, and all after the last of them."""
    if len(start) == 1:
        return order
    start = tf.constant(start, tf.int64)
    return order.filter(lambda at: (at["place"] > start[-1]) | tf.reduce_any(at["place"] == start))
