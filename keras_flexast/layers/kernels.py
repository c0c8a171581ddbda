"""Self-attention clip by clip: no work for pairs of tokens in different clips.

A dense mask pays for every pair of a row. Here each run of equal segment ids is cut out,
attends to itself and is put back, in a loop over the clips of the batch. The results are
those of the mask, to rounding; padding gets zeros. A loop suits a CPU, where a clip is work
enough for all cores.
"""

import functools

import keras

TILE, AT_ONCE = 192, 2  # of JAX's static shapes; tiles of 64 to 512 and 1 to 8 of them were timed


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
    again from each query's normalizer: FlashAttention, Dao et al. 2022 (arXiv:2205.14135).
    AT_ONCE query tiles go side by side, in arrays (AT_ONCE, heads, TILE, ...); the last ones
    may be empty tiles behind the tokens.
    """
    import jax
    import jax.numpy as jnp

    def tiles_of(segment_ids):
        """Steps of AT_ONCE query tiles, and of each tile its place, its clip's place and end."""
        flat, places = jnp.ravel(segment_ids), jnp.arange(tokens)
        first = (flat != jnp.roll(flat, 1)) | (places % length == 0)
        start = jax.lax.cummax(jnp.where(first, places, 0))
        clip = jnp.cumsum(first) - 1
        end = start + jnp.zeros(tokens, "int32").at[clip].add(1)[clip]
        is_tile = (flat > 0) & ((places - start) % TILE == 0)
        (here,) = jnp.nonzero(is_tile, size=tokens + AT_ONCE, fill_value=tokens)
        start, end = (jnp.append(x, tokens)[here] for x in (start, end))
        return (is_tile.sum() + AT_ONCE - 1) // AT_ONCE, (here, start, end)

    def these(step, tiles):
        return [jax.lax.dynamic_slice_in_dim(x, step * AT_ONCE, AT_ONCE) for x in tiles]

    def inside(places, ends):
        """Which of a tile's tokens are its clip's, (AT_ONCE, 1, TILE, 1)."""
        return (places[:, None] + jnp.arange(TILE) < ends[:, None])[:, None, :, None]

    def lengthened(*arrays):
        """Room for the last tile, which may reach beyond the last token."""
        return [jnp.pad(x, ((0, 0), (0, TILE), (0, 0))) for x in arrays]

    def one(x, place):
        return jax.lax.dynamic_slice_in_dim(x, place, TILE, 1)

    def take(x, places):
        return jnp.stack([one(x, places[side]) for side in range(AT_ONCE)])

    def take_clip(x, places, mine):
        """`take`, zero outside the clip: no weight of 0 may meet a neighbor's NaN."""
        return jnp.where(mine, take(x, places), 0)

    def put(x, tiles, places):
        for side in range(AT_ONCE):
            tile = tiles[side].astype(x.dtype)
            x = jax.lax.dynamic_update_slice_in_dim(x, tile, places[side], 1)
        return x

    def add(x, tiles, places, mine):
        tiles = jnp.where(mine, tiles, 0)
        for side in range(AT_ONCE):  # one after the other: both may be the same place
            tile = one(x, places[side]) + tiles[side]
            x = jax.lax.dynamic_update_slice_in_dim(x, tile, places[side], 1)
        return x

    def product(a, b):
        return jnp.matmul(a, b, preferred_element_type="float32")

    def turned(x):
        return jnp.swapaxes(x, -1, -2)

    def each_key_tile(step, starts, ends, done):
        """`done` after `step(places, mine, done)` of every key tile of the clips."""

        def body(index, done):
            places = starts + index * TILE
            # A clip with fewer tiles than the one beside it has none left: behind the tokens.
            return step(jnp.minimum(places, tokens), inside(places, ends), done)

        return jax.lax.fori_loop(0, ((ends - starts + TILE - 1) // TILE).max(), body, done)

    def forward(query, key, value, segment_ids):
        heads, _, width = query.shape
        steps, tiles = tiles_of(segment_ids)
        queries, keys, values = lengthened(query, key, value)

        def query_tiles(step, done):
            here, starts, ends = these(step, tiles)
            q = take(queries, here)

            def key_tiles(places, mine, done):
                attended, total, top = done
                k, v = take(keys, places), take_clip(values, places, mine)
                logits = jnp.where(turned(mine), product(q, turned(k)), -jnp.inf)
                new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
                weights, shrink = jnp.exp(logits - new_top), jnp.exp(top - new_top)
                attended = attended * shrink + product(weights.astype(v.dtype), v)
                return attended, total * shrink + weights.sum(-1, keepdims=True), new_top

            shape = AT_ONCE, heads, TILE
            zeros, lowest = (jnp.full((*shape, 1), number) for number in (0.0, -1e30))
            attended, total, top = each_key_tile(
                key_tiles, starts, ends, (jnp.zeros((*shape, width)), zeros, lowest)
            )
            total = jnp.where(total == 0, 1, total)  # of an empty tile
            new = attended / total, top + jnp.log(total)
            # What lies beyond the clip's end is put right by the tiles that follow.
            return tuple(put(x, tile, here) for x, tile in zip(done, new, strict=True))

        done = jnp.zeros_like(queries), jnp.zeros((*queries.shape[:2], 1), "float32")
        attended, normalizer = jax.lax.fori_loop(0, steps, query_tiles, done)
        attended = jnp.where(jnp.ravel(segment_ids)[:, None] > 0, attended[:, :tokens], 0)
        return attended, (query, key, value, segment_ids, attended, normalizer)

    def backward(saved, slope):
        query, key, value, segment_ids, attended, normalizer = saved
        steps, tiles = tiles_of(segment_ids)
        along = (slope.astype("float32") * attended).sum(-1, keepdims=True)
        queries, keys, values, slopes, along = lengthened(query, key, value, slope, along)

        def query_tiles(step, done):
            for_query, for_key, for_value = done
            here, starts, ends = these(step, tiles)
            my_queries = inside(here, ends)
            q, s = take_clip(queries, here, my_queries), take_clip(slopes, here, my_queries)
            norm, mean = take(normalizer, here), take(along, here)

            def key_tiles(places, mine, done):
                for_q, for_key, for_value = done
                k, v = take_clip(keys, places, mine), take_clip(values, places, mine)
                both = my_queries & turned(mine)
                weights = jnp.where(both, jnp.exp(product(q, turned(k)) - norm), 0)
                change = jnp.where(both, weights * (product(s, turned(v)) - mean), 0)
                weights, change = weights.astype(q.dtype), change.astype(q.dtype)
                return (
                    for_q + product(change, k),
                    add(for_key, product(turned(change), q), places, mine),
                    add(for_value, product(turned(weights), s), places, mine),
                )

            for_q, for_key, for_value = each_key_tile(
                key_tiles, starts, ends, (jnp.zeros(q.shape), for_key, for_value)
            )
            return add(for_query, for_q, here, my_queries), for_key, for_value

        done = tuple(jnp.zeros(queries.shape) for _ in range(3))
        slopes = jax.lax.fori_loop(0, steps, query_tiles, done)
        return (*(x[:, :tokens].astype(query.dtype) for x in slopes), None)

    attend = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    attend.defvjp(forward, backward)
    return attend
