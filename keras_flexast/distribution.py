"""Where the weights of a block lie when one model is spread over several devices (JAX)."""

import keras

SPLIT_OUTPUTS = r"block_\d+/(attention/(query|key|value)|mlp_hidden)"
SPLIT_INPUTS = r"block_\d+/(attention/output|mlp_output)"


def layout_map(mesh, axis="model"):
    """The blocks' matrices split over a mesh axis, as in Megatron, with two all-reduces per block.

    Heads and hidden units are divided among the devices of the axis; everything else is on
    each of them.

    Args:
        mesh: keras.distribution.DeviceMesh whose `axis` divides the number of heads.
        axis: name of the mesh axis.

    Returns:
        keras.distribution.LayoutMap for keras.distribution.ModelParallel.

    Example:
        mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"))
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layout_map(mesh), batch_dim_name="batch")
        )
        model = FlexiAST(10)  # made after it

    Reference: Shoeybi et al. 2019 (arXiv:1909.08053).
    """
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[f"{SPLIT_OUTPUTS}/kernel"] = (None, axis)
    layouts[f"{SPLIT_OUTPUTS}/bias"] = (axis,)
    layouts[f"{SPLIT_INPUTS}/kernel"] = (axis, None)
    return layouts
