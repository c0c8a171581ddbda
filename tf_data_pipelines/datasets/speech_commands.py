"""Speech Commands v0.02: 105,829 words of 1 s, 35 classes.

dog/0132a06d_nohash_2.wav       {word}/{speaker}_nohash_{n}.wav, 16 kHz
_background_noise_/             no class
validation_list.txt             dog/0132a06d_nohash_2.wav, one a line
testing_list.txt                the same; all other clips are for training
"""

from tf_data_pipelines.datasets.lists import Row, read_lines, source_of
from tf_data_pipelines.listing import folders_in, some_of, sounds_in

LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


def is_speech_commands(data):
    """Whether a folder holds Speech Commands."""
    return all((data / name).is_file() for name in LISTS.values())


def read_speech_commands(root):
    """Speech Commands as a Source of all words; classes are sorted.

    Args:
        root: pathlib.Path of the folder.

    Raises:
        FileNotFoundError: a list, or every clip, is missing.
        ValueError: a list names a clip of no word, or a clip is in both lists.
    """
    words = [folder.name for folder in folders_in(root)]
    splits = {}
    for split, name in LISTS.items():
        path, unknown = root / name, []
        for line, text in read_lines(path):
            word, _, clip = text.partition("/")
            if not clip or word not in words:
                unknown.append(f"line {line}: {text}")
            if splits.setdefault(text, split) != split:
                raise ValueError(
                    f"{path} line {line}: {text!r} is in {LISTS[splits[text]]} already. Download "
                    f"the lists again."
                )
        if unknown:
            raise ValueError(
                f"{path} names {len(unknown):,} clips of words that have no folder in {root}: "
                f"{some_of(unknown)}. Extract the whole archive again, with its own lists."
            )
    present = {
        sound.relative_to(root).as_posix(): str(sound)
        for word in words
        for sound in sounds_in(root / word)
    }
    rows = [
        Row(name, present.get(name), (name.partition("/")[0],), splits.get(name, "train"))
        for name in sorted({*present, *splits})
    ]
    return source_of(root, rows, words)
