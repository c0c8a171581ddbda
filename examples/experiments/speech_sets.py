"""Two generated sets of speech that anyone can repeat from a seed: words and speakers.

python examples/experiments/speech_sets.py FOLDER [--sets words,speakers]

eSpeak NG speaks; the files are 16-bit WAV of 16 kHz in published layouts, which the package
reads by itself. On one core: words 20 s and 150 MB, speakers 55 s and 320 MB.

words/       Speech Commands: bird/0132a06d_nohash_2.wav, validation_list.txt, testing_list.txt.
             12 words in noise; no voice and no variant of one split speaks in another.
speakers/    VoxCeleb1: wav/id10001/4f0k2m9xq1z/00001.wav, iden_split.txt. 24 speakers say
             sentences of 1 to 20 s; no sentence is in two splits.

Each has a list of what was drawn for each clip, clips.csv, and of the arguments, set.json.
"""

import argparse
import collections
import csv
import itertools
import json
import pathlib
import shutil
import zlib

import numpy as np
import soundfile
import soxr
from rich.progress import track

from tf_data_pipelines.atomic import hidden
from tf_data_pipelines.speech import ACCENTS, Engine, split_variants, variant_families

SAMPLE_RATE = 16000  # Hz
RECORD, LIST = "set.json", "clips.csv"
FIELDS = ("path", "split", "voice", "rate", "pitch", "noise", "snr_db", "text")
SPLITS = ("train", "validation", "test")
GAINS_DB = (-20.0, 0.0)  # peak of a clip against full scale
COLORS = {"white": 0.0, "pink": 1.0, "brown": 2.0}  # power falls with frequency to this power
FLAT_BELOW_HZ = 60.0  # else most of the power of brown noise would be where no speech is

# === Words ===
WORDS = (  # 12 of the 35 of Speech Commands
    *("bed", "bird", "down", "five", "forward", "four", "go", "happy", "nine", "off", "one"),
    "three",
)
WORD_CLIPS = {"train": 200, "validation": 30, "test": 60}  # clips of each word
WORD_SNR_DB = (10.0, 30.0)  # the word's power against the noise's
WORD_RATES = (110, 260)  # words per minute
WORD_PITCHES = (10, 90)  # eSpeak's pitch; 50 is the voice's own
PITCH_RANGES = (20, 80)  # eSpeak's; 50 is the voice's own
WORD_SECONDS = (0.5, 1.5)  # length of a clip, or of its word where that is longer
BABBLE = (3, 6)  # voices that speak at once in babble
BABBLE_SENTENCES = 60  # sentences that the babble of a split is mixed from
WORD_NOISES = (*COLORS, "babble")

# === Speakers ===
SPEAKERS = 24
SPEAKER_CLIPS = {"train": 60, "validation": 10, "test": 20}  # clips of each speaker
SPEAKER_SNR_DB = (0.0, 20.0)
SPEAKER_RATES = (130, 220)
SPEAKER_PITCHES = (42, 58)  # 8 around the voice's own, so that pitch alone tells no speaker
MEDIAN_SECONDS, SPREAD = 3.0, 0.7  # of the log-normal lengths; SPREAD of their logarithm
LONGEST_SECONDS = 20.0
LONG_SECONDS = 3.0  # a sentence names place and time where as much is left to say
PAUSES = (0.1, 0.4)  # seconds between two sentences
VIDEO_CLIPS = 5  # clips in a folder of a speaker
SENTENCE_SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")  # one case, for all file systems
PEOPLE = (  # no word of WORDS is in the sentences: they are the babble behind the words
    *("My neighbor", "The old doctor", "A young sailor", "Nobody here", "Our teacher", "Anna"),
    *("She", "They", "His uncle", "Every farmer", "Tom", "The queen of Spain"),
)
DOINGS = (
    *("bought", "painted", "forgot", "carried home", "was looking for", "sold", "broke"),
    *("dreamed about", "never liked", "hid", "found", "will repair"),
)
THINGS = (
    *("a green bicycle", "some apples", "the broken window", "an umbrella", "old letters"),
    *("a map", "the piano", "her blue jacket", "bread and cheese", "the garden chair", "it"),
    *("a jar of honey", "these photographs", "the church clock", "a thousand stamps", "milk"),
)
PLACES = (
    *("in the kitchen", "behind the station", "by the river", "at school", "near the museum"),
    *("under a bridge", "at my cousin's office", "between Paris and Geneva", "in a small village"),
)
TIMES = (
    *("yesterday", "last winter", "every Thursday", "before breakfast", "at midnight"),
    *("while it was raining", "during the long holidays", "in August", "a hundred years ago"),
)


def make_words(folder, *, train=None, validation=None, test=None, seed=0):
    """Words in noise, in the layout of Speech Commands.

    Each clip draws its voice, rate, pitch, range of pitch, loudness, noise, length, and where
    the word begins. The voices of a split speak its babble too.

    Args:
        folder: path of the new folder.
        train, validation, test: clips of each word; None takes WORD_CLIPS.
        seed: random seed of every draw, 0 or more.

    Returns:
        pathlib.Path of the folder.

    Raises:
        FileExistsError: folder exists and holds something else.
    """
    counts = _counts(WORD_CLIPS, train, validation, test)
    arguments = {
        "set": "words", "clips": counts, "seed": seed, "snr_db": WORD_SNR_DB, "words": WORDS,
    }  # fmt: skip
    return _make(folder, arguments, _write_words)


