"""Packed self-attention clip by clip, as a TensorFlow loop over the clips of a batch."""

import tensorflow as tf


def attend(query, key, value, segment_ids, scale=None):
    """Softmax attention of every token to the tokens of its own clip.

    Each run of equal segment ids is cut out, attends to itself and is put back. XLA cannot
    compile it: the clips have lengths of their own.

    Args:
        query: float (rows, length, heads, width).
        key, value: float, shaped like query.
        segment_ids: int (rows, length), the tokens of a clip side by side; 0 for padding.
        scale: factor on the query-key products; None for 1 / sqrt(width).

    Returns:
        float (rows, length, heads, width); zeros for padding.
    """
    heads, width = query.shape[2:]
    query = query * (width**-0.5 if scale is None else scale)
    shape = tf.shape(query)
    length = shape[1]
    flat = tf.reshape(segment_ids, [-1])
    first = tf.not_equal(flat, tf.roll(flat, 1, 0)) | tf.equal(tf.range(tf.size(flat)) % length, 0)
    run = tf.cumsum(tf.cast(first, tf.int32)) - 1
    lengths = tf.math.segment_sum(tf.ones_like(run), run)
    is_clip = tf.math.segment_max(flat, run) > 0
    count = tf.size(lengths)

    def split_clips(x):
        array = tf.TensorArray(
            x.dtype, count, infer_shape=False, element_shape=[None, heads, width]
        )
        return array.split(tf.reshape(x, [-1, heads, width]), lengths)

    clips = [split_clips(x) for x in (query, key, value)]

    def attend_clip(index):
        q, k, v = (tf.transpose(one.read(index), [1, 0, 2]) for one in clips)
        weights = tf.nn.softmax(tf.matmul(q, k, transpose_b=True))
        return tf.transpose(tf.matmul(weights, v), [1, 0, 2])

    def step(index, done):
        attended = tf.cond(
            is_clip[index],
            lambda: attend_clip(index),
            lambda: tf.zeros([lengths[index], heads, width], query.dtype),
        )
        return index + 1, done.write(index, attended)

    output = tf.TensorArray(
        query.dtype, count, infer_shape=False, element_shape=[None, heads, width]
    )
    _, output = tf.while_loop(
        lambda index, _: index < count, step, (0, output), parallel_iterations=2
    )
    return tf.reshape(output.concat(), shape)
