"""The clips of a data set as waveforms: from files, from shards, or from memory."""

import os

import numpy as np
import tensorflow as tf

from tf_data_pipelines.blocks import stored_clips
from tf_data_pipelines.decode import decode_audio
from tf_data_pipelines.shards import Records, decode_record, record_key
from tf_data_pipelines.sources import ScannedSource, WaveformSource
from tf_data_pipelines.wav import decode_wav


def load_waveforms(data: ScannedSource | WaveformSource, sample_rate: int) -> tf.data.Dataset:
    """Every clip of a source once.

    Args:
        data: ScannedSource of files, or WaveformSource of arrays.
        sample_rate: sample rate of the waveforms in Hz.

    Returns:
        Dataset of dictionaries: `waveform` float32 (samples,); `label` int32 () or, for
        multi-label data, float32 (classes,); `clip_id` int64 (), the place of the clip in
        the source; of arrays with weights also `weight` float32 ().

    Raises:
        ValueError: arrays have another sample rate.
    """
    records, load = records_of(data), clip_loader(data, sample_rate)
    if records is not None:
        clips = stored_clips(records)
    else:
        clips = tf.data.Dataset.range(len(data.durations)).map(lambda place: {"clip_id": place})
    return clips.map(load, tf.data.AUTOTUNE)


def clip_loader(data, sample_rate):
    """The function that reads a clip: from its `clip_id`, of shards with its `record` too.

    It gives the dictionary of `load_waveforms`, and holds no state: parallel calls may share it.
    """
    load = _from_records(data) if records_of(data) is not None else _from_columns(data, sample_rate)
    most = data.most_seconds if isinstance(data, ScannedSource) else None
    if most is None:
        return load
    samples = round(most * sample_rate)

    def shortened(clip):
        clip = load(clip)
        return {**clip, "waveform": clip["waveform"][:samples]}

    return shortened


def _from_columns(data, sample_rate):
    """The function that adds what is known of a clip of files or arrays, and reads it."""
    arrays = isinstance(data, WaveformSource)
    columns, load = (_from_arrays if arrays else _from_files)(data, sample_rate)
    columns = {name: tf.constant(column) for name, column in columns.items()}

    def read(clip):
        return load({**clip, **{name: column[clip["clip_id"]] for name, column in columns.items()}})

    return read


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


def _from_records(data):
    """The function that replaces `record` by `waveform` and `label`."""
    clips, classes = records_of(data), len(data.source.classes)
    labels, ends = tf.constant(clips.labels), tf.constant(clips.ends)
    starts = tf.constant(np.r_[0, clips.ends[:-1]])
    keys, samples = tf.constant(clips.keys()), tf.constant(clips.samples)

    def load(clip):
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

    columns = {"start": np.r_[0, ends[:-1]], "end": ends, "label": data.labels}
    if data.weights is not None:
        columns["weight"] = data.weights
    return columns, load


def records_of(data):
    """The Records of a prepared data set; None for any other data."""
    clips = data.source.clips if isinstance(data, ScannedSource) else None
    return clips if isinstance(clips, Records) else None
