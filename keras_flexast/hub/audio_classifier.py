"""The task: fit and predict on raw waveforms of any lengths."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

import keras
import keras_hub
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from keras_flexast.conversion import convert_run
from keras_flexast.files import PRESET, RUN, atomic_folder
from keras_flexast.hints import Tensor
from keras_flexast.hub.backbone import ASTBackbone
from keras_flexast.hub.labels import checked_labels, class_weighted
from keras_flexast.hub.preprocessing import (
    ASTAudioConverter,
    AudioClassifierPreprocessor,
    Waveforms,
)
from keras_flexast.hub.presets import HUB, PRESETS, is_backbone, is_published, untrained_run
from keras_flexast.inference.scoring import ClipPredictor, PackedPredictor, check_finite
from keras_flexast.losses import PackedAccuracy, PackedLoss
from keras_flexast.models import (
    PackedAST,
    export_options,
    made_with_policy,
    policy_of,
    pooled_clips,
    pooling_layer,
)
from keras_flexast.optimizers import jit_compile, scaled
from keras_flexast.runs import Run, load_run, save_run, versions
from keras_flexast.settings import POOLINGS
from tf_data_pipelines.hints import PathLike
from tf_data_pipelines.pipeline import counted
from tf_data_pipelines.settings import PATCH_SIZES, PackSettings, check_choice, check_positive

ACTIVATIONS = ("softmax", "sigmoid", None)
LEARNING_RATE = 5e-5  # KerasHub's default, for weights that are trained already
# What fit, evaluate and predict take; the last without a preprocessor: one packed batch.
Clips: TypeAlias = Waveforms | tf.data.Dataset | dict[str, Tensor]


@keras.saving.register_keras_serializable(package="keras_flexast")
class AudioClassifier(keras_hub.models.Task):
    """Audio classification on raw waveforms of any lengths, in KerasHub's manner.

    `fit`, `evaluate` and `predict` take a list of waveforms, one array of equally long ones, a
    tf.RaggedTensor, or a tf.data.Dataset of clips or of batches of them. The preprocessor packs
    the clips into rows; with `preprocessor=None` the model takes packed batches. Zeros at the end
    of a clip are heard as silence: batch clips of a Dataset with `ragged_batch`.

    A `.keras` file keeps the optimizer and whether the whole backbone is frozen. Frozen layers in
    it are free after loading, and LoRA is merged: freeze them, or enable it, again.

    Args:
        backbone: ASTBackbone.
        num_classes: number of classes.
        preprocessor: AudioClassifierPreprocessor, or None.
        pooling: "attention", "cls", "cls_distillation" or "mean", as in PackedAST; it must fit the
            backbone's prefix tokens.
        activation: "softmax", "sigmoid" where clips may have several labels, or None for logits.
        multi_label: whether clips may have several labels; None where activation is "sigmoid".
        dropout: dropout rate before the last layer.
        segments: clip slots in a row.
        head_norm_epsilon: epsilon of the head's LayerNorm.
        head_dtype: dtype policy of pooling and norm; None for the backbone's. The last layer
            computes in float32.
        classes: names of the classes; None for "0", "1", ...
        **kwargs: name, trainable and compile, as in keras_hub.models.Task.

    Call arguments:
        inputs: packed batch, as for PackedBackbone.

    Output:
        scores, or logits, float32 (rows, segments, num_classes).

    Example:
        classifier = AudioClassifier.from_preset("run", num_classes=3)
        classifier.fit([waveform_1, waveform_2], [0, 2], epochs=3)
        classifier.predict([waveform_3])  # (1, 3)

    Reference: FlexiAST, Feng et al. 2023 (arXiv:2307.09286); ElasticAST, Feng et al. 2024
    (arXiv:2407.08691).
    """

    backbone_cls = ASTBackbone
    preprocessor_cls = AudioClassifierPreprocessor
    presets = PRESETS

    def __init__(
        self,
        backbone: ASTBackbone,
        num_classes: int,
        preprocessor: AudioClassifierPreprocessor | None = None,
        *,
        pooling: str = "attention",
        activation: str | None = "softmax",
        multi_label: bool | None = None,
        dropout: float = 0.0,
        segments: int = 16,
        head_norm_epsilon: float = 1e-6,
        head_dtype: str | keras.DTypePolicy | None = None,
        classes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_positive("num_classes", num_classes, int)
        check_choice("pooling", pooling, tuple(POOLINGS))
        check_choice("activation", activation, ACTIVATIONS)
        if pooling.startswith("cls") and backbone.prefix_tokens != POOLINGS[pooling]:
            raise ValueError(
                f"pooling={pooling!r} needs a backbone of {POOLINGS[pooling]} prefix tokens; this "
                f"one has {backbone.prefix_tokens}."
            )
        unknown = sorted(set(kwargs) - {"name", "trainable", "compile"})
        if unknown:
            raise ValueError(
                f"AudioClassifier has no argument {', '.join(unknown)}. Patch size, features and "
                f"augmentation belong to the preprocessor."
            )
        if multi_label is None:
            multi_label = activation == "sigmoid"
        if activation and multi_label != (activation == "sigmoid"):
            raise ValueError(
                f"activation={activation!r} contradicts multi_label={multi_label}: scores of "
                f"several labels are sigmoid, of one label softmax."
            )
        classes = tuple(map(str, range(num_classes) if classes is None else classes))
        if len(classes) != num_classes:
            raise ValueError(f"classes has {len(classes)} names for num_classes={num_classes}.")
        head_dtype = head_dtype or backbone.patch_embed.dtype_policy

        # === Layers ===
        self.backbone = backbone
        self.segments = segments
        self.preprocessor = preprocessor
        self.pooler = pooling_layer(backbone, pooling, segments, dtype=head_dtype)
        self.head_norm = keras.layers.LayerNormalization(
            epsilon=head_norm_epsilon, dtype=head_dtype, name="head_norm"
        )
        self.output_dropout = keras.layers.Dropout(dropout, dtype=head_dtype, name="output_dropout")
        self.output_dense = keras.layers.Dense(
            num_classes, activation=activation, dtype="float32", name="predictions"
        )

        # === Functional model ===
        self.activation, self.multi_label = activation, multi_label  # `compile` asks for them
        inputs = backbone.input
        x = pooled_clips(self.pooler, backbone(inputs), inputs)
        x = self.output_dropout(self.head_norm(x))
        super().__init__(inputs=inputs, outputs=self.output_dense(x), **kwargs)

        # === Config ===
        self.num_classes = num_classes
        self.pooling = pooling
        self.dropout = dropout
        self.head_norm_epsilon = head_norm_epsilon
        self.head_dtype = head_dtype
        self.classes = classes
        self._of_run: dict[str, Any] = {}  # what else it keeps of a run

    @property
    def preprocessor(self) -> AudioClassifierPreprocessor | None:
        """AudioClassifierPreprocessor of raw waveforms; None for packed batches."""
        return getattr(self, "_preprocessor", None)

    @preprocessor.setter
    def preprocessor(self, value: AudioClassifierPreprocessor | None) -> None:
        if value is not None:
            _check_fits(value, self.backbone, self.segments)
        self._preprocessor = value

    def get_config(self) -> dict[str, Any]:
        names = ("num_classes", "pooling", "activation", "multi_label", "dropout", "segments")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in (*names, "head_norm_epsilon")},
            "head_dtype": policy_of(self, self.head_dtype),
            "classes": list(self.classes),
            "of_run": {  # plain copies: Keras tracks the lists of an attribute
                name: [*value] if isinstance(value, list) else value
                for name, value in self._of_run.items()
            },
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        make, config = super().from_config, {**config}
        of_run = config.pop("of_run", {})
        made = made_with_policy(lambda **config: make(config), config, "head_dtype")
        made._of_run = of_run
        return made

    # === Presets and runs ===

    @classmethod
    def from_preset(cls, preset: PathLike, load_weights: bool = True, **kwargs: Any) -> Self:
        """A classifier from what is stored somewhere.

        Args:
            preset: folder of a run (`flexast train`, `flexast convert`), or of a preset that
                `save_to_preset` wrote; "hf://..." or "kaggle://..." of such a preset; name of an
                AST on the Hugging Face hub, such as MIT/ast-finetuned-audioset-10-10-0.4593, or
                its folder; or a name of `PRESETS`, which have no weights.
            load_weights: whether to load the weights, or else to draw new ones.
            **kwargs: other arguments than the preset's, such as num_classes, which starts a new
                head, dropout or dtype.

        Returns:
            AudioClassifier, compiled.

        Raises:
            FileNotFoundError, ImportError, OSError, ValueError: there is no such preset, or it
                holds something else; the message says what was expected.
        """
        preset = os.fspath(preset)
        if preset in PRESETS:
            _check_untrained(preset, load_weights, kwargs)
            run = untrained_run(preset, kwargs["num_classes"], kwargs.get("classes"))
            return cls.from_run(run, **{"classes": run.classes, **kwargs})
        folder = pathlib.Path(preset)
        if RUN.is_whole(folder):
            return cls.from_run(load_run(folder), load_weights=load_weights, **kwargs)
        if is_published(preset):
            run = convert_run(preset.removeprefix(HUB)).run
            return cls.from_run(run, load_weights=load_weights, **kwargs)
        if is_backbone(folder) and "num_classes" in kwargs:  # a new task on an encoder
            backbone = ASTBackbone.from_preset(
                preset, load_weights, dtype=kwargs.pop("dtype", None)
            )
            own = AudioClassifierPreprocessor(
                ASTAudioConverter(), patches=backbone.patch_settings(PATCH_SIZES),
                packing=PackSettings(segments=kwargs.get("segments", PackSettings().segments)),
            )  # fmt: skip
            return cls(backbone, **{"preprocessor": own, **kwargs})
        if folder.is_dir() and not PRESET.is_whole(folder):
            raise ValueError(
                f"{preset} is neither a run (model.keras, settings.json) nor a preset "
                f"(config.json, task.json). `flexast train` writes a run, `save_to_preset` a "
                f"preset; for the preset of an ASTBackbone alone, pass num_classes."
            )
        remote = "://" in preset
        if not remote and not folder.exists():
            raise FileNotFoundError(
                f"preset={preset!r} is no folder here, and no name of {', '.join(PRESETS)}."
            )
        if "num_classes" in kwargs:
            kwargs.setdefault("classes", None)
        try:
            return super().from_preset(preset, load_weights=load_weights, **kwargs)
        except Exception as error:  # whatever the network, the hub or the name met
            if not remote:
                raise
            raise FileNotFoundError(f"no hub gave the preset {preset}: {error}") from error

    @classmethod
    def from_run(cls, run: Run, load_weights: bool = True, **kwargs: Any) -> Self:
        """A classifier with the weights and settings of a Run.

        Args:
            run: Run.
            load_weights, **kwargs: as in `from_preset`.
        """
        model, dtype = run.model, kwargs.pop("dtype", None)
        config = model.backbone.get_config()
        backbone = ASTBackbone.from_config({**config, "dtype": dtype} if dtype else config)
        segments = kwargs.get("segments", model.segments)
        packing = dataclasses.replace(run.packing, segments=segments)
        options = {
            "preprocessor": AudioClassifierPreprocessor(
                ASTAudioConverter(run.fbank), patches=run.patches, packing=packing
            ),
            "num_classes": model.num_classes,
            "pooling": model.pooling_name,
            "activation": "sigmoid" if run.multi_label else "softmax",
            "multi_label": run.multi_label,
            "segments": model.segments,
            "head_norm_epsilon": model.head_norm_epsilon,
            "classes": run.classes,
        }
        if "num_classes" in kwargs:
            options["classes"] = None
        classifier = cls(backbone, **{**options, **kwargs})
        if load_weights:
            same_pooling = classifier.pooling == model.pooling_name  # another one starts anew
            for ours, theirs in classifier._parts(
                model, pooling=same_pooling, head=same_pooling and "num_classes" not in kwargs
            ):
                _copy_weights(theirs, ours)
        classifier._of_run = {"shares": [*run.shares], "clip_seconds": run.clip_seconds}
        return classifier

    def to_run(self) -> Run:
        """The classifier as a Run, which `flexast` evaluates, exports and serves."""
        preprocessor = self.preprocessor
        if preprocessor is None:
            raise ValueError("to_run needs a preprocessor, and this classifier has none.")
        if any(one.quantization_mode for one in self._flatten_layers()):
            raise ValueError(
                "to_run needs the float weights, and this classifier is quantized. Call it before "
                "quantize; export_run(run, precisions=...) quantizes for phones."
            )
        patches, fbank = preprocessor.patches, preprocessor.fbank
        config = {**self.backbone.get_config(), "dtype": "float32", "name": None}
        model = PackedAST(
            self.num_classes, pooling=self.pooling, segments=self.segments,
            head_norm_epsilon=self.head_norm_epsilon, mel_bins=fbank.mel_bins,
            stride=patches.stride, remainder=patches.remainder, position=patches.position, **config,
        )  # fmt: skip
        for ours, theirs in self._parts(model):
            _copy_weights(ours, theirs)  # of LoRA merged
        return Run(
            model,
            fbank,
            patches=patches,
            packing=preprocessor.packing,
            classes=self.classes,
            multi_label=self.multi_label,
            **self._of_run,
            made_by={"command": "AudioClassifier.to_run", "versions": versions()},
        )

    def save_to_run(self, folder: PathLike, overwrite: bool = False) -> None:
        """Write the classifier as a run; the folder appears whole or not at all."""
        run = self.to_run()
        with atomic_folder(folder, overwrite, kind=RUN) as partial:
            save_run(run, partial)

    def save_to_preset(self, preset_dir: PathLike, max_shard_size: float = 10) -> None:
        """Write the classifier as a KerasHub preset with a model card; a preset is replaced.

        Args:
            preset_dir: folder of the preset.
            max_shard_size: largest file of weights in GB.
        """
        with atomic_folder(preset_dir, True, kind=PRESET) as partial:
            with _without_optimizer(self):
                super().save_to_preset(str(partial), max_shard_size=max_shard_size)
            (partial / "README.md").write_text(self._card(), encoding="utf-8")

    def load_task_weights(self, filepath: PathLike) -> None:
        """Load the weights of pooling and head, see keras_hub.models.Task."""
        with _without_optimizer(self):
            super().load_task_weights(filepath)

    def _parts(self, model, pooling=True, head=True):
        """Pairs of layers with the same weights: of this classifier, and of a PackedAST."""
        pairs = [(self.backbone, model.backbone)]
        if pooling:
            pairs += [(self.pooler, model.pooling), (self.head_norm, model.head_norm)]
        return [*pairs, (self.output_dense, model.head)] if head else pairs

    def _card(self):
        """A model card for the Hugging Face hub."""
        hears = ""
        if self.preprocessor is not None:
            sizes = ", ".join(f"{f}x{t}" for f, t in self.preprocessor.patches.patch_sizes)
            rate = self.preprocessor.fbank.sample_rate
            hears = f"Waveforms of {rate} Hz; patch sizes {sizes}.\n\n"
        names = "".join(f"- {name}\n" for name in self.classes[:50])
        more = f"- and {len(self.classes) - 50} more\n" if len(self.classes) > 50 else ""
        return (
            "---\nlibrary_name: keras-hub\npipeline_tag: audio-classification\ntags:\n- keras\n"
            "- audio-classification\n---\n\n"
            f"Audio classifier of {self.num_classes} classes, {self.count_params():,} weights, by "
            f"keras-flexast.\n\n{hears}```python\nfrom keras_flexast.hub import AudioClassifier\n\n"
            'classifier = AudioClassifier.from_preset("hf://USER/NAME")\n'
            "scores = classifier.predict([waveform])\n```\n\n"
            f"Classes:\n\n{names}{more}"
        )

    def export(
        self,
        filepath: PathLike,
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the model on packed batches for serving; see keras.Model.export.

        `save_to_run` and `flexast export` serve waveforms.
        """
        super().export(filepath, format, verbose, **export_options(self, kwargs))

    # === Training and prediction ===

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "auto",
        loss: str | keras.losses.Loss | Callable[[Tensor, Tensor], Tensor] | None = "auto",
        *,
        metrics: str | Sequence[Any] | None = "auto",
        **kwargs: Any,
    ) -> None:
        """Configure the classifier for training.

        Args:
            optimizer: as in keras.Model.compile; "auto" is Adam with a learning rate of 5e-5, for
                weights that are trained already.
            loss: as in keras.Model.compile, on (rows, segments) labels; "auto" is PackedLoss.
            metrics: as in keras.Model.compile; empty slots do not count. "auto" is the accuracy
                where clips have one label.
            **kwargs: as in keras.Model.compile.
        """
        several = self.multi_label
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(LEARNING_RATE)
        optimizer = scaled(keras.optimizers.get(optimizer), self)
        if loss == "auto":
            loss = PackedLoss(several, from_logits=self.activation is None)
        weighted = list(kwargs.pop("weighted_metrics", None) or [])
        if metrics == "auto":
            metrics = [] if several or weighted else [PackedAccuracy()]
        own, chosen = self.preprocessor, "auto"
        if own is not None and "jit_compile" not in kwargs and not kwargs.get("run_eagerly"):
            kwargs["jit_compile"] = chosen = jit_compile(self, own.packing.row_length)
        self._chooses_xla = chosen != "auto"  # else Keras does, or the user did
        metrics = [metrics] if isinstance(metrics, str) else list(metrics or [])
        kwargs["weighted_metrics"] = [*metrics, *weighted]
        super().compile(optimizer=optimizer, loss=loss, metrics=None, **kwargs)

    def get_compile_config(self) -> dict[str, Any] | None:
        """How it is compiled, for a saved classifier."""
        config, optimizer = super().get_compile_config(), getattr(self, "optimizer", None)
        if config and self._chooses_xla:
            config.pop("jit_compile", None)  # a loaded one chooses, too
        return config and {**config, "trained": optimizer is not None and optimizer.built}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved classifier was, so that its training can go on."""
        config = keras.saving.deserialize_keras_object(config)
        trained = config.pop("trained", False)
        self.compile(**config)
        if trained:
            self.optimizer.build(self.trainable_variables)

    def fit(
        self,
        x: Clips | None = None,
        y: ArrayLike | None = None,
        batch_size: int | None = None,
        sample_weight: ArrayLike | None = None,
        validation_data: tuple[Any, ...] | list[Any] | tf.data.Dataset | None = None,
        validation_split: float | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Train on clips; see keras.Model.fit.

        The draws go on with the steps of the optimizer: a later `fit`, also of a saved classifier,
        has others, and after a new `compile` they begin again.

        Args:
            x: clips, see the class.
            y: int (clips,), or float (clips, classes) where clips have several labels; None where
                x is a Dataset.
            batch_size: number of clips in a batch, on average; None for 32.
            sample_weight: float (clips,).
            validation_data: (x, y) or (x, y, sample_weight) of clips in memory, or a Dataset.
            validation_split: share of the clips in memory, the last ones, to validate on.
            **kwargs: as in keras.Model.fit; class_weight needs one label for each clip.

        Returns:
            keras.callbacks.History.

        Raises:
            ValueError: a clip cannot be used, or labels do not fit.
        """
        if self.preprocessor is None:
            return super().fit(
                x, y, batch_size=batch_size, sample_weight=sample_weight,
                validation_data=validation_data, validation_split=validation_split, **kwargs,
            )  # fmt: skip
        if not self.compiled:
            raise ValueError("the classifier is not compiled; call `compile()` before `fit`.")
        own = self.preprocessor
        if validation_split and validation_data is None:
            x = x if isinstance(x, tf.data.Dataset) else own.waveforms(x)
            x, y, sample_weight, validation_data = _split(x, y, sample_weight, validation_split)
        if validation_data is not None:
            if not isinstance(validation_data, tuple | list):
                validation_data = (validation_data,)
            if not 1 <= len(validation_data) <= 3:
                raise ValueError(
                    f"validation_data has {len(validation_data)} parts; expected a Dataset, (x, y) "
                    f"or (x, y, sample_weight)."
                )
            held_out, labels, weights = (*validation_data, None, None)[:3]
            held_out, labels = checked_labels(self, held_out, labels)
            steps = kwargs.pop("validation_steps", None)
            validation_data = _scored(
                own.evaluation_batches(held_out, labels, weights, steps=steps)
            )
        factors = kwargs.pop("class_weight", None)
        x, labels = checked_labels(self, x, y, factors)
        if factors is not None and labels is not None:
            sample_weight = class_weighted(labels, sample_weight, factors)
        if own.augment.mixup and labels is not None and labels.ndim == 1:
            labels = np.eye(self.num_classes, dtype="float32")[labels]
        batches, steps = own.training_batches(
            x, labels, sample_weight, batch_size=batch_size,
            start=_batches_so_far(self.optimizer),
            steps=kwargs.pop("steps_per_epoch", None),
        )  # fmt: skip
        self._choose_xla(batches.element_spec[0]["tokens"].shape[1])
        return keras.Model.fit(
            self, batches, validation_data=validation_data, steps_per_epoch=steps,
            **{**kwargs, "shuffle": False},
        )  # fmt: skip

    def evaluate(
        self,
        x: Clips | None = None,
        y: ArrayLike | None = None,
        batch_size: int | None = None,
        sample_weight: ArrayLike | None = None,
        **kwargs: Any,
    ) -> float | list[float] | dict[str, float]:
        """Loss and metrics of clips; arguments as in `fit` and keras.Model.evaluate."""
        if self.preprocessor is None:
            return super().evaluate(
                x, y, batch_size=batch_size, sample_weight=sample_weight, **kwargs
            )
        if kwargs.get("_use_cached_eval_dataset"):  # `fit` validates on packed batches
            return keras.Model.evaluate(self, x, **kwargs)
        x, y = checked_labels(self, x, y)
        batches = self.preprocessor.evaluation_batches(
            x, y, sample_weight, batch_size=batch_size, steps=kwargs.pop("steps", None)
        )
        return keras.Model.evaluate(self, _scored(batches), **kwargs)

    def predict(
        self,
        x: Clips | None = None,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        steps: int | None = None,
        callbacks: list[keras.callbacks.Callback] | None = None,
    ) -> np.ndarray:
        """Scores of every clip, float32 (clips, num_classes), in the order of the clips.

        Args:
            x: clips, see the class; labels of a Dataset are not used.
            batch_size, verbose, callbacks: as in keras.Model.predict, where `preprocessor` is
                None; else its packing tells how many rows are in a batch.
            steps: number of batches of a Dataset to stop after; None for all.

        Raises:
            ValueError: a clip cannot be used, or the model gives NaN.
        """
        if self.preprocessor is None:
            return super().predict(
                x, batch_size=batch_size, verbose=verbose, steps=steps, callbacks=callbacks
            )
        if callbacks:
            raise ValueError("callbacks of predict need packed batches: set preprocessor to None.")
        if isinstance(x, tf.data.Dataset):
            batches = self.preprocessor.evaluation_batches(x, steps=steps)
            return _in_order(self._predictor(), batches)
        own = self.preprocessor
        settings = own.fbank, own.evaluation_patches, own.packing
        if getattr(self, "_clips", (None,))[0] != settings:
            self._clips = settings, ClipPredictor(*settings)
        return self._clips[1](self._predictor(), own.waveforms(x))

    def _choose_xla(self, row_length):
        """Whether XLA compiles the step of these rows; `compile` knew the preprocessor's alone."""
        if not self._chooses_xla:
            return
        chosen = jit_compile(self, row_length)
        if chosen not in ("auto", self.jit_compile):
            self.jit_compile = chosen
            self.train_function = self.test_function = None  # Keras makes others

    def _predictor(self):
        """The PackedPredictor of these weights; LoRA and quantization bring others."""
        weights = tuple(id(one) for one in self.variables)
        if getattr(self, "_packed", (None,))[0] != weights:
            self._packed = weights, PackedPredictor(self)
        return self._packed[1]


