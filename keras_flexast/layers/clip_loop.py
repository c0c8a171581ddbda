"""Packed self-attention clip by clip, as a TensorFlow loop over the clips of a batch.

Each run of equal segment ids is cut out, attends to itself and is put back: no work for pairs of
tokens of different clips. XLA cannot compile it, because the clips have lengths of their own.
"""

import tensorflow as tf


def attend(query, key, value, segment_ids, *, scale=None):
    """Softmax attention of every token to the tokens of its own clip; see `kernels.Kernel`.

    Padding gets zeros.
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

    def array():
        element = [None, heads, width]
        return tf.TensorArray(query.dtype, count, infer_shape=False, element_shape=element)

    clips = [array().split(tf.reshape(x, [-1, heads, width]), lengths) for x in (query, key, value)]

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

    _, done = tf.while_loop(
        lambda index, _: index < count, step, (0, array()), parallel_iterations=2
    )
    return tf.reshape(done.concat(), shape)
