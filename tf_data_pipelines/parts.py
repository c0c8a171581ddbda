"""Parts of sound files: their names in messages, and which frames they are.

A part begins at a second of its file and ends at another. A whole file is from 0.0 to None.
"""

import math

END_SLACK = 0.5  # seconds; notes of long recordings often end a little behind the sound
HDF5 = ".hdf5/"  # between the name of an HDF5 file and the name of a recording in it


class AudioError(ValueError):
    """A sound file cannot be used; the message names it, what came and the way out."""


def is_whole(path, start=0.0, stop=None):
    """Whether these are all samples of a file of its own."""
    return start == 0 and stop is None and HDF5 not in path


def part_name(path, start=0.0, stop=None):
    """Name of a part in messages: "P01_01.wav, 3.20 to 4.75 s"; of a whole file its path."""
    if stop is None:
        return f"{path}, from {start:.2f} s" if start else str(path)
    return f"{path}, {start:.2f} to {stop:.2f} s"


def part_frames(path, start, stop, *, frames, rate):
    """(first, last) frame of a part, the last one excluded.

    Args:
        path: file name, for messages.
        start, stop: seconds, see `read_audio`.
        frames: number of frames of the file.
        rate: frames of the file in a second.

    Raises:
        AudioError: the part is empty, or lies beyond the end of the file.
    """
    name, end = part_name(path, start, stop), math.inf if stop is None else stop
    if not 0 <= start < end:
        raise AudioError(
            f"{name}, is no part: expected 0 <= start < stop. Correct its times in the list of "
            f"clips, or remove it."
        )
    seconds = frames / rate
    first, last = round(start * rate), frames if stop is None else round(stop * rate)
    if first >= frames or last > frames + END_SLACK * rate:
        raise AudioError(
            f"{name}, lies beyond the end of the file, which lasts {seconds:.2f} s. Copy the file "
            f"again if it is cut off, or correct the times."
        )
    return first, min(last, frames)
