"""The front end that a published model was trained with."""

import dataclasses

from keras_flexast.conversion.weight_names import IMAGE_FAMILIES
from tf_data_pipelines.settings import FbankSettings

AUDIOSET_CLASSES = 527

# Mean and std of log-mel over the papers' data sets, by family and number of classes.
_STATISTICS = {
    "elasticast": {
        AUDIOSET_CLASSES: ("AudioSet", -4.414, 4.905),
        309: ("VGGSound", -5.08, 4.453),
        1251: ("VoxCeleb1", -5.842545, 3.88305),
    },
    "": {
        AUDIOSET_CLASSES: ("AudioSet", -4.2677393, 4.5689974),
        309: ("VGGSound", -5.0767093, 4.4533687),
        50: ("ESC-50", -6.6268077, 5.358466),
        35: ("Speech Commands v2", -6.845978, 5.5654526),
        1251: ("VoxCeleb1", -3.7614744, 4.2011642),
    },
}


def front_end(parts, names, *, mean, std):
    """FbankSettings that a checkpoint was trained with.

    Args:
        parts: ModelParts.
        names: WeightNames; an assumption is added to its notes.
        mean, std: the user's mean and standard deviation of log-mel, or None.

    Returns:
        FbankSettings.
    """
    features = {} if names.family in IMAGE_FAMILIES else names.checkpoint.features
    values = {"mel_bins": parts.options["mel_bins"]}
    if features:
        is_normalized = features.get("do_normalize", True)
        values.update(
            mean=features.get("mean", FbankSettings.mean) if is_normalized else 0.0,
            std=features.get("std", FbankSettings.std) if is_normalized else 0.5,
            sample_rate=features.get("sampling_rate", FbankSettings.sample_rate),
            remove_clip_mean=False,  # Hugging Face's extractor does not
        )
    elif mean is None or std is None:
        known = _STATISTICS.get(names.family, _STATISTICS[""])
        classes = parts.classes or AUDIOSET_CLASSES
        if classes in known:
            data, values["mean"], values["std"] = known[classes]
            names.notes.append(f"mean and std of log-mel are those of {data}")
        else:
            names.notes.append(
                "mean and std of log-mel are those of AudioSet; give --mean and --std of the "
                "training data, which flexast stats measures"
            )
    values.update({k: v for k, v in (("mean", mean), ("std", std)) if v is not None})
    fbank = FbankSettings(**values)
    if parts.frames is None:
        return fbank
    return dataclasses.replace(fbank, clip_ms=parts.frames * fbank.frame_shift_ms)
