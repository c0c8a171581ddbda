"""Resampling inside a graph, where the sample rate is known only when the graph runs.

The filter is a polyphase Kaiser-windowed sinc: the ratio of the rates is reduced to L / M, and
L output samples are the product of two blocks of M input samples with a matrix made for this
ratio. It needs TensorFlow's operations only, so that it can be served; in Python soxr is faster.
"""

import math

import numpy as np
import tensorflow as tf

RATES = (4000, 192000)  # Hz, lowest and highest
MAX_RATIO = 1 << 22  # largest L * M; the matrix has two to four times as many numbers
# The filter of soxr HQ, fitted to its impulse response (to -131 dB), so that a served model
# hears what it was trained on, up to the edge of the band.
CUTOFF = 0.956872  # share of the lower Nyquist frequency; 0.913 passes, 1 is stopped
REACH = 101.503  # zero crossings of the sinc on each side, at the lower rate
BETA = 13.712  # shape of the Kaiser window, -138 dB


def resample(waveform, rate, target):
    """Resample one clip from a sample rate known when the graph runs.

    Args:
        waveform: float32 (samples,).
        rate: sample rate of the waveform in Hz, an int or int32 scalar.
        target: sample rate of the result in Hz, likewise.

    Returns:
        float32 (samples * target / rate, rounded as soxr does,). Up to 0.9 of the lower Nyquist
        frequency it is the same sound (to -125 dB), above that it is what soxr HQ gives (to
        -58 dB for white noise). At equal rates it is the waveform itself.

    Raises:
        tf.errors.InvalidArgumentError: `can_resample(rate, target)` is False.

    Source: Kaiser's window design; Crochiere and Rabiner 1983, polyphase structures.
    """
    rate, target = tf.cast(rate, tf.int32), tf.cast(target, tf.int32)
    return tf.cond(
        tf.equal(rate, target), lambda: waveform, lambda: _filtered(waveform, rate, target)
    )


def can_resample(rate, target):
    """Whether `resample` accepts a rate: it lies within RATES, and L * M is at most MAX_RATIO.

    For a target of 16,000 Hz these are all rates that share the divisor 16 with it and most
    that share 8, which includes every usual rate.

    Returns:
        bool scalar tensor.
    """
    up, down = _reduced(rate, target)
    low, high = RATES
    return (
        (rate >= low)
        & (rate <= high)
        & (tf.cast(up, tf.int64) * tf.cast(down, tf.int64) <= MAX_RATIO)
    )


def _reduced(rate, target):
    """(L, M) int32: target / rate in lowest terms; M is under 1 for a rate under 1."""
    rate, target = tf.cast(rate, tf.int32), tf.cast(target, tf.int32)
    divisor, _ = tf.while_loop(
        lambda a, b: b > 0, lambda a, b: (b, a % b), (target, tf.maximum(0, rate))
    )
    return target // divisor, rate // divisor


def _filtered(waveform, rate, target):
    message = (
        f"cannot resample; expected {RATES[0]} to {RATES[1]} Hz and a simple ratio. rate, target:"
    )
    checked = tf.debugging.Assert(can_resample(rate, target), [message, rate, target])
    with tf.control_dependencies([checked]):  # before a division by zero
        up, down = _reduced(rate, target)
    samples = tf.shape(waveform)[0]
    # soxr's own floating-point numbers: they decide which way a half is rounded.
    ratio = tf.cast(rate, tf.float64) / tf.cast(target, tf.float64)
    wanted = tf.cast(tf.floor(tf.cast(samples, tf.float64) / ratio + 0.5), tf.int32)

    # A block is a multiple of M as long as the filter, so that two blocks hold every window.
    reach = (math.ceil(REACH) * tf.maximum(up, down) + up - 1) // up  # input samples on each side
    times = (2 * reach + down) // down
    block, outputs = times * down, times * up
    matrix = _matrix(up, down, block=block, outputs=outputs, reach=reach)
    count = (wanted + outputs - 1) // outputs
    blocks = tf.pad(waveform, [[reach, tf.maximum(0, (count + 1) * block - samples - reach)]])
    blocks = tf.reshape(blocks[: (count + 1) * block], [count + 1, block])
    # (count, outputs) -> (samples,)
    result = tf.matmul(blocks[:-1], matrix[:block]) + tf.matmul(blocks[1:], matrix[block:])
    return tf.reshape(result, [-1])[:wanted]


def _matrix(up, down, *, block, outputs, reach):
    """float32 (2 block, outputs): the weight of each input sample in each output sample.

    Output sample p lies p M / L input samples after input sample number `reach`.
    """
    offset = tf.range(outputs) * down - (tf.range(2 * block) - reach)[:, None] * up
    # Time in zero crossings of the sinc; whole numbers until here, so no phase is lost.
    time = tf.cast(offset, tf.float64) / tf.cast(tf.maximum(up, down), tf.float64)
    inside = tf.nn.relu(1 - (time / REACH) ** 2)
    window = tf.math.bessel_i0(BETA * tf.sqrt(inside)) / np.i0(BETA)
    angle = math.pi * CUTOFF * time
    sinc = tf.math.divide_no_nan(tf.sin(angle), angle) + tf.cast(tf.equal(offset, 0), tf.float64)
    gain = CUTOFF * tf.cast(tf.minimum(up, down), tf.float64) / tf.cast(down, tf.float64)
    return tf.cast(tf.where(inside > 0, gain * sinc * window, 0.0), tf.float32)
