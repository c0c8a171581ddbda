"""What a teacher hears of each clip: the same features, cut into tokens at its own patch size.

clips                [a a a] [b b]
tokens                a a a b b .      at the student's patch size
teacher_tokens        a a b b b . .    at the teacher's, in a row of its own length
teacher_segment_ids   1 1 2 2 2 0 0    the same slots
"""

import dataclasses

import tensorflow as tf

from tf_data_pipelines.patches import check_patches, patch_tokens, token_counts
from tf_data_pipelines.settings import FbankSettings, PatchSettings, check_positive

TEACHER = "teacher"  # before the names of the columns


@dataclasses.dataclass(frozen=True)
class TeacherTokens:
    """How the features that a student hears become the tokens of its teacher.

    Args:
        fbank: FbankSettings of the teacher, whose mean and std it hears with.
        patches: PatchSettings of the teacher with one patch size.
        row_length: number of tokens in a row of the teacher's; a clip with more loses its last
            patches.
    """

    fbank: FbankSettings
    patches: PatchSettings
    row_length: int

    def __post_init__(self):
        check_positive("row_length", self.row_length, int)
        if len(self.patches.patch_sizes) != 1:
            raise ValueError(
                f"patch_sizes={self.patches.patch_sizes} must be one size, that of the teacher."
            )
        check_patches(self.patches, self.fbank.mel_bins)

    @property
    def beside(self) -> dict[str, int]:
        """What `pack` packs beside the student's tokens."""
        return {TEACHER: self.row_length}

    def empty(self, frames: tf.Tensor) -> dict[str, tf.Tensor]:
        """The columns of a clip of so many frames, int32 (), as long as they are, without width."""
        count = token_counts(frames, self.fbank.mel_bins, self.patches, self.row_length)[0]
        return {f"{TEACHER}_{name}": tf.zeros([count, 0]) for name in ("tokens", "positions")}


def add_teacher_tokens(clips, teacher, fbank):
    """Add what the teacher hears of each clip, after every change of it.

    Args:
        clips: Dataset of dictionaries with `features` float32 (frames, mel_bins), normalized for
            the student, and `frame_shift_scale` float32 (); other columns pass.
        teacher: TeacherTokens; None for none.
        fbank: FbankSettings of the student.

    Returns:
        Dataset of the same dictionaries with `teacher_tokens` float32 (tokens, 256), as wide as
        the teacher's base patch, and `teacher_positions` float32 (tokens, 4).
    """
    if teacher is None:
        return clips
    scale = fbank.std / teacher.fbank.std
    shift = (fbank.mean - teacher.fbank.mean) / (2 * teacher.fbank.std)

    def add(clip):
        tokens, positions = patch_tokens(
            clip["features"] * scale + shift,
            teacher.patches,
            frame_shift_scale=clip["frame_shift_scale"],
            max_tokens=teacher.row_length,
        )
        return {**clip, f"{TEACHER}_tokens": tokens, f"{TEACHER}_positions": positions}

    return clips.map(add, tf.data.AUTOTUNE)
