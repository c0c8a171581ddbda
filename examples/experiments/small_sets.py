"""Three small data sets that anyone can make: spoken words, speakers, and sound events.

python examples/experiments/small_sets.py FOLDER

Each is an ordinary folder, train/ validation/ test/ of one folder per class, of a few hundred
training clips. The voices of the test speak no training clip of the words; the speakers say
other sentences; the events are drawn anew, in other noise.
"""

import argparse
import pathlib

import numpy as np
import soundfile
from rich.progress import track

from tf_data_pipelines.speech import make_corpus, speak, voices

SPLITS = {"train": 0.5, "validation": 0.17, "test": 0.33}  # shares of the speakers' sentences
RATE = 16000
SPEAKERS, SENTENCES = 16, 45
EVENTS = {"train": 30, "validation": 10, "test": 50}  # clips of each class
PEOPLE = ("My neighbor", "The old doctor", "A young sailor", "Nobody here", "Our teacher")
DOINGS = ("bought", "painted", "forgot", "carried home", "was looking for", "sold")
THINGS = ("a green bicycle", "seven apples", "the broken window", "an umbrella", "two letters")


def make_words(folder, seed=0):
    """Ten digits: 300 training clips, 100 for validation, 500 for the test, by other voices."""
    return make_corpus(folder, clips=300, validation_clips=100, test_clips=500, seed=seed)


def make_speakers(folder, seed=0):
    """Sixteen speakers: each says 45 sentences, none of them in two splits."""
    rng = np.random.default_rng(seed)
    texts = [f"{p} {d} {t}." for p in PEOPLE for d in DOINGS for t in THINGS]
    names = rng.choice(voices(), SPEAKERS, replace=False)
    ends = np.rint(len(texts) * np.cumsum(list(SPLITS.values()))).astype(int)
    parts = dict(zip(SPLITS, np.split(rng.permutation(texts), ends[:-1]), strict=True))
    for name in track(names, "Speakers"):
        for split, share in SPLITS.items():
            place = folder / split / str(name).replace("+", "_")
            place.mkdir(parents=True)
            for number in range(round(SENTENCES * share)):
                pitch, rate = int(rng.integers(40, 61)), int(rng.integers(140, 200))
                waveform, own = speak(rng.choice(parts[split]), str(name), rate=rate, pitch=pitch)
                noise = rng.normal(0, 10 ** (-rng.uniform(30, 50) / 20), waveform.size)
                gain = 10 ** (-rng.uniform(0, 12) / 20) / np.abs(waveform).max()
                mixed = np.clip(gain * (waveform + noise), -1, 1)
                soundfile.write(place / f"{number:03}.wav", mixed, own)
    return folder


def make_events(folder, seed=0):
    """Eight kinds of synthetic sounds of 0.5 to 4 s, in noise of -5 to 15 dB below them."""
    rng = np.random.default_rng(seed)
    for name, make in track(SOUNDS.items(), "Events"):
        for split, count in EVENTS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                times = np.arange(round(RATE * rng.uniform(0.5, 4))) / RATE
                sound = make(times, rng)
                sound = sound / np.sqrt(np.mean(sound**2) + 1e-9)
                level = 10 ** (rng.uniform(-15, 5) / 20)
                mixed = sound + level * colored(times.size, rng.uniform(0, 2), rng)
                mixed *= 10 ** (-rng.uniform(0, 20) / 20) / np.abs(mixed).max()
                soundfile.write(place / f"{number:03}.wav", mixed, RATE)
    return folder


# === Sound events: float64 (samples,) of times in seconds ===


def colored(size, power, rng):
    """Noise whose power falls with frequency to this power, of deviation 1."""
    spectrum = np.fft.rfft(rng.normal(size=size))
    spectrum *= np.maximum(1, np.arange(spectrum.size)) ** (-power / 2)
    noise = np.fft.irfft(spectrum, size)
    return noise / noise.std()


def bell(times, rng):
    """Partials of a struck bell, dying away."""
    base, decay = rng.uniform(300, 900), rng.uniform(1.5, 5)
    ratios = np.array([1, 2.0, 2.4, 3.0, 4.5]) * rng.uniform(0.98, 1.02, 5)
    return sum(
        np.exp(-decay * r**0.5 * times) * np.sin(2 * np.pi * base * r * times) for r in ratios
    )


def siren(times, rng):
    """A tone that goes up and down slowly."""
    base, swing, rate = rng.uniform(500, 900), rng.uniform(150, 350), rng.uniform(0.3, 1.2)
    phase = base * times - swing / (2 * np.pi * rate) * np.cos(2 * np.pi * rate * times)
    return np.sin(2 * np.pi * phase) + 0.3 * np.sin(4 * np.pi * phase)


def warble(times, rng):
    """A tone that jumps between two pitches, as an alarm does."""
    low, high, rate = rng.uniform(600, 900), rng.uniform(1000, 1500), rng.uniform(2, 6)
    pitch = np.where((times * rate) % 1 < 0.5, low, high)
    return np.sin(2 * np.pi * np.cumsum(pitch) / RATE)


def engine(times, rng):
    """Many harmonics of a low, wavering pitch."""
    pitch = rng.uniform(25, 70) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.2, 2) * times))
    phase = np.cumsum(pitch) / RATE
    return sum(np.sin(2 * np.pi * k * phase + rng.uniform(0, 6)) / k**0.7 for k in range(1, 30))


def chirps(times, rng):
    """Short rising notes, as of a bird."""
    sound, start = np.zeros(times.size), 0.0
    low, rise = rng.uniform(2000, 3500), rng.uniform(5000, 15000)
    while start < times[-1]:
        t = times - start
        inside = (t >= 0) & (t < 0.12)
        sound += inside * np.sin(2 * np.pi * (low * t + rise * t**2)) * np.sin(np.pi * t / 0.12)
        start += rng.uniform(0.18, 0.5)
    return sound


def clicks(times, rng):
    """Regular clicks, as of a clock."""
    period = rng.uniform(0.15, 0.5)
    since = (times + rng.uniform(0, period)) % period
    return np.exp(-400 * since) * np.sin(2 * np.pi * rng.uniform(1500, 4000) * since)


def rain(times, rng):
    """Noise of high frequencies with drops in it."""
    drops = (rng.random(times.size) < rng.uniform(20, 80) / RATE).astype(float)
    ring = np.exp(-300 * times[:800]) * np.sin(2 * np.pi * rng.uniform(2000, 5000) * times[:800])
    return np.diff(rng.normal(size=times.size + 1)) + 8 * np.convolve(drops, ring)[: times.size]


def steps(times, rng):
    """Dull thuds at a walking pace."""
    sound, start = np.zeros(times.size), rng.uniform(0, 0.3)
    while start < times[-1]:
        t = np.maximum(0, times - start)
        sound += (times >= start) * np.exp(-30 * t) * np.sin(2 * np.pi * rng.uniform(60, 130) * t)
        start += rng.uniform(0.4, 0.7)
    return sound


SOUNDS = {
    "alarm": warble, "bell": bell, "bird": chirps, "clock": clicks,
    "engine": engine, "rain": rain, "siren": siren, "steps": steps,
}  # fmt: skip
SETS = {"words": make_words, "speakers": make_speakers, "events": make_events}


def make_set(name, folder):
    """The folder of a data set, made where it is missing."""
    place = pathlib.Path(folder) / name
    return place if place.exists() else SETS[name](place)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    for name in SETS:
        print(make_set(name, folder))
