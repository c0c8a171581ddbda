"""One sound and many: where it lies, what is heard in it, and what it is used for."""

import collections
import dataclasses

import numpy as np

from tf_data_pipelines.audio import MIN_SAMPLES, announced_seconds, read_audio
from tf_data_pipelines.parts import is_whole, part_name


@dataclasses.dataclass(frozen=True)
class Clip:
    """One sound: a sound file, or a part of a longer one.

    Args:
        path: file name, or HDF5 file and recording, see `read_audio`.
        labels: indices into the classes of the source, ascending; one index unless the
            source is multi-label.
        split: "train", "validation" or "test".
        start: second of the file at which the clip begins.
        stop: second of the file at which it ends; None for the end of the file.
        weight: how often the clip is wanted against others, as AST's manifests say it. It is
            carried only: no pipeline uses it.
    """

    path: str
    labels: tuple[int, ...]
    split: str
    _: dataclasses.KW_ONLY
    start: float = 0.0
    stop: float | None = None
    weight: float = 1.0

    @property
    def name(self):
        """Name in messages: the path, and the part if the clip is one."""
        return part_name(self.path, self.start, self.stop)

    @property
    def whole(self):
        """Whether the clip is all of a sound file."""
        return is_whole(self.path, self.start, self.stop)

    def read(self, sample_rate=16000, *, min_samples=MIN_SAMPLES):
        """`read_audio` of the clip: float32 (samples,); AudioError if it cannot be used."""
        part = {"start": self.start, "stop": self.stop}
        return read_audio(self.path, sample_rate, min_samples=min_samples, **part)

    def announced_seconds(self):
        """`announced_seconds` of the clip: what the file says; nothing is decoded."""
        return announced_seconds(self.path, self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class Source:
    """Clips and the classes that their labels index.

    Args:
        clips: tuple of Clip, in the order of the sorted folder or of the manifest.
        classes: tuple of class names; the position of a name is its label.
        multi_label: whether a clip may have several labels.
        missing: names of the clips of all splits that the lists of a published data set name
            and the disk lacks.
    """

    clips: tuple[Clip, ...]
    classes: tuple[str, ...]
    multi_label: bool
    missing: tuple[str, ...] = ()

    def __len__(self):
        return len(self.clips)

    def targets(self):
        """Labels as training needs them.

        Returns:
            int32 (clips,), the class index of each clip; for a multi-label source float32
            (clips, classes), 1 for each of its classes.
        """
        if not self.multi_label:
            return np.array([clip.labels[0] for clip in self.clips], "int32")
        targets = np.zeros((len(self), len(self.classes)), "float32")
        for row, clip in zip(targets, self.clips, strict=True):
            row[list(clip.labels)] = 1
        return targets

    def split(self, name):
        """The source with the clips of one split only.

        Raises:
            ValueError: the split has no clips; the message lists the splits present.
        """
        clips = tuple(clip for clip in self.clips if clip.split == name)
        if not clips:
            present = collections.Counter(clip.split for clip in self.clips)
            listed = ", ".join(f"{split!r} ({count} clips)" for split, count in present.items())
            raise ValueError(
                f"split {name!r} has no clips; present are {listed or 'none'}. Give clips that "
                f"split in the manifest or a folder {name}/, let splits be drawn from more clips "
                f"or larger shares (--validation, --test), or choose another split (--split)."
            )
        return dataclasses.replace(self, clips=clips)
