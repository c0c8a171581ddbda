"""Data sets of spoken words, generated with eSpeak NG.

`make_corpus` writes ordinary audio files in `split/word/` folders. The voices of the
validation and test splits do not speak in the training split. The package
`espeakng-loader` brings libespeak-ng and its voices; NumPy, soundfile and the standard
library do the rest.
"""

import ctypes
import functools
import io
import itertools
import json
import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = (
    "en-029",  # Caribbean
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-gbclan",  # Lancaster
    "en-gb-x-gbcwmd",  # West Midlands
    "en-gb-x-rp",  # Received Pronunciation
    "en-us",
    "en-us-nyc",
)
LEFT_OUT = (  # whispers, effects, and variants whose digits a template matcher confuses
    *("whisper", "whisperf", "croak", "Demonic", "AnxiousAndy"),
    *("Alicia", "kaukovalta", "Lee", "shelby", "UniRobot", "zac"),
)
RATES = (130, 220)  # words per minute, drawn uniformly with both ends
PITCHES = (20, 80)  # eSpeak's pitch, drawn uniformly with both ends
GAINS_DB = (-12.0, 0.0)  # peak of a clip against full scale, drawn uniformly
SHARES = {"test": 0.2, "validation": 0.1}  # share of the variants; the others train
OTHER_FORMATS = 0.1  # share of the clips that are not WAV, so that every decoder is used
MIN_SECONDS = 0.3  # shorter clips are filled up with silence
WINDOW_SECONDS = 1.2  # every second clip is filled up too, to a length drawn up to this one
TRIM_DB = -50.0  # level against the peak; quieter ends are cut
MARGIN_SECONDS = 0.02  # quiet sound that is kept at both ends
VOLUME = 40  # percent; the loudest variants overflow 16 bits above this
RECORD = "corpus.json"
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def _loader():
    """The module espeakng_loader; an ImportError says how to install it."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ImportError(
            'Generated speech needs the wheel espeakng-loader: pip install "keras-flexast[demo]".'
        ) from error
    return espeakng_loader


def _check_range(name, value, low, high):
    """Raise unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or int(value) != value or not low <= value <= high:
        raise ValueError(f"{name}={value!r} must be a whole number from {low} to {high}.")


def _variants():
    """Every voice variant in eSpeak's data, sorted."""
    return tuple(sorted(os.listdir(Path(_loader().get_data_path(), "voices", "!v"))))


