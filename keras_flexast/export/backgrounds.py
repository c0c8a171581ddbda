"""Test clips as a phone hears them: in a full buffer, with silence or noise around them."""

import warnings
from typing import NamedTuple

import numpy as np

from keras_flexast.evaluation import score_clips, spread
from tf_data_pipelines.settings import DataWarning

CLIPS = 200  # at most, that are heard in every background


class Background(NamedTuple):
    """What fills a buffer up; without levels, silence.

    Args:
        name: heading of its column.
        text: what it is, in one sentence.
        dbfs: level of white noise in the whole buffer, decibels of its power over full scale.
        snr_db: level of the clip over white noise in the whole buffer, in decibels.
    """

    name: str
    text: str
    dbfs: float | None = None
    snr_db: float | None = None


BACKGROUNDS = (
    Background("silence", "digital silence fills the buffer up, and the whole buffer is heard."),
    Background(
        "-60 dBFS", "white noise of -60 dBFS fills the whole buffer, under the clip too.", -60.0
    ),
    Background("-40 dBFS", "the same with white noise of -40 dBFS.", -40.0),
    Background("20 dB SNR", "the same with white noise 20 dB below the clip.", snr_db=20.0),
)


def in_buffer(waveform, background, samples, seed):
    """A clip at the start of a buffer, with a background from its first to its last sample.

    Args:
        waveform: float32 (clip's samples,).
        background: Background.
        samples: number of samples in the buffer; a longer clip has a buffer of its own length.
        seed: random seed of the noise.

    Returns:
        float32 (samples,), or as long as the clip.
    """
    buffer = np.zeros(max(samples, len(waveform)), "float32")
    buffer[: len(waveform)] = waveform
    power = 0.0
    if background.dbfs is not None:
        power = 10 ** (background.dbfs / 10)
    elif background.snr_db is not None:
        power = np.mean(np.square(waveform, dtype="float64")) / 10 ** (background.snr_db / 10)
    noise = np.random.default_rng(seed).normal(size=len(buffer))
    return buffer + (power**0.5 * noise).astype("float32")


class BufferedClips:
    """Test clips alone, and in a buffer with each of BACKGROUNDS.

    Args:
        data: ScannedSource of the clips; up to CLIPS of them are taken.
        seconds: length of the buffer.
    """

    def __init__(self, data, seconds):
        self.data, self.seconds = spread(data, CLIPS), seconds
        self.waveforms = {}  # by sample rate

    def measure(self, scores, rate):
        """Accuracy or mAP of a function from waveforms at a rate to scores.

        Returns:
            {"clips": their number, "alone": value, name of a background: value; None where the
            function refused, of which a warning says why}.
        """
        if rate not in self.waveforms:
            self.waveforms[rate] = [clip.read(rate) for clip in self.data.source.clips]
        alone, values = self.waveforms[rate], {"clips": len(self.data.source)}
        values["alone"] = score_clips(self.data.source, scores(alone))["value"]
        for background in BACKGROUNDS:
            buffers = [
                in_buffer(waveform, background, round(self.seconds * rate), seed)
                for seed, waveform in enumerate(alone)
            ]
            try:
                values[background.name] = score_clips(self.data.source, scores(buffers))["value"]
            except ValueError as error:  # a server takes shorter clips than phones hear, say
                values[background.name] = None
                warnings.warn(
                    f"not measured in a buffer of {self.seconds:g} s, {background.name}: {error}",
                    DataWarning,
                    stacklevel=2,
                )
        return values
