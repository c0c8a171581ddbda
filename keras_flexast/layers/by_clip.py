"""Self-attention clip by clip: no work for pairs of tokens in different clips.

A dense mask pays for every pair of a row. Here each run of equal segment ids is cut out,
attends to itself and is put back, in a loop over the clips of the batch. The results are
those of the mask, to rounding; padding gets zeros. A loop suits a CPU, where a clip is work
enough for all cores.
"""

import functools

import keras

WINDOWS = (128, 256, 512, 1024)  # of JAX's static shapes; a clip takes the smallest that holds it


def attend_by_clip(query, key, value, segment_ids):
    """Softmax attention of every token to the tokens of its own clip.

    Args:
        query: float (rows, length, heads, width), scaled already; rows and length static.
        key, value: like query.
        segment_ids: int (rows, length), the tokens of a clip side by side; 0 for padding.

    Returns:
        float (rows, length, heads, width); zeros for padding.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow or JAX.
    """
    implementations = {"tensorflow": _by_tensorflow, "jax": _by_jax}
    backend = keras.backend.backend()
    if backend not in implementations:
        raise RuntimeError(f"attention by clip runs on TensorFlow and JAX, not on {backend}.")
    return implementations[backend](query, key, value, segment_ids)


def _by_tensorflow(query, key, value, segment_ids):
    """Arrays of clips of their own lengths; not compilable by XLA, which has static shapes."""
    import tensorflow as tf

    _, length, heads, width = query.shape
    shape = tf.shape(query)
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

    def attend(index):
        q, k, v = (tf.transpose(one.read(index), [1, 0, 2]) for one in clips)
        weights = tf.nn.softmax(tf.matmul(q, k, transpose_b=True))
        return tf.transpose(tf.matmul(weights, v), [1, 0, 2])

    def step(index, done):
        attended = tf.cond(
            is_clip[index],
            lambda: attend(index),
            lambda: tf.zeros([lengths[index], heads, width], query.dtype),
        )
        return index + 1, done.write(index, attended)

    _, done = tf.while_loop(
        lambda index, _: index < count, step, (0, array()), parallel_iterations=2
    )
    return tf.reshape(done.concat(), shape)


def _by_jax(query, key, value, segment_ids):
    rows, length, heads, width = query.shape
    attend = _jax_attention(rows * length, length)
    flat = (x.reshape(rows * length, heads, width) for x in (query, key, value))
    return attend(*flat, segment_ids).reshape(query.shape)


@functools.cache
def _jax_attention(tokens, length):
    """The attention of (tokens, heads, width) arrays, with a gradient that recomputes.

    A loop whose steps have one of a few static windows; the window of a clip may reach over
    its neighbours, whose tokens are masked and left as they are.
    """
    import jax
    import jax.numpy as jnp

    windows = [window for window in WINDOWS if window < length] + [length]

    def for_each_clip(segment_ids, step, done):
        """`done` after `step(window, start, mask, done)` of every clip, one after another."""
        flat, places = jnp.ravel(segment_ids), jnp.arange(tokens)
        first = (flat != jnp.roll(flat, 1)) | (places % length == 0)
        run = jnp.cumsum(first) - 1
        (starts,) = jnp.nonzero(first, size=tokens, fill_value=tokens)
        ends = jnp.append(starts[1:], tokens)
        is_clip = flat[jnp.minimum(starts, tokens - 1)] > 0
        which = jnp.searchsorted(jnp.array([0, *windows]), jnp.where(is_clip, ends - starts, 0))

        def at(window, index, done):
            start = jnp.minimum(starts[index], tokens - window)
            mask = jax.lax.dynamic_slice_in_dim(run, start, window) == index
            return step(window, start, mask, done)

        def body(index, done):
            branches = [lambda done: done]  # padding
            for window in windows:
                branches.append(functools.partial(at, window, index))
            return jax.lax.switch(which[index], branches, done)

        return jax.lax.fori_loop(0, run[-1] + 1, body, done)

    def take(x, start, window):
        """(tokens, heads, ...) -> (heads, window, ...)"""
        return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(x, start, window), 0, 1)

    def take_clip(x, start, mask):
        """`take`, zero outside the clip: no weight of 0 may meet a neighbour's NaN."""
        return jnp.where(mask[:, None], take(x, start, len(mask)), 0)

    def put(x, new, start, mask):
        old = take(x, start, len(mask))
        new = jnp.where(mask.reshape((1, -1) + (1,) * (x.ndim - 2)), new.astype(x.dtype), old)
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.swapaxes(new, 0, 1), start, 0)

    def product(a, b):
        return jnp.matmul(a, b, preferred_element_type="float32")

    def turned(x):
        return jnp.swapaxes(x, 1, 2)

    def forward(query, key, value, segment_ids):
        def step(window, start, mask, done):
            q, k, v = (take_clip(x, start, mask) for x in (query, key, value))
            logits = jnp.where(mask, product(q, turned(k)), -1e30)
            top = logits.max(-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = weights.sum(-1, keepdims=True)
            attended = product(weights.astype(v.dtype), v) / total
            normaliser = (top + jnp.log(total))[..., 0]
            return put(done[0], attended, start, mask), put(done[1], normaliser, start, mask)

        done = jnp.zeros_like(query), jnp.zeros(query.shape[:2], "float32")
        attended, normaliser = for_each_clip(segment_ids, step, done)
        return attended, (query, key, value, segment_ids, attended, normaliser)

    def backward(saved, slope):
        query, key, value, segment_ids, attended, normaliser = saved
        along = (slope.astype("float32") * attended).sum(-1)

        def step(window, start, mask, done):
            q, k, v, s = (take_clip(x, start, mask) for x in (query, key, value, slope))
            norm, mean = (take(x, start, window)[..., None] for x in (normaliser, along))
            both = mask[:, None] & mask
            weights = jnp.where(both, jnp.exp(product(q, turned(k)) - norm), 0)
            change = (weights * (product(s, turned(v)) - mean)).astype(q.dtype)
            weights = weights.astype(q.dtype)
            new = product(change, k), product(turned(change), q), product(turned(weights), s)
            return tuple(put(x, one, start, mask) for x, one in zip(done, new, strict=True))

        done = tuple(jnp.zeros_like(x) for x in (query, key, value))
        return (*for_each_clip(segment_ids, step, done), None)

    attend = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    attend.defvjp(forward, backward)
    return attend
