"""Clips of any lengths through a function that takes batches, cut into windows where it has to."""

import numpy as np

BATCH_SAMPLES = 60 * 16000  # in one call, padding included; a longer clip has a call of its own


def mean_of_windows(function, waveforms, width, samples=None):
    """The outputs of a function for clips of any lengths.

    A function for clips of one length gets a shorter clip with zeros at its end. A longer clip
    is cut into windows that overlap by half, the last one ending with the clip; its output is
    the mean of theirs.

    Args:
        function: function from padded waveforms float32 (batch, samples) and lengths int32
            (batch,) to outputs float32 (batch, width) and a list of error texts, one per clip.
        waveforms: list of float32 (samples,).
        width: width of the outputs.
        samples: number of samples that every clip must have; None for any number.

    Returns:
        float32 (clips, width); and a tuple of the clips' error texts, "" where there is none.
    """
    from tf_data_pipelines.audio import pad_waveforms

    windows = [
        (clip, waveform[start : start + samples] if samples else waveform)
        for clip, waveform in enumerate(waveforms)
        for start in _starts(len(waveform), samples)
    ]
    windows.sort(key=lambda window: len(window[1]))  # similar lengths need little padding
    outputs = np.zeros((len(waveforms), width), "float32")
    counts, errors = np.zeros((len(waveforms), 1), "float32"), [""] * len(waveforms)
    for batch in _batches(windows, samples):
        clips, pieces = (list(one) for one in zip(*batch, strict=True))
        lengths = np.array([len(piece) for piece in pieces], "int32")
        given, texts = function(pad_waveforms(pieces, samples), lengths)
        np.add.at(outputs, clips, given)
        np.add.at(counts, clips, 1)
        for clip, text in zip(clips, texts, strict=True):
            errors[clip] = errors[clip] or text
    return outputs / counts, tuple(errors)


def _starts(length, window):
    """First samples of a clip's windows: half a window apart, the last one ends with the clip."""
    if window is None or length <= window:
        return [0]
    return [*range(0, length - window, window // 2), length - window]


def _batches(windows, samples):
    """Lists of (clip, waveform) from a list sorted by length, each with BATCH_SAMPLES at most."""
    while windows:
        count = 1
        while count < len(windows) and (
            (count + 1) * (samples or len(windows[count][1])) <= BATCH_SAMPLES
        ):
            count += 1
        batch, windows = windows[:count], windows[count:]
        yield batch
