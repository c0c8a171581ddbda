"""Memory of a training step for each token, worked out: what the forward pass keeps.

KERAS_BACKEND=jax python bytes_per_token.py [--row-length 2048]

The arrays that JAX hands from the forward to the backward pass are counted, in bfloat16, without
running anything; so no GPU is needed. XLA keeps fewer where it computes some again. Weights,
gradients, the two averages of AdamW and the weights in bfloat16 take 18 bytes for each weight,
whatever the batch.
"""

import argparse
import math

import jax
from rich.console import Console
from rich.table import Table

from keras_flexast import ElasticAST

SIZES = "tiny", "small", "base"
CLIP = 400  # tokens
CARDS = 16, 24, 40, 80  # GiB
ROOM = 0.8  # of a card, for what is counted here


def kept(size, attention, row_length, remat=False):
    """Bytes that the forward pass keeps for each token, and the number of weights."""
    model = ElasticAST(
        10, size=size, attention=attention, remat=remat, dtype="mixed_bfloat16",
        segments=math.ceil(row_length / CLIP),
    )  # fmt: skip
    weights = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]

    def residuals(weights, inputs):
        def forward(weights):
            return model.stateless_call(weights, frozen, inputs, training=True)[0]

        return jax.vjp(forward, weights)[1]

    def total(rows):
        inputs = {
            "tokens": jax.ShapeDtypeStruct((rows, row_length, 256), "float32"),
            "positions": jax.ShapeDtypeStruct((rows, row_length, 4), "float32"),
            "segment_ids": jax.ShapeDtypeStruct((rows, row_length), "int32"),
        }
        saved = jax.tree.leaves(jax.eval_shape(residuals, weights, inputs))
        return sum(math.prod(one.shape) * one.dtype.itemsize for one in saved)

    return (total(2) - total(1)) / row_length, model.count_params()  # without the weights


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row-length", type=int, default=2048)
    length = parser.parse_args().row_length
    console = Console(width=120)
    table = Table(
        "", "clip by clip", "and --remat", "dense mask", *(f"{card} GiB" for card in CARDS),
        title=f"KiB a token in rows of {length:,}; --batch-tokens that fit a card, clip by clip",
    )  # fmt: skip
    for size in SIZES:
        costs = [kept(size, "clip_triton", length), kept(size, "clip_triton", length, remat=True),
                 kept(size, "dense", length)]  # fmt: skip
        (cost, weights), *_ = costs
        fit = [(ROOM * card * 2**30 - 18 * weights) / cost for card in CARDS]
        fit = [f"{int(tokens // length * length):,}" for tokens in fit]
        table.add_row(size, *(f"{one / 1024:.0f}" for one, _ in costs), *fit)
    console.print(table)


if __name__ == "__main__":
    main()
