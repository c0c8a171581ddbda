"""Waveforms to log-mel features, and to packed batches, as KerasHub's preprocessing layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from keras_flexast.hints import Shape, Tensor
from keras_flexast.hub.backbone import ASTBackbone
from keras_flexast.inference.classifier import checked_waveforms
from tf_data_pipelines.fbank import features, log_mel_sums, mean_and_std
from tf_data_pipelines.hints import PatchSize
from tf_data_pipelines.lengths import batches_per_epoch, packing_for, training_packing
from tf_data_pipelines.loading import load_waveforms
from tf_data_pipelines.packing import batch_rows, pack
from tf_data_pipelines.pipeline import (
    counted,
    evaluation_batches,
    every_clip_once,
    graph_code,
    split_batch,
    training_batches,
    training_tokens,
)
from tf_data_pipelines.settings import (
    MAX_PEAK,
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
    check_positive,
    patch_pair,
)
from tf_data_pipelines.sources import WaveformSource
from tf_data_pipelines.stages import extract_features, make_tokens

BATCH_CLIPS = 32  # as Keras has samples in a batch
MOST_CHANNELS = 8  # what a last axis of so few samples is taken for
Waveforms: TypeAlias = Sequence[ArrayLike] | np.ndarray | tf.RaggedTensor  # clips in memory


def _settings(kind, value):
    """Settings of a kind, from themselves, their dictionary or None for the defaults."""
    if value is None:
        return kind()
    return value if isinstance(value, kind) else kind.from_dict(value)


@keras.saving.register_keras_serializable(package="keras_flexast")
class ASTAudioConverter(keras_hub.layers.AudioConverter):
    """Waveforms to normalized log-mel filterbank features.

    Args:
        fbank: FbankSettings, with the mean and std of the training data; or their dictionary.
        **kwargs: as in keras.layers.Layer.

    Call arguments:
        waveforms: float (samples,) or (batch, samples), in [-1, 1], at fbank.sample_rate Hz.

    Output:
        float32 (frames, mel_bins) or (batch, frames, mel_bins).

    Example:
        converter = ASTAudioConverter(FbankSettings(mean=-4.3, std=4.6))
        converter(np.zeros((2, 16000), "float32"))  # (2, 98, 128)
    """

    backbone_cls = ASTBackbone

    def __init__(self, fbank: FbankSettings | dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fbank = _settings(FbankSettings, fbank)
        self.built = True  # it has no weights; Model.quantize asks

    def adapt(self, waveforms: Sequence[np.ndarray]) -> None:
        """Set mean and std of `fbank` to those of the log-mel values of training clips.

        Args:
            waveforms: list of float (samples,) of any lengths.
        """
        sums = log_mel_sums(self.fbank)
        clips = checked_waveforms(waveforms, self.fbank.sample_rate, self.fbank.window)
        mean, std = mean_and_std(sums(one) for one in clips)
        self.fbank = dataclasses.replace(self.fbank, mean=mean, std=std)

    def audio_shape(self) -> Shape:
        return (None, self.fbank.mel_bins)

    def call(self, waveforms: Tensor) -> Tensor:
        with tf.device("cpu"):
            found = features(tf.cast(waveforms, tf.float32), self.fbank)
        return found if not tf.executing_eagerly() else keras.ops.convert_to_tensor(found.numpy())

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "fbank": self.fbank.to_dict()}


@keras.saving.register_keras_serializable(package="keras_flexast")
class AudioClassifierPreprocessor(keras_hub.models.Preprocessor):
    """Clips of any lengths to packed batches.

    In training each clip draws one of `patches.patch_sizes`, and is augmented; elsewhere every
    clip is cut into patches of `patch_size`.

    Args:
        audio_converter: ASTAudioConverter.
        patches: PatchSettings of the training, or their dictionary.
        packing: PackSettings of rows where the clips' lengths are not known before, as of a
            tf.data.Dataset; or their dictionary.
        patch_size: int or (frequency, time), outside training; larger is faster. None for the
            base patch. It may be changed at any time.
        augment: AugmentSettings of the training, or their dictionary.
        seed: random seed of the order of the clips and of all draws.
        **kwargs: as in keras.layers.Layer.

    Call arguments:
        x: list of float waveforms (samples,) of any lengths, or (batch, samples), in [-1, 1].
        y: int (batch,), or float (batch, classes).
        sample_weight: float (batch,).

    Output:
        packed inputs of these clips, a dictionary of tensors (rows, row_length, ...); with labels
        (inputs, labels, weights), in slots (rows, segments).
    """

    backbone_cls = ASTBackbone
    audio_converter_cls = ASTAudioConverter

    def __init__(
        self,
        audio_converter: ASTAudioConverter,
        *,
        patches: PatchSettings | dict[str, Any] | None = None,
        packing: PackSettings | dict[str, Any] | None = None,
        patch_size: PatchSize | None = None,
        augment: AugmentSettings | dict[str, Any] | None = None,
        seed: int = 1337,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.built = True  # it has no weights; Model.quantize asks
        self.audio_converter = audio_converter
        self.patches = _settings(PatchSettings, patches)
        self.packing = _settings(PackSettings, packing)
        self.patch_size = patch_size
        self.augment = _settings(AugmentSettings, augment)
        self.seed = seed

    @property
    def patch_size(self) -> tuple[int, int]:
        """(frequency, time) of patches outside training."""
        return self._patch_size

    @patch_size.setter
    def patch_size(self, value: PatchSize | None) -> None:
        self._patch_size = self.patches.base_patch if value is None else patch_pair(value)

    @property
    def fbank(self) -> FbankSettings:
        """FbankSettings of the audio converter."""
        return self.audio_converter.fbank

    @property
    def evaluation_patches(self) -> PatchSettings:
        """PatchSettings outside training."""
        return self.patches.at([self.patch_size])

    def call(
        self, x: Waveforms, y: ArrayLike | None = None, sample_weight: ArrayLike | None = None
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], Tensor, Tensor]:
        packing = self.packing
        if tf.executing_eagerly():
            data = self._source(x, y, sample_weight)
            packing = packing_for(data, self.fbank, self.evaluation_patches, packing)
            clips, most = load_waveforms(data, data.sample_rate), len(data.waveforms)
        else:
            elements = tf.data.Dataset.from_tensor_slices(_element(x, y, sample_weight))
            clips = _numbered(elements, self.fbank.window)
            most = x.nrows() if isinstance(x, tf.RaggedTensor) else tf.shape(x, tf.int64)[0]
        rows = self._rows(clips, packing).batch(most)  # each of them holds a clip
        batch = split_batch(rows.get_single_element())
        inputs, labels, weights = _for_backend(batch) if tf.executing_eagerly() else batch
        return inputs if y is None else (inputs, labels, weights)

    def training_batches(
        self,
        x: Waveforms | tf.data.Dataset,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        batch_size: int | None = None,
        start: int = 0,
        steps: int | None = None,
    ) -> tuple[tf.data.Dataset, int]:
        """Endless packed batches to train on, and their number in an epoch.

        Args:
            x, y, sample_weight: clips in memory, as when called; or x is a tf.data.Dataset of
                (waveform, label) or (waveform, label, weight), or of batches of them.
            batch_size: number of clips in a batch, on average and rounded to whole rows; None for
                32. A Dataset has `packing.rows` rows in a batch.
            start: number of batches that came before, so that the draws are others.
            steps: number of batches in an epoch; None for as many as hold all clips once, rounded
                up to full batches, for which a Dataset is read once.

        Raises:
            ValueError: a clip cannot be used, or a Dataset has no end and steps is None.
        """
        if batch_size is not None:
            check_positive("batch_size", batch_size, int)
        if isinstance(x, tf.data.Dataset):
            _check_alone(y, sample_weight, batch_size)
            _check_streamed(self.augment)
            endless = x.cardinality() == tf.data.INFINITE_CARDINALITY
            if steps is None and endless:
                raise ValueError("x is a Dataset without an end; give steps_per_epoch.")
            if steps is None:
                steps = int(counted(self._streamed(x, start)).cardinality())
            if steps == 0:
                raise ValueError("x is a Dataset without clips.")
            return self._streamed(x if endless else x.repeat(), start), steps
        data = self._source(x, y, sample_weight)
        how = {"patches": self.patches, "augment": self.augment}
        how["packing"] = training_packing(
            [data], self.fbank, batch_clips=BATCH_CLIPS if batch_size is None else batch_size,
            segments=self.packing.segments, overlong=self.packing.overlong, **how,
        )  # fmt: skip
        steps = batches_per_epoch(data, self.fbank, **how) if steps is None else steps
        how |= {"seed": self.seed, "start": start}
        return training_batches(data, self.fbank, **how), steps

    def evaluation_batches(
        self,
        x: Waveforms | tf.data.Dataset,
        y: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
    ) -> tf.data.Dataset:
        """Packed batches of every clip once, without draws: (inputs, labels, weights, clip_ids).

        Args:
            x, y, sample_weight, batch_size: as in `training_batches`; clip_ids are places in x.
            steps: number of batches of a Dataset to stop after; None for all.

        Raises:
            ValueError: a clip cannot be used, or a Dataset has no end and steps is None.
        """
        patches = self.evaluation_patches
        if batch_size is not None:
            check_positive("batch_size", batch_size, int)
        if isinstance(x, tf.data.Dataset):
            _check_alone(y, sample_weight, batch_size)
            if steps is None and x.cardinality() == tf.data.INFINITE_CARDINALITY:
                raise ValueError("x is a Dataset without an end; give steps.")
            batches = every_clip_once(
                _numbered(x, self.fbank.window),
                self.fbank,
                patches=self.evaluation_patches,
                packing=self.packing,
                seed=self.seed,
            )
            return batches.take(-1 if steps is None else steps)
        data = self._source(x, y, sample_weight)
        packing = self.packing if batch_size is None else training_packing(
            [data], self.fbank, patches=patches, batch_clips=batch_size,
            segments=self.packing.segments,
        )  # fmt: skip
        packing = packing_for(data, self.fbank, self.evaluation_patches, packing)
        return evaluation_batches(
            data, self.fbank, patches=self.evaluation_patches, packing=packing, cache=True
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "patches": self.patches.to_dict(),
            "packing": self.packing.to_dict(),
            "patch_size": self.patch_size,
            "augment": self.augment.to_dict(),
            "seed": self.seed,
        }

    def waveforms(self, x: Waveforms) -> list[np.ndarray]:
        """Clips in memory as a list of float32 (samples,); an error names one that is of no use."""
        if x is None:
            raise ValueError("x is None; give the waveforms.")
        x = x.to_list() if isinstance(x, tf.RaggedTensor) else x
        limits = self.fbank.sample_rate, self.fbank.window
        if getattr(x, "ndim", None) == 1:
            return checked_waveforms(np.asarray(x), *limits)  # which refuses it
        x = [keras.ops.convert_to_numpy(one) if keras.ops.is_tensor(one) else one for one in x]
        x = [np.asarray(one, "float32") if isinstance(one, list) else one for one in x]
        return checked_waveforms(x, *limits)

    def _source(self, x, y=None, sample_weight=None):
        """The WaveformSource of clips in memory."""
        rate = self.fbank.sample_rate
        return WaveformSource(self.waveforms(x), rate, labels=y, weights=sample_weight)

    def _rows(self, clips, packing):
        """Rows of clips at `patch_size`."""
        clips = extract_features(clips, self.fbank)
        return pack(
            make_tokens(clips, self.evaluation_patches, seed=self.seed, packing=packing), packing
        )

    @graph_code
    def _streamed(self, dataset, start):
        """Training batches of a Dataset of clips, drawn anew for each clip that comes."""
        clips = _numbered(dataset, self.fbank.window)
        draws = tf.data.Dataset.random((self.seed + start) % 2**31)
        first = start * self.patches.clips_per_draw

        def drawn(clip, draw):
            return {**clip, "epoch": draw, "place": clip["clip_id"] + first}

        clips = training_tokens(
            tf.data.Dataset.zip(clips, draws).map(drawn), self.fbank, patches=self.patches,
            packing=self.packing, augment=self.augment, seed=self.seed, longest=0,
        )  # fmt: skip
        batches = batch_rows(pack(clips, self.packing), self.packing)
        return batches.map(split_batch).prefetch(tf.data.AUTOTUNE)


def _element(x, y, sample_weight):
    return tuple(one for one in (x, y, sample_weight) if one is not None)


@graph_code
def _numbered(dataset, shortest):
    """A Dataset of clips or of batches of them as dictionaries, with `clip_id` counted.

    A clip of fewer samples than `shortest`, or of NaN, stops whoever reads it.
    """
    if check_waveforms(dataset.element_spec) == 2:
        dataset = dataset.unbatch()

    def named(number, element):
        element = element if isinstance(element, tuple) else (element,)
        names = ("waveform", "label", "weight")
        clip = {"label": tf.constant(0), **dict(zip(names, element, strict=False))}
        clip["waveform"] = tf.cast(clip["waveform"], tf.float32)
        integer = clip["label"].dtype.is_integer
        clip["label"] = tf.cast(clip["label"], tf.int32 if integer else tf.float32)
        if "weight" in clip:
            clip["weight"] = tf.cast(clip["weight"], tf.float32)
        usable = [
            tf.debugging.Assert(good, ["clip", number, f"of the Dataset {fault}"])
            for good, fault in (
                (
                    tf.size(clip["waveform"]) >= shortest,
                    f"is shorter than the window of a frame, {shortest} samples.",
                ),
                (
                    tf.reduce_all(tf.abs(clip["waveform"]) <= MAX_PEAK),
                    f"has NaN or samples beyond {MAX_PEAK:g}; expected floats in [-1, 1].",
                ),
            )
        ]
        with tf.control_dependencies(usable):
            return {**clip, "clip_id": tf.identity(number)}

    return dataset.enumerate().map(named, tf.data.AUTOTUNE)


def check_waveforms(spec):
    """The rank of a Dataset's waveforms; a ValueError where it gives something else."""
    first = spec[0] if isinstance(spec, tuple) else spec
    shape, dtype = getattr(first, "shape", None), getattr(first, "dtype", None)
    if dtype is None or shape.rank not in (1, 2) or not dtype.is_floating:
        raise ValueError(
            f"the Dataset gives {first}; expected waveforms of floats in [-1, 1], (samples,) or "
            f"(batch, samples), and labels beside them. Divide 16-bit integers by 32768."
        )
    alone = isinstance(spec, tuple) and len(spec) > 1 and spec[1].shape.rank == 0
    if shape.rank == 2 and (alone or (shape[1] or MOST_CHANNELS + 1) <= MOST_CHANNELS):
        raise ValueError(
            f"the Dataset gives {first}, as (samples, channels); expected (samples,), one channel, "
            f"or (batch, samples). Take the mean of the channels."
        )
    return shape.rank


def _for_backend(batch):
    """A packed batch of TensorFlow's tensors as the backend's own."""
    return keras.tree.map_structure(lambda one: keras.ops.convert_to_tensor(one.numpy()), batch)


def _check_alone(y, sample_weight, batch_size):
    """Raise where a Dataset comes with what it holds itself, as Keras does."""
    given = {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}
    given = [name for name, value in given.items() if value is not None]
    if given:
        raise ValueError(
            f"x is a tf.data.Dataset, so {', '.join(given)} cannot be given: put labels and "
            f"weights into it; a batch has packing.rows rows of the preprocessor."
        )


def _check_streamed(augment):
    """Raise where augmentation needs all clips, and a Dataset gives one after the other."""
    used = [name for name in ("mixup", "fill_ms", "balanced") if getattr(augment, name)]
    if used:
        raise ValueError(
            f"augment.{used[0]} needs clips in memory. Give lists of waveforms and labels, or "
            f"leave it out."
        )
