"""Clips of any lengths in waveforms of one length: what a phone runs, in static shapes.

The rest of a waveform is not heard: frames that reach beyond the clip are zeros, and patches that
a clip of its length does not have are masked in attention and pooling. So the scores are the run's
for the clip alone, for every policy of the patch grid.
"""

import keras
import numpy as np
from keras import ops

from tf_data_pipelines.settings import patch_pair

HIDDEN = -1e9  # added to the products with a key that no query may see


class PaddedScoring:
    """Two stages from `tf_data_pipelines.fbank.padded_features` to scores, in TensorFlow.

    The second takes what the first gives; the batch is the first axis.

    Args:
        run: Run.
        patch_size: int or (frequency, time), not larger than the spectrogram.
        frame_shift_ms: frame shift in milliseconds; None for the filterbank's own.
    """

    def __init__(self, run, patch_size, frame_shift_ms=None):
        self.run = run
        self.model = run.model
        self.patches = run.patches_at([patch_pair(patch_size)])
        _, self.frame_shift_scale = run.front_end(frame_shift_ms)

    def cut(self, features, frames):
        """The patches of the clips.

        Args:
            features: float32 (batch, all frames, mel_bins), zeros after a clip's frames.
            frames: int32 (batch,), number of frames of each clip.

        Returns:
            {"patches": float32 (batch, tokens, p_f, p_t), "places": float32 (batch, tokens,
            dim), their position embeddings, "segment_ids": int32 (batch, tokens), 0 for
            patches that the clip does not have}.
        """
        from tf_data_pipelines.patches import padded_patches

        patches, positions, segment_ids = padded_patches(
            features, frames, self.patches, frame_shift_scale=self.frame_shift_scale
        )
        places = self.model.backbone.position_embed(positions)
        return {"patches": patches, "places": places, "segment_ids": segment_ids}

    def score(self, patches, places, segment_ids):
        """Scores of the clips, {"scores": float32 (batch, classes)}."""
        import tensorflow as tf

        model, backbone = self.model, self.model.backbone
        x = backbone.patch_embed(patches, resize=self.patches.resize) + places
        if backbone.prefix is not None:
            x = backbone.prefix(x)
        first = backbone.prefix_tokens
        segment_ids = tf.pad(segment_ids, [[0, 0], [first, 0]], constant_values=1)
        bias = HIDDEN * tf.cast(1 - segment_ids, x.dtype)[:, None, None]
        for block in backbone.blocks:
            x = _encode(block, x, bias)
        x = backbone.norm(x)
        if model.pooling_name == "attention":
            pooled = model.pooling(x, segment_ids)
        else:
            positions = np.ones((1, x.shape[1], 4), "float32")
            positions[:, :first] = 0  # extent 0 marks prefix tokens; pooling asks for no more
            pooled = model.pooling(x, tf.constant(positions), segment_ids)
        logits = model.head(model.head_norm(pooled[:, :1]))[:, 0]
        return {"scores": (tf.nn.sigmoid if self.run.multi_label else tf.nn.softmax)(logits)}


def _encode(block, x, bias):
    """An EncoderBlock on rows of one clip each.

    A row has one border, so a bias on the keys hides what lies behind it. That is one addition
    where the kernels' masks, for rows of many clips, are a dozen slow operations on a phone.

    Args:
        block: EncoderBlock.
        x: float (batch, tokens, dim).
        bias: float (batch, 1, 1, tokens), added to the query-key products.
    """
    attention, normed = block.self_attention, block.attention_norm(x)
    heads = (*x.shape[1:2], attention.num_heads, x.shape[2] // attention.num_heads)
    query, key, value = (
        ops.reshape(dense(normed), (-1, *heads))
        for dense in (attention.query_dense, attention.key_dense, attention.value_dense)
    )
    attended = ops.dot_product_attention(query, key, value, bias=bias, scale=attention.scale)
    x = x + attention.output_dense(ops.reshape(attended, (-1, *x.shape[1:])))
    hidden = keras.activations.gelu(block.mlp_hidden(block.mlp_norm(x)), approximate=False)
    return x + block.mlp_output(hidden)
