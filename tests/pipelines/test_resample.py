"""The resampler inside a graph against soxr, which the data pipelines use."""

import numpy as np
import pytest
import soxr
import tensorflow as tf

from tf_data_pipelines.resample import can_resample, resample

TARGET = 16000
USUAL = (4000, 5512, 8000, 11025, 12000, 22050, 24000, 32000, 37800, 44100, 48000, 96000, 192000)


def noise(rate, seconds=1.0, below=0.9):
    """float32 noise in the band under `below` of the lower Nyquist frequency, peak 1."""
    samples = int(rate * seconds)
    spectrum = np.fft.rfft(np.random.default_rng(rate).normal(size=samples))
    spectrum[np.fft.rfftfreq(samples, 1 / rate) > below * min(rate, TARGET) / 2] = 0
    sound = np.fft.irfft(spectrum, samples)
    return (sound / np.abs(sound).max()).astype("float32")


def decibels(error, signal):
    return 10 * np.log10(np.mean(error**2) / np.mean(signal**2))


def ideal(sound, rate):
    """The sound's own Fourier series, read at the new times."""
    spectrum, longer = np.fft.rfft(sound.astype("float64")), np.zeros(TARGET // 2 + 1, complex)
    used = min(len(spectrum), len(longer))
    longer[:used] = spectrum[:used]
    return np.fft.irfft(longer, TARGET) * TARGET / rate


@pytest.mark.parametrize("rate", USUAL)
def test_is_exact_in_the_pass_band_and_soxr_at_its_edge(rate):
    sound = noise(rate)
    result = resample(sound, rate, TARGET).numpy()
    assert result.dtype == np.float32
    inner = slice(400, TARGET - 400)
    exact = ideal(sound, rate)
    assert decibels((result - exact)[inner], exact[inner]) < -125
    white = np.random.default_rng(0).normal(size=rate).astype("float32")
    expected = soxr.resample(white, rate, TARGET, quality="HQ")
    assert decibels(resample(white, rate, TARGET).numpy() - expected, expected) < -58


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_has_the_length_of_soxr(rate):
    for samples in (0, 1, 2, 3, 399, 1009, 1100, 1101, 4001):
        sound = np.ones(samples, "float32")
        expected = len(soxr.resample(sound, rate, TARGET, quality="HQ"))
        assert len(resample(sound, rate, TARGET)) == expected


@pytest.mark.parametrize(("rate", "target", "samples"), [(24000, 22050, 400), (44100, 48000, 147)])
def test_rounds_a_half_as_soxr_does(rate, target, samples):
    sound = np.ones(samples, "float32")
    expected = len(soxr.resample(sound, rate, target, quality="HQ"))
    assert len(resample(sound, rate, target)) == expected


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_keeps_what_is_heard_and_stops_the_rest(rate):
    times = np.arange(rate) / rate
    constant = resample(np.full(rate, 0.5, "float32"), rate, TARGET).numpy()
    np.testing.assert_allclose(constant[500:-500], 0.5, atol=1e-6)
    if rate > TARGET:
        tone = np.sin(2 * np.pi * 0.51 * TARGET * times).astype("float32")
        assert np.abs(resample(tone, rate, TARGET).numpy()[500:-500]).max() < 1e-6


def test_leaves_equal_rates_alone():
    sound = noise(TARGET)
    np.testing.assert_array_equal(resample(sound, TARGET, TARGET), sound)


def test_one_graph_takes_every_rate():
    sound = tf.TensorSpec([None], tf.float32)
    graph = tf.function(
        lambda sound, rate: resample(sound, rate, TARGET),
        input_signature=[sound, tf.TensorSpec([], tf.int32)],
    )
    rates = (8000, TARGET, 22050, 48000)
    sounds = [noise(rate, 0.3) for rate in rates]
    dataset = tf.data.Dataset.from_generator(
        lambda: zip(sounds, rates, strict=True),
        output_signature=(sound, tf.TensorSpec([], tf.int32)),
    ).map(lambda sound, rate: resample(sound, rate, TARGET))
    for sound, rate, mapped in zip(sounds, rates, dataset, strict=True):
        expected = resample(sound, rate, TARGET)
        np.testing.assert_allclose(graph(sound, rate), expected, atol=1e-6)
        np.testing.assert_allclose(mapped, expected, atol=1e-6)


def test_refuses_rates_that_it_cannot_take():
    for rate in USUAL:
        assert can_resample(rate, TARGET)
    for rate in (-8000, 0, 1, 3999, 192001, 2**31 - 1, 44101):  # 44101 shares no divisor
        assert not can_resample(rate, TARGET)
        with pytest.raises(tf.errors.InvalidArgumentError, match="cannot resample"):
            resample(np.zeros(100, "float32"), rate, TARGET)
