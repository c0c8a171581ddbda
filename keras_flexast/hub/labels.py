"""Labels of clips, in memory or in a Dataset: checked against the classes, and weighted by them."""

import numpy as np
import tensorflow as tf

from keras_flexast.hub.preprocessing import check_waveforms
from tf_data_pipelines.pipeline import graph_code


def checked_labels(classifier, x, y=None, factors=None):
    """(x, y) of labels that fit the classes of an AudioClassifier; a Dataset has those in it.

    Args:
        classifier: AudioClassifier.
        x: clips in memory, or a Dataset.
        y: labels of the clips in memory.
        factors: {class: factor} on the weights of the clips of a Dataset; None for no factors.

    Raises:
        ValueError: labels are missing, or are not those of the classes; the message says what came
            and what was expected.
    """
    classes, multi_label = classifier.num_classes, classifier.multi_label
    if factors is not None and not isinstance(factors, dict):
        raise ValueError(f"class_weight={factors!r} must be a dictionary, {{class: factor}}.")
    if isinstance(x, tf.data.Dataset):
        return labelled(x, classes, multi_label=multi_label, factors=factors), y
    if y is None:
        raise ValueError("y is None; give the label of each clip.")
    labels = np.asarray(y)
    labels = labels.astype("float32") if labels.dtype == bool else labels
    if multi_label and labels.ndim != 2:
        raise ValueError(
            f"y has shape {labels.shape}; where clips may have several labels, expected floats "
            f"(clips, {classes})."
        )
    if labels.ndim == 2 and labels.shape[1] != classes:
        raise ValueError(f"y has {labels.shape[1]} columns for {classes} classes.")
    known = range(classes)
    wrong = [one for one in labels.tolist() if labels.ndim == 1 and one not in known]
    if labels.ndim not in (1, 2) or wrong or not np.issubdtype(labels.dtype, np.number):
        raise ValueError(
            f"y has dtype {labels.dtype}, shape {labels.shape} and values such as {wrong[:3]}; "
            f"expected integers from 0 to {classes - 1}, one for each clip."
        )
    if labels.ndim == 2 and not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("y has values outside [0, 1], or NaN; expected the share of each class.")
    return x, labels.astype("int32" if labels.ndim == 1 else "float32")


@graph_code
def labelled(dataset, num_classes, *, multi_label, factors=None):
    """A Dataset whose labels are checked while it is read, in its form.

    Args:
        dataset: Dataset of (waveform, label) or (waveform, label, weight), or of batches.
        num_classes: number of classes.
        multi_label: whether clips may have several labels: floats (..., classes).
        factors: {class: factor} on the weights of its clips; None for no factors.

    Raises:
        ValueError: the Dataset has no labels, or labels of another kind; the message says what
            came and what was expected.
    """
    spec = dataset.element_spec
    check_waveforms(spec)
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise ValueError(
            f"the Dataset gives {spec}; expected (waveform, label) or (waveform, label, weight)."
        )
    label, batch = spec[1], spec[0].shape.rank - 1
    rank = label.shape.rank
    soft = rank == batch + 1 and label.shape[-1] == num_classes
    if not soft and (multi_label or rank != batch or not label.dtype.is_integer):
        kinds = "" if multi_label else "integers (...) or "
        raise ValueError(
            f"the Dataset gives labels {label}; expected {kinds}floats (..., {num_classes}), one "
            f"for each clip."
        )
    if soft and factors is not None:
        raise ValueError(
            "class_weight needs one label for each clip. Put weights into the Dataset."
        )

    most = 1 if soft else num_classes - 1

    def checked(waveform, label, weight=None):
        good = tf.reduce_all((label >= 0) & (label <= most))
        text = ["label", label, f"of the Dataset; expected 0 to {most}."]
        with tf.control_dependencies([tf.debugging.Assert(good, text)]):
            label = tf.identity(label)
        if factors is not None:
            table = tf.constant([float(factors.get(one, 1)) for one in range(num_classes)])
            own = tf.gather(table, label)
            weight = own if weight is None else own * tf.cast(weight, tf.float32)
        return (waveform, label) if weight is None else (waveform, label, weight)

    return dataset.map(checked, tf.data.AUTOTUNE)


def class_weighted(y, sample_weight, factors):
    """Weight of each clip in memory, times the factor of its class."""
    if y.ndim != 1:
        raise ValueError("class_weight needs one label for each clip. Give sample_weight.")
    weights = np.array([factors.get(int(label), 1.0) for label in y], "float32")
    if sample_weight is not None and np.shape(sample_weight) != y.shape:
        raise ValueError(f"sample_weight has shape {np.shape(sample_weight)} for {len(y)} clips.")
    return weights if sample_weight is None else weights * np.asarray(sample_weight, "float32")