def make_speakers(folder, *, train=None, validation=None, test=None, seed=0):
    """Sentences of speakers, in the layout of VoxCeleb1 for identification.

    Speakers are families of eSpeak's variants; the accents take turns. Each clip draws its
    length, sentences, rate, pitch, loudness and noise.

    Args:
        folder: path of the new folder.
        train, validation, test: clips of each speaker; None takes SPEAKER_CLIPS.
        seed: random seed of every draw, 0 or more.

    Returns:
        pathlib.Path of the folder.

    Raises:
        FileExistsError: folder exists and holds something else.
    """
    counts = _counts(SPEAKER_CLIPS, train, validation, test)
    arguments = {
        "set": "speakers", "clips": counts, "seed": seed, "snr_db": SPEAKER_SNR_DB,
        "speakers": SPEAKERS,
    }  # fmt: skip
    return _make(folder, arguments, _write_speakers)


SETS = {"words": make_words, "speakers": make_speakers}


def make_set(name, folder, **counts):
    """The folder of a set, made where it is missing; `counts` are arguments of SETS[name]."""
    return SETS[name](pathlib.Path(folder) / name, **counts)


# === Writing ===


def _counts(defaults, *given):
    """{split: clips}, where None is the default."""
    return {
        split: defaults[split] if count is None else count
        for split, count in zip(SPLITS, given, strict=True)
    }


