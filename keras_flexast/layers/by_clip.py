"""Self-attention clip by clip: no work for pairs of tokens in different clips.

A dense mask pays for every pair of a row. Here each run of equal segment ids is cut out,
attends to itself and is put back, in a loop over the clips of the batch. The results are
those of the mask, to rounding; padding gets zeros. A loop suits a CPU, where a clip is work
enough for all cores.
"""

import functools

import keras

TILE = 128  # queries and keys of JAX's static shapes; 64 to 512 were measured, forward and back


def attend_by_clip(query, key, value, segment_ids):
    """Softmax attention of every token to the tokens of its own clip.

    Args:
        query: float (rows, length, heads, width), scaled already; on JAX all static.
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

    heads, width = query.shape[2:]
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
    flat = (x.reshape(-1, heads, width).swapaxes(0, 1) for x in (query, key, value))
    return attend(*flat, segment_ids).swapaxes(0, 1).reshape(query.shape)


@functools.cache
def _jax_attention(tokens, length):
    """The attention of (heads, tokens, width) arrays in tiles of TILE queries by TILE keys.

    A tile begins where its clip does, or TILE further; what it holds beyond the clip's end is
    masked. The softmax over the tiles of a clip runs online, and the gradient computes it
    again from each query's normaliser: FlashAttention, Dao et al. 2022 (arXiv:2205.14135).
    """
    import jax
    import jax.numpy as jnp

    def tiles_of(segment_ids):
        """Number of query tiles, and of each its place, its clip's place and end."""
        flat, places = jnp.ravel(segment_ids), jnp.arange(tokens)
        first = (flat != jnp.roll(flat, 1)) | (places % length == 0)
        start = jax.lax.cummax(jnp.where(first, places, 0))
        clip = jnp.cumsum(first) - 1
        end = start + jnp.zeros(tokens, "int32").at[clip].add(1)[clip]
        is_tile = (flat > 0) & ((places - start) % TILE == 0)
        (here,) = jnp.nonzero(is_tile, size=tokens, fill_value=0)
        return is_tile.sum(), here, start[here], end[here]

    def lengthened(*arrays):
        """Room for the last tile, which may reach beyond the last token."""
        return [jnp.pad(x, ((0, 0), (0, TILE), (0, 0))) for x in arrays]

    def take(x, place):
        return jax.lax.dynamic_slice_in_dim(x, place, TILE, 1)

    def take_clip(x, place, mine):
        """`take`, zero outside the clip: no weight of 0 may meet a neighbour's NaN."""
        return jnp.where(mine[:, None], take(x, place), 0)

    def put(x, tile, place):
        return jax.lax.dynamic_update_slice_in_dim(x, tile.astype(x.dtype), place, 1)

    def product(a, b):
        return jnp.matmul(a, b, preferred_element_type="float32")

    def turned(x):
        return jnp.swapaxes(x, 1, 2)

    def each_key_tile(step, start, end, done):
        """`done` after `step(place, mine, done)` of every key tile of a clip."""

        def body(index, done):
            place = start + index * TILE
            return step(place, place + jnp.arange(TILE) < end, done)

        return jax.lax.fori_loop(0, (end - start + TILE - 1) // TILE, body, done)

    def forward(query, key, value, segment_ids):
        heads, _, width = query.shape
        count, here, starts, ends = tiles_of(segment_ids)
        queries, keys, values = lengthened(query, key, value)

        def query_tile(index, done):
            q = take(queries, here[index])

            def key_tile(place, mine, done):
                attended, total, top = done
                logits = product(q, turned(take(keys, place)))
                logits = jnp.where(mine, logits, -1e30)
                new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
                weights, shrink = jnp.exp(logits - new_top), jnp.exp(top - new_top)
                v = take_clip(values, place, mine)
                attended = attended * shrink + product(weights.astype(v.dtype), v)
                return attended, total * shrink + weights.sum(-1, keepdims=True), new_top

            zeros = jnp.zeros((heads, TILE, width)), jnp.zeros((heads, TILE, 1))
            lowest = jnp.full((heads, TILE, 1), -1e30)
            attended, total, top = each_key_tile(
                key_tile, starts[index], ends[index], (*zeros, lowest)
            )
            new = attended / total, top + jnp.log(total)
            # What lies beyond the clip's end is put right by the tiles that follow.
            return tuple(put(x, tile, here[index]) for x, tile in zip(done, new, strict=True))

        done = jnp.zeros_like(queries), jnp.zeros((*queries.shape[:2], 1), "float32")
        attended, normaliser = jax.lax.fori_loop(0, count, query_tile, done)
        attended = jnp.where(jnp.ravel(segment_ids)[:, None] > 0, attended[:, :tokens], 0)
        return attended, (query, key, value, segment_ids, attended, normaliser)

    def backward(saved, slope):
        query, key, value, segment_ids, attended, normaliser = saved
        count, here, starts, ends = tiles_of(segment_ids)
        along = (slope.astype("float32") * attended).sum(-1, keepdims=True)
        queries, keys, values, slopes, along = lengthened(query, key, value, slope, along)

        def query_tile(index, done):
            for_query, for_key, for_value = done
            place = here[index]
            my_query = place + jnp.arange(TILE) < ends[index]
            q, s = take_clip(queries, place, my_query), take_clip(slopes, place, my_query)
            norm, mean = take(normaliser, place), take(along, place)

            def key_tile(place, mine, done):
                for_q, for_key, for_value = done
                k, v = take_clip(keys, place, mine), take_clip(values, place, mine)
                both = my_query[:, None] & mine
                weights = jnp.where(both, jnp.exp(product(q, turned(k)) - norm), 0)
                change = jnp.where(both, weights * (product(s, turned(v)) - mean), 0)
                weights, change = weights.astype(q.dtype), change.astype(q.dtype)
                for_k = take(for_key, place) + product(turned(change), q)
                for_v = take(for_value, place) + product(turned(weights), s)
                return (
                    for_q + product(change, k),
                    put(for_key, for_k, place),
                    put(for_value, for_v, place),
                )

            for_q, for_key, for_value = each_key_tile(
                key_tile, starts[index], ends[index], (jnp.zeros(q.shape), for_key, for_value)
            )
            for_q = jnp.where(my_query[:, None], for_q, take(for_query, place))
            return put(for_query, for_q, place), for_key, for_value

        done = tuple(jnp.zeros(queries.shape) for _ in range(3))
        slopes = jax.lax.fori_loop(0, count, query_tile, done)
        return (*(x[:, :tokens].astype(query.dtype) for x in slopes), None)

    attend = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    attend.defvjp(forward, backward)
    return attend
