"""The encoder as KerasHub knows backbones."""

import keras
import keras_hub

from keras_flexast.models import PackedBackbone


@keras.saving.register_keras_serializable(package="keras_flexast")
class ASTBackbone(PackedBackbone, keras_hub.models.Backbone):
    """PackedBackbone with KerasHub's presets and LoRA.

    Arguments, inputs and output are those of PackedBackbone.

    Example:
        backbone = ASTBackbone(dim=192, depth=12, num_heads=3)
        backbone.save_to_preset("encoder")
        backbone = keras_hub.models.Backbone.from_preset("encoder")

    Reference: FlexiAST, Feng et al. 2023 (arXiv:2307.09286); ElasticAST, Feng et al. 2024
    (arXiv:2407.08691).
    """
