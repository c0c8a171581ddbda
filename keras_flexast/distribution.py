"""Several devices: sums over a batch that they share, and where a spread model's weights lie."""

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def data_parallel(devices: int) -> Iterator[None]:
    """Share the rows of each batch among devices of this host, for models made in this context.

    Args:
        devices: number of devices, the first GPUs of this host, or CPUs where it has none; 1
            changes nothing.

    Raises:
        ValueError: this host has fewer, or batches are shared already.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        found = [one.name for one in found]
    else:
        found = keras.distribution.list_devices()
    if type(devices) is not int or not 1 <= devices <= len(found):
        raise ValueError(
            f"devices={devices!r} must be an int from 1 to {len(found)}, the number of devices "
            f"that {keras.backend.backend()} finds here: {', '.join(found)}."
        )
    if devices > 1 and batch_devices() > 1:
        raise ValueError(
            f"devices={devices}, but batches are already shared among {batch_devices()} devices "
            f"here. Leave one of the two out."
        )
    if devices == 1:
        yield
    elif keras.backend.backend() == "tensorflow":
        with tf.distribute.MirroredStrategy(found[:devices]).scope():
            yield
    else:
        before = keras.distribution.distribution()
        shared = keras.distribution.DataParallel(devices=found[:devices])
        keras.distribution.set_distribution(shared)
        try:
            yield
        finally:
            keras.distribution.set_distribution(before)


def batch_devices():
    """How many devices share the rows of a batch: those of JAX, or of a tf.distribute strategy."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.distribute.get_strategy().num_replicas_in_sync
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    return max(1, distribution.num_model_replicas // distribution.num_processes)


def check_devices(packing):
    """Raise a ValueError where the devices cannot share the rows of a batch evenly."""
    devices = batch_devices()
    if packing.rows % devices:
        raise ValueError(
            f"devices={devices} cannot share the {packing.rows} rows of a batch of this training "
            f"evenly. Resume it on as many devices as before, or on a number that divides them."
        )


def sum_over_devices(*values):
    """Sums of what the devices of a tf.distribute strategy hold, and the number of devices.

    On JAX every value is that of the whole batch already.

    Args:
        *values: float scalars, such as the sum of the losses of this device's clips.

    Returns:
        the sums, then the number of devices that were added up.
    """
    devices = 1
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        replica = tf.distribute.get_replica_context()  # None while Keras builds the model
        devices = 1 if replica is None else replica.num_replicas_in_sync
        if devices > 1:
            values = replica.all_reduce(tf.distribute.ReduceOp.SUM, list(values))
    return *values, devices
