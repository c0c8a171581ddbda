"""Tokens of training clips that are left out before packing, so that rows hold more clips.

How many stay follows from the clip's grid of patches alone; which ones, from seed, epoch and clip.
"""

import tensorflow as tf

from tf_data_pipelines.draws import BANDS, COLUMNS, TOKENS, subset

PARTS = 10_000  # to which shares are rounded, so that NumPy and TensorFlow count the same


def kept_counts(bands, columns, settings):
    """Number of rows, columns and tokens of a grid of patches that stay, each at least 1.

    Args:
        bands: number of patches along the frequency axis, int or integer array or tensor.
        columns: number of patches along the time axis.
        settings: AugmentSettings; this uses drop_freq, drop_time and token_dropout.
    """
    bands, columns = _kept(bands, settings.drop_freq), _kept(columns, settings.drop_time)
    return bands, columns, _kept(bands * columns, settings.token_dropout)


def _kept(count, share):
    parts = round(share * PARTS)
    # count * parts would overflow int32.
    return count - count // PARTS * parts - count % PARTS * parts // PARTS


def drop_tokens(tokens, positions, clip, *, bands, prefix_tokens, settings, seed):
    """Leave out whole rows and columns of a clip's grid, then single tokens.

    Args:
        tokens: float32 (tokens, width), see `patch_tokens`.
        positions: float32 (tokens, 4).
        clip: dictionary with `clip_id` and perhaps `epoch`.
        bands: int32 (), number of patches along the frequency axis.
        prefix_tokens: number of tokens before the grid, which stay.
        settings: AugmentSettings; this uses drop_freq, drop_time and token_dropout.
        seed: random seed.

    Returns:
        tokens and positions of those that stay, in their order.

    Source: PaSST, Koutini et al. 2022, whose structured patchout leaves out rows and columns.
    """
    columns = (tf.shape(tokens)[0] - prefix_tokens) // bands
    kept_bands, kept_columns, kept = kept_counts(bands, columns, settings)
    places = tf.range(bands * columns)
    if settings.drop_freq or settings.drop_time:
        in_freq = subset(kept_bands, bands, clip, seed=seed, stream=BANDS)
        in_time = subset(kept_columns, columns, clip, seed=seed, stream=COLUMNS)
        places = tf.reshape(in_freq[:, None] * columns + in_time, [-1])
    if settings.token_dropout:
        chosen = subset(kept, kept_bands * kept_columns, clip, seed=seed, stream=TOKENS)
        places = tf.gather(places, chosen)
    places = tf.concat([tf.range(prefix_tokens), places + prefix_tokens], 0)
    return tf.gather(tokens, places), tf.gather(positions, places)
