"""The papers' reference numbers in tests/data, and their weights in our models."""

import pathlib

import numpy as np

import keras_flexast

DATA = pathlib.Path(__file__).parent / "data"
SMALL = {"size": None, "dim": 48, "depth": 2, "num_heads": 3}


def load(name):
    """Arrays of one file, and its weights under the papers' names."""
    with np.load(DATA / f"{name}.npz") as archive:
        arrays = dict(archive)
    prefix = "weights/"
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return arrays, weights


def sizes(arrays, kind):
    """{(p_f, p_t): array} of the keys KIND/PFxPT."""
    keys = [key for key in arrays if key.startswith(f"{kind}/")]
    return {tuple(map(int, key.split("/")[1].split("x"))): arrays[key] for key in keys}


def base_kernel(weights):
    """(16, 16, dim), frequency first."""
    return np.moveaxis(weights["patch_embed.proj.weight"][:, 0], 0, 2)


def flexiast(weights):
    """The FlexiAST authors' model, 256 frames by 128 mel bins."""
    tokens = [weights[f"v.{n}_token"][0, 0] for n in ("cls", "dist") if f"v.{n}_token" in weights]
    prefix = len(tokens)
    model = keras_flexast.FlexiAST(
        7,
        pooling=("cls", "cls_distillation")[prefix - 1],
        grid=(8, 16),
        remainder="crop",
        position="grid",
        **SMALL,
    )
    table = weights["pos_embed.pos_embed"][0]
    put(model, "patch_embed", base_kernel(weights), weights["patch_embed.proj.bias"])
    put(model, "position_embed", table[prefix:].reshape(8, 16, 48))
    put(model, "prefix_tokens", np.stack(tokens) + table[:prefix])
    put_encoder(model, weights, "v.blocks.{}.", "v.norm.", "mlp_head.0.", "mlp_head.1.")
    return model


def elasticast(weights):
    """The ElasticAST authors' model; its attention is unscaled."""
    model = keras_flexast.ElasticAST(7, grid=(8, 32), attention_scale=1.0, segments=7, **SMALL)
    kernel = weights["patch_embed.0.weight"].T.reshape(16, 16, 48)
    put(model, "patch_embed", kernel, weights["patch_embed.0.bias"])
    put(model, "position_embed", weights["pos_embed_freq"], weights["pos_embed_time"])
    put_encoder(model, weights, "blocks.modules_list.{}.", "norm.", "mlp_norm.", "head.")
    put_attention(model.get_layer("pooling"), weights, "attn_pool.")
    model.get_layer("pooling").query.assign(weights["attn_pool_queries"])
    return model


def put(model, layer, *values):
    model.get_layer(layer).set_weights(values)


def put_encoder(model, weights, block, norm, head_norm, head):
    def both(name):
        return weights[f"{name}weight"].T, weights[f"{name}bias"]

    for index in range(2):
        layer, prefix = model.get_layer(f"block_{index}"), block.format(index)
        layer.attention_norm.set_weights(both(prefix + "norm1."))
        layer.mlp_norm.set_weights(both(prefix + "norm2."))
        layer.mlp_hidden.set_weights(both(prefix + "mlp.fc1."))
        layer.mlp_output.set_weights(both(prefix + "mlp.fc2."))
        put_attention(layer.attention, weights, prefix + "attn.")
    put(model, "norm", *both(norm))
    put(model, "head_norm", *both(head_norm))
    put(model, "head", *both(head))


def put_attention(layer, weights, prefix):
    names = ("qkv",) if f"{prefix}qkv.weight" in weights else ("to_q", "to_kv")
    kernel = np.concatenate([weights[f"{prefix}{name}.weight"] for name in names])
    bias = np.concatenate([weights[f"{prefix}{name}.bias"] for name in names])
    denses = (layer.query_dense, layer.key_dense, layer.value_dense)
    for dense, k, b in zip(denses, np.split(kernel, 3), np.split(bias, 3), strict=True):
        dense.set_weights([k.T, b])
    layer.output_dense.set_weights(
        [weights[f"{prefix}proj.weight"].T, weights[f"{prefix}proj.bias"]]
    )