def _check_untrained(preset, load_weights, kwargs):
    """Raise a ValueError where a model without weights is asked for them, or has no classes."""
    if load_weights:
        raise ValueError(
            f"preset={preset!r} has no published weights. Pass load_weights=False to train it "
            f"from scratch, or give a run or the name of an AST on the Hugging Face hub."
        )
    if "num_classes" not in kwargs:
        raise ValueError(f"preset={preset!r} has no classes. Pass num_classes.")


def _batches_so_far(optimizer):
    """How many batches an optimizer has seen; its `iterations` count accumulated ones as one."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    (counter,) = (one for one in inner.variables if one.name == "iteration")
    return int(keras.ops.convert_to_numpy(counter))


def _check_fits(preprocessor, backbone, segments):
    """Raise a ValueError where a preprocessor makes other tokens than a model was made for."""
    if not isinstance(preprocessor, AudioClassifierPreprocessor):
        raise ValueError(
            f"preprocessor is a {type(preprocessor).__name__}; expected an "
            f"AudioClassifierPreprocessor, or None for packed batches."
        )
    patches = preprocessor.patches
    fitting = "backbone.patch_settings(patch_sizes) gives patches that fit."
    pairs = [
        (f"patches.{name}", getattr(patches, name), getattr(backbone, name), fitting)
        for name in ("prefix_tokens", "base_patch", "grid")
    ]
    slots = f"Give the preprocessor packing=PackSettings(segments={segments})."
    pairs.append(("packing.segments", preprocessor.packing.segments, segments, slots))
    for name, came, expected, way_out in pairs:
        if came != expected:
            raise ValueError(
                f"the preprocessor's {name} is {came}, but the model has {expected}. {way_out}"
            )


def _copy_weights(source, target):
    """Weights of one layer, with all layers in it, to another of the same structure."""
    pairs = zip(source._flatten_layers(), target._flatten_layers(), strict=True)
    for one, other in pairs:
        store = {}
        one.save_own_variables(store)
        if store:  # a copy: JAX frees the arrays of a model that trains
            copies = {name: np.array(keras.ops.convert_to_numpy(store[name])) for name in store}
            other.load_own_variables(copies)


@contextlib.contextmanager
def _without_optimizer(model):
    """Keras saves and loads the optimizer, of twice the size, with the weights of a task."""
    optimizer, model.optimizer = getattr(model, "optimizer", None), None
    try:
        yield
    finally:
        model.optimizer = optimizer


def _scored(batches):
    """Batches of a known number, without clip_ids, for `evaluate` and validation.

    They stay in memory: a Dataset that is shuffled anew could pack into another number of them.
    """
    batches = counted(batches.cache())
    if batches.cardinality() == 0:
        raise ValueError("the Dataset to evaluate has no clips.")
    return batches.map(lambda *batch: batch[:3])


def _in_order(predictor, batches):
    """Outputs of batches whose number of clips is not known, float32 (clips, width)."""
    outputs, ids = [np.zeros((0, predictor.width), "float32")], [np.zeros(0, "int64")]
    for inputs, _, _, clip_ids in batches:
        output, places = predictor(inputs), np.asarray(clip_ids)
        outputs.append(output[places >= 0])
        ids.append(places[places >= 0])
    outputs = np.concatenate(outputs)[np.argsort(np.concatenate(ids))]
    check_finite(outputs)
    return outputs


def _split(x, y, sample_weight, share):
    """The first clips, and the last ones for validation: x, y, weights, (x, y, weights)."""
    if isinstance(x, tf.data.Dataset):
        raise ValueError("validation_split needs clips in memory; give validation_data.")
    at = round(len(x) * (1 - share))
    if not 0 < at < len(x):
        raise ValueError(f"validation_split={share} leaves no clip of {len(x)} on one side.")
    given = (x, y, sample_weight)
    first, last = (
        tuple(None if one is None else one[part] for one in given)
        for part in (slice(None, at), slice(at, None))
    )
    return *first, last