def _make(folder, arguments, write):
    """Write a set beside its folder and rename it when it is complete; nothing where it is."""
    folder, text = pathlib.Path(folder), json.dumps(arguments, indent=1) + "\n"
    if folder.exists():
        record = folder / RECORD
        if record.is_file() and record.read_text() == text:
            return folder
        raise FileExistsError(
            f"folder={str(folder)!r} exists and is not the set of these arguments. Delete it or "
            f"choose another folder."
        )
    partial = hidden(folder)
    try:
        partial.mkdir(parents=True)
        rows = write(partial, arguments["clips"], arguments["seed"])
        with open(partial / LIST, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (partial / RECORD).write_text(text)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_words(folder, counts, seed):
    """Write the clips and lists of `make_words`; returns the rows of LIST."""
    engine, rng = Engine(seed), np.random.default_rng(seed)
    variants = split_variants(rng)
    sentences = split_sentences(rng)
    babble = {
        split: [
            _say(engine, rng.choice(sentences[split]), _voice(variants[split], rng), rng)[0]
            for _ in range(BABBLE_SENTENCES)
        ]
        for split in SPLITS
    }
    rows, said = [], collections.Counter()  # of the voice and the word
    plan = [(split, word) for split in SPLITS for word in WORDS for _ in range(counts[split])]
    for split, word in track(plan, "Words"):
        voice = _voice(variants[split], rng)
        path = f"{word}/{zlib.crc32(voice.encode()):08x}_nohash_{said[voice, word]}.wav"
        said[voice, word] += 1
        spoken, drawn = _say(engine, word, voice, rng)
        size = max(spoken.size, round(SAMPLE_RATE * rng.uniform(*WORD_SECONDS)))
        start = int(rng.integers(size - spoken.size + 1))
        kind = str(rng.choice(WORD_NOISES))
        noise = _babble(babble[split], size, rng) if kind == "babble" else _color(kind, size, rng)
        snr_db = rng.uniform(*WORD_SNR_DB)
        _write(folder / path, _mix(spoken, noise, snr_db, start), rng)
        rows.append(
            {"path": path, "split": split, "voice": voice, **drawn, "noise": kind,
             "snr_db": f"{snr_db:.1f}", "text": word}
        )  # fmt: skip
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        lines = sorted(row["path"] for row in rows if row["split"] == split)
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return rows


def _write_speakers(folder, counts, seed):
    """Write the clips and list of `make_speakers`; returns the rows of LIST."""
    engine, rng = Engine(seed), np.random.default_rng(seed)
    sentences = split_sentences(rng)
    families = variant_families()
    chosen = [families[index] for index in rng.permutation(len(families))[:SPEAKERS]]
    speakers = [
        f"{accent}+{rng.choice(family)}"
        for accent, family in zip(itertools.cycle(ACCENTS), chosen, strict=False)
    ]
    plan = [
        (f"id{10001 + index}", voice, split, number)
        for index, voice in enumerate(speakers)
        for split in SPLITS
        for number in range(counts[split])
    ]
    rows = []
    for name, voice, split, number in track(plan, "Speakers"):
        if number % VIDEO_CLIPS == 0:
            video = "".join(rng.choice(LETTERS, 11))
        path = f"wav/{name}/{video}/{number % VIDEO_CLIPS + 1:05d}.wav"
        spoken, text, drawn = _talk(engine, sentences[split], voice, rng)
        kind = str(rng.choice(list(COLORS)))
        snr_db = rng.uniform(*SPEAKER_SNR_DB)
        _write(folder / path, _mix(spoken, _color(kind, spoken.size, rng), snr_db), rng)
        rows.append(
            {"path": path, "split": split, "voice": voice, **drawn, "noise": kind,
             "snr_db": f"{snr_db:.1f}", "text": text}
        )  # fmt: skip
    lines = [f"{SPLITS.index(row['split']) + 1} {row['path'][4:]}\n" for row in rows]
    (folder / "iden_split.txt").write_text("".join(lines))
    return rows


def _write(path, waveform, rng):
    """Write one clip, at a loudness drawn from GAINS_DB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gain = 10 ** (rng.uniform(*GAINS_DB) / 20) / np.abs(waveform).max()
    soundfile.write(path, gain * waveform, SAMPLE_RATE, subtype="PCM_16")


# === Speech: float64 (samples,) at SAMPLE_RATE ===


def split_sentences(rng):
    """{split: sentences without place and time}; none is in two splits."""
    texts = [" ".join(parts) for parts in itertools.product(PEOPLE, DOINGS, THINGS)]
    ends = np.rint(len(texts) * np.cumsum(list(SENTENCE_SHARES.values()))).astype(int)
    order = [texts[index] for index in rng.permutation(len(texts))]
    starts = (0, *ends[:-1])
    return {s: order[a:b] for s, a, b in zip(SENTENCE_SHARES, starts, ends, strict=True)}


def _voice(variants, rng):
    """A voice of one of the variants, in any accent."""
    return f"{rng.choice(ACCENTS)}+{rng.choice(variants)}"


def _spoken(engine, text, voice, **numbers):
    """The waveform of a text."""
    waveform = engine.speak(str(text), voice, **numbers)
    return soxr.resample(waveform.astype(np.float64), engine.sample_rate, SAMPLE_RATE)


def _draw(rng, ends):
    """A whole number between two ends, both included."""
    return int(rng.integers(ends[0], ends[1] + 1))


def _say(engine, text, voice, rng):
    """One text as `make_words` draws it, and {"rate": , "pitch": }."""
    drawn = {"rate": _draw(rng, WORD_RATES), "pitch": _draw(rng, WORD_PITCHES)}
    return _spoken(engine, text, voice, pitch_range=_draw(rng, PITCH_RANGES), **drawn), drawn


def _talk(engine, sentences, voice, rng):
    """Sentences until the drawn length is about reached; waveform, text, and as `_say`."""
    drawn = {"rate": _draw(rng, SPEAKER_RATES), "pitch": _draw(rng, SPEAKER_PITCHES)}
    wanted = min(LONGEST_SECONDS, rng.lognormal(np.log(MEDIAN_SECONDS), SPREAD)) * SAMPLE_RATE
    texts, parts, size, last = [], [], 0, 0
    # Another sentence brings the length nearer where half of it is still to be said.
    while not parts or size + last / 2 < wanted:
        text = str(rng.choice(sentences))
        if wanted - size > LONG_SECONDS * SAMPLE_RATE:
            text += f" {rng.choice(PLACES)} {rng.choice(TIMES)}"
        spoken = _spoken(engine, text + ".", voice, pitch_range=50, **drawn)
        pause = np.zeros(round(SAMPLE_RATE * rng.uniform(*PAUSES)) if parts else 0)
        last = pause.size + spoken.size
        if size + last > LONGEST_SECONDS * SAMPLE_RATE:
            break
        texts.append(text + ".")
        parts += [pause, spoken]
        size += last
    return np.concatenate(parts), " ".join(texts), drawn


# === Noise: float64 (samples,) of mean power 1 ===


def _color(name, size, rng):
    """White, pink or brown noise."""
    spectrum = np.fft.rfft(rng.normal(size=size))
    freqs = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    spectrum *= np.maximum(FLAT_BELOW_HZ, freqs) ** (-COLORS[name] / 2)
    return _unit(np.fft.irfft(spectrum, size))


def _babble(sentences, size, rng):
    """Some of the sentences at once, each from a random place on and again from its start."""
    chosen = rng.choice(len(sentences), _draw(rng, BABBLE), replace=False)
    places = [rng.integers(sentences[index].size) + np.arange(size) for index in chosen]
    voices = [
        _unit(np.take(sentences[index], place, mode="wrap"))
        for index, place in zip(chosen, places, strict=True)
    ]
    return _unit(np.sum(voices, axis=0))


def _unit(waveform):
    """A waveform of mean power 1."""
    return waveform / np.sqrt(np.mean(waveform**2))


def _mix(spoken, noise, snr_db, start=0):
    """Speech from sample `start` on, in noise that is snr_db below the speech's mean power."""
    mixed = 10 ** (-snr_db / 20) * noise
    mixed[start : start + spoken.size] += _unit(spoken)
    return mixed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--sets", default=",".join(SETS), help="names with commas between them")
    arguments = parser.parse_args()
    for name in arguments.sets.split(","):
        print(make_set(name, arguments.folder))
