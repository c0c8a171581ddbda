"""Recordings in an HDF5 file, as auditory-slow-fast packs those of EPIC-KITCHENS-100.

Each recording is a data set (samples,) of its own, mono at 24 kHz, with the video's name. Its path
is that of the file and this name: "EPIC-KITCHENS-100_audio.hdf5/P01_01".
"""

import contextlib

import numpy as np

from tf_data_pipelines.parts import HDF5, AudioError, part_frames

RATE = 24000  # Hz; the file does not say it


def read_recording(path, start=0.0, stop=None):
    """Samples of a recording, or of a part of it; only these are read.

    Args:
        path: HDF5 file and name of the recording.
        start, stop: seconds of the part, see `read_audio`.

    Returns:
        float32 (frames, 1), full scale at 1, and their rate in Hz.

    Raises:
        AudioError: the file or the recording is missing or is something else, or the part lies
            beyond its end.
    """
    with _recording(path) as recording:
        frames = len(recording)
        first, last = part_frames(path, start, stop, frames=frames, rate=RATE)
        samples = recording[first:last]
    if np.issubdtype(samples.dtype, np.integer):
        samples = samples / np.float32(2.0 ** (8 * samples.dtype.itemsize - 1))
    return samples.astype(np.float32)[:, None], RATE


def recording_length(path):
    """Number of frames of a recording and their rate in Hz; AudioError as `read_recording`."""
    with _recording(path) as recording:
        return len(recording), RATE


def recordings(path):
    """Names of the recordings in an HDF5 file, a set; AudioError as `read_recording`."""
    with _opened(str(path)) as file:
        return set(file)


@contextlib.contextmanager
def _recording(path):
    """The data set of a recording."""
    name, _, key = path.rpartition(HDF5)
    name += HDF5[:-1]
    with _opened(name) as file:
        if key not in file:
            raise AudioError(
                f"{name} has no video {key!r}; it has {len(file)}, such as "
                f"{', '.join(sorted(file)[:3]) or 'none'}. Extract its sound and pack it too, or "
                f"remove its clips from the list."
            )
        found = file[key]
        kind = getattr(getattr(found, "dtype", None), "kind", None)  # None: a group
        if kind not in ("f", "i") or found.ndim != 1:
            what = f"{found.dtype} {found.shape}" if kind else "a group"
            raise AudioError(
                f"{path} is {what}; expected the samples of one channel, floats or signed "
                f"integers (samples,) at {RATE} Hz. Pack the file again with wav_to_hdf5.py of "
                f"auditory-slow-fast."
            )
        yield found


@contextlib.contextmanager
def _opened(path):
    """An HDF5 file opened for reading."""
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{path} needs h5py; install it with `pip install h5py`.") from None
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise AudioError(f"{path} does not exist. Check the path, or copy the file.") from None
    except OSError as error:
        raise AudioError(
            f"{path} cannot be opened as HDF5: {error}. Copy it again; it is damaged or something "
            f"else."
        ) from None
    with file:
        yield file