class Engine:
    """A private copy of libespeak-ng with its own state, for speech that can be repeated.

    eSpeak keeps pitch wobble, echo and noise in static C variables that nothing resets, so a
    second utterance differs from the first. The dynamic linker takes a copied file for a new
    library: the same calls on a new engine give the same samples. A copy is never unloaded
    (1 MB each).

    Args:
        seed: random seed of eSpeak's noise, 0 or more.

    Attributes:
        sample_rate: 22,050 Hz.

    Raises:
        ImportError: espeakng-loader is not installed.

    Source: espeak-ng 1.52 speak_lib.h, espeak_ng.h, wavegen.c.
    """

    def __init__(self, seed):
        loader = _loader()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            path = shutil.copy(loader.get_library_path(), folder)
            try:
                self._lib = ctypes.CDLL(path)
            except OSError as error:
                raise OSError(
                    f"libespeak-ng cannot be loaded from {folder}: {error}. Set TMPDIR to a folder "
                    "whose files may be executed."
                ) from error
        lib = self._lib
        lib.espeak_Synth.argtypes = (
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint),
            *(ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
        )
        lib.espeak_ng_SetRandSeed.argtypes = (ctypes.c_long,)
        # 2: synchronous, samples to the callback; 0x8000: return errors instead of exit().
        data_path = loader.get_data_path()
        self.sample_rate = lib.espeak_Initialize(2, 0, data_path.encode(), 0x8000)
        if self.sample_rate <= 0:
            raise RuntimeError(
                f"eSpeak NG cannot read its data at {data_path}. Reinstall espeakng-loader, in a "
                "path under 160 characters."
            )
        lib.espeak_ng_SetRandSeed(seed)  # after initializing, which seeds with the clock
        self._variants = frozenset(_variants())
        # Klatt's synthesizer (Reed, caleb) draws from the C library's rand(), which the whole
        # process shares: seeded before each utterance, where it is found (not on Windows).
        self._srand = getattr(lib, "srand", None)
        self._seeds = itertools.count(seed)
        self._blocks = []
        self._callback = CALLBACK(self._receive)  # kept: C holds no reference
        self._lock = threading.Lock()
        lib.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, events):
        if samples and count > 0:
            self._blocks.append(ctypes.string_at(samples, 2 * count))  # copied: C reuses it
        return 0

    def speak(self, text, voice, *, rate, pitch, pitch_range):
        """The waveform of the function `speak`, of the same arguments; they are not checked."""
        accent, plus, variant = voice.partition("+")
        name = ("en" if accent == "en-gb" else accent) + plus + variant  # eSpeak: en-gb is "en"
        with self._lock:
            # eSpeak accepts an unknown variant and keeps the last voice for an unknown language.
            known = not plus or variant in self._variants
            if not known or self._lib.espeak_SetVoiceByName(name.encode()) != 0:
                raise ValueError(
                    f"voice={voice!r} is unknown. Choose one of voices(), such as 'en-us+f3'."
                )
            for parameter, value in ((1, rate), (2, VOLUME), (3, pitch), (4, pitch_range)):
                self._lib.espeak_SetParameter(parameter, value, 0)
            if self._srand is not None:
                self._srand(ctypes.c_uint(next(self._seeds)))
            self._blocks.clear()
            encoded = text.encode()
            # From the first character to the last; 1: UTF-8.
            arguments = (encoded, len(encoded) + 1, 0, 0, 0, 1, None, None)
            self._lib.espeak_Synth(*arguments)
            self._lib.espeak_Synchronize()
            samples = np.frombuffer(b"".join(self._blocks), np.int16)
        waveform = samples.astype(np.float32) / 32768
        peak = np.max(np.abs(waveform), initial=0.0)
        if peak == 0:
            raise ValueError(f"text={text!r} gave no sound. Pass at least one word.")
        loud = np.flatnonzero(np.abs(waveform) > peak * 10 ** (TRIM_DB / 20))
        margin = round(MARGIN_SECONDS * self.sample_rate)
        return waveform[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


@functools.cache
def _shared_engine():
    return Engine(seed=0)


def voices():
    """The English voices that `make_corpus` draws from.

    Returns:
        tuple of `accent+variant`, such as "en-us+f3": each of ACCENTS with each variant in
        eSpeak's data except LEFT_OUT.

    Raises:
        ImportError: espeakng-loader is not installed.
    """
    variants = [variant for variant in _variants() if variant not in LEFT_OUT]
    return tuple(f"{accent}+{variant}" for accent in ACCENTS for variant in variants)


def speak(text, voice="en-us", *, rate=175, pitch=50, pitch_range=50):
    """Say `text` once.

    Two calls differ a little, by eSpeak's pitch wobble and noise; `make_corpus` repeats exactly.

    Args:
        text: words to say.
        voice: eSpeak language, or `language+variant`; see `voices`.
        rate: words per minute, 80 to 450; some variants scale it.
        pitch: pitch from 0 to 99; 50 is the voice's own.
        pitch_range: range of the pitch from 0 (monotone) to 99; 50 is the voice's own.

    Returns:
        float32 (samples,) in [-1, 1], with at most 20 ms below -50 dB of the peak at each end;
        and the sample rate, 22,050 Hz.

    Raises:
        ImportError: espeakng-loader is not installed.
        ValueError: the voice is unknown, a number is out of range or the text is silent.
    """
    _check_range("rate", rate, 80, 450)
    _check_range("pitch", pitch, 0, 99)
    _check_range("pitch_range", pitch_range, 0, 99)
    engine = _shared_engine()
    waveform = engine.speak(
        text, voice, rate=int(rate), pitch=int(pitch), pitch_range=int(pitch_range)
    )
    return waveform, engine.sample_rate


def variant_families():
    """The variants of `voices` by speaker: takes of one speaker (iven, iven2, ...) go together.

    Returns:
        list of lists of variants, in the order of their names.
    """
    families = {}
    for variant in dict.fromkeys(voice.partition("+")[2] for voice in voices()):
        stem = variant.rstrip("0123456789").lower()
        # f1 to f5 and m1 to m8 are different speakers; other numbers are one speaker's takes.
        families.setdefault(stem if len(stem) > 1 else variant, []).append(variant)
    return list(families.values())


def split_variants(rng):
    """Draw the variants of each split, by whole families; see SHARES.

    Args:
        rng: numpy.random.Generator.

    Returns:
        dict from "train", "test" and "validation" to a list of variants.
    """
    families = variant_families()
    total = sum(map(len, families))
    order = [families[index] for index in rng.permutation(len(families))]
    splits = {}
    for split, share in SHARES.items():
        splits[split] = []
        while len(splits[split]) < share * total:
            splits[split] += order.pop()
    return {"train": [variant for family in order for variant in family], **splits}


def _plan(words, counts, *, variants, formats, rng):
    """Yield (path, word, voice, rate, pitch, gain, smallest length in seconds) of every clip.

    Each voice says all words, then the next voice does. Variants and accents take turns so
    that accents x variants rounds use every voice once.
    """
    for split, count in counts.items():
        names = [variants[split][index] for index in rng.permutation(len(variants[split]))]
        for number in range(count):
            turn, spoken = divmod(number, len(words))
            lap, index = divmod(turn, len(names))
            voice = f"{ACCENTS[(index + lap) % len(ACCENTS)]}+{names[index]}"
            rate, pitch = (int(rng.integers(low, high + 1)) for low, high in (RATES, PITCHES))
            gain = 10 ** (rng.uniform(*GAINS_DB) / 20)
            other = rng.random() < OTHER_FORMATS
            form = formats[rng.integers(len(formats))] if other else "wav"
            name = f"{voice.replace(' ', '-')}_{number:05d}.{form}"
            window = rng.uniform(-WINDOW_SECONDS, WINDOW_SECONDS)  # half of them below zero: none
            yield Path(split, words[spoken], name), words[spoken], voice, rate, pitch, gain, window


def _encode(waveform, sample_rate, form):
    """The bytes of an audio file."""
    import soundfile

    stream = io.BytesIO()
    subtype = "PCM_16" if form in ("wav", "flac") else None
    soundfile.write(stream, waveform, sample_rate, format=form.upper(), subtype=subtype)
    return stream.getvalue()


def make_corpus(
    folder,
    words=DIGITS,
    *,
    clips=3000,
    test_clips=600,
    validation_clips=200,
    seed=1337,
    progress=False,
):
    """Write a corpus of spoken words: `folder/split/word/voice_number.extension`.

    Splits are train, validation and test; a variant of one split never speaks in another.
    Each clip draws its rate, pitch and loudness. Every voice says each word equally often
    (to within one), so classes are balanced. Nine files in ten are 16-bit WAV, the others
    FLAC, Ogg Vorbis or MP3, all mono at 22,050 Hz and 0.3 s or longer, some with silence at
    the end. The same arguments give the same samples with the same versions of eSpeak NG and
    libsndfile. The write is atomic: the corpus is written beside `folder` and renamed when it
    is complete. `folder/corpus.json` records the arguments.

    Args:
        folder: path of the new folder; its parents are made too. If it already holds the
            corpus of these arguments, nothing is done.
        words: list of the classes, each a word that can name a folder.
        clips: number of training clips.
        test_clips: number of test clips.
        validation_clips: number of validation clips.
        seed: random seed of every draw, 0 or more.
        progress: whether to show a progress bar on standard error.

    Returns:
        pathlib.Path of the folder.

    Raises:
        ImportError: espeakng-loader is not installed.
        FileExistsError: folder exists and holds something else.
        ValueError: words are empty, repeated or cannot name folders, or a number is negative.
    """
    folder, words = Path(folder), tuple(words)
    if not words or len({word.lower() for word in words}) < len(words):
        raise ValueError(f"words={words!r} must be one or more different words.")
    for word in words:
        if not word or word in (".", "..") or set(word) & set('/\\:*?"<>|'):
            raise ValueError(f"words contains {word!r}, which cannot name a folder. Spell it out.")
    counts = {"train": clips, "validation": validation_clips, "test": test_clips}
    for name, value in (
        *(("clips", clips), ("test_clips", test_clips)),
        *(("validation_clips", validation_clips), ("seed", seed)),
    ):
        _check_range(name, value, 0, 2**31 - 1)
    counts = {split: int(count) for split, count in counts.items()}  # NumPy's are not JSON
    arguments = {"words": list(words), "clips": counts, "seed": int(seed)}
    if _is_complete(folder, arguments):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"folder={str(folder)!r} exists and is not the corpus of these arguments. Delete it "
            "or choose another folder."
        )
    engine = Engine(int(seed))
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_corpus(partial, arguments, engine, progress)
        if folder.is_dir():
            folder.rmdir()  # empty; Windows does not rename over it
        partial.rename(folder)
    except OSError:
        if not _is_complete(folder, arguments):  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_corpus(folder, arguments, engine, progress):
    """Speak and write every clip, then the record of the arguments and voices."""
    import soundfile

    words, counts, seed = (arguments[name] for name in ("words", "clips", "seed"))
    available = soundfile.available_formats()  # MP3 came with libsndfile 1.1
    formats = [form for form in ("flac", "ogg", "mp3") if form.upper() in available]
    rng = np.random.default_rng(seed)
    variants = split_variants(rng)
    plan = list(_plan(words, counts, variants=variants, formats=formats, rng=rng))
    for path, *_ in plan:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    if progress:
        from rich.console import Console
        from rich.progress import track

        plan = track(plan, description="Speaking", console=Console(stderr=True))
    for path, word, voice, rate, pitch, gain, seconds in plan:
        waveform = engine.speak(word, voice, rate=rate, pitch=pitch, pitch_range=50)
        waveform *= gain / np.abs(waveform).max()
        window = round(max(MIN_SECONDS, seconds) * engine.sample_rate)
        waveform = np.pad(waveform, (0, max(0, window - len(waveform))))
        (folder / path).write_bytes(_encode(waveform, engine.sample_rate, path.suffix[1:]))
    record = {"arguments": arguments, "sample_rate": engine.sample_rate, "variants": variants}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def _is_complete(folder, arguments):
    """Whether `folder` holds the corpus of these arguments."""
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))["arguments"] == arguments
    except (OSError, ValueError, KeyError, TypeError):
        return False
