"""FlexiAST on VGGSound, from an AST: train VGGSOUND --init RUN --out ...

Published: 34.8 % to 48.4 % at patch 48 to 8 (arXiv:2307.09286, table 1).
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings

train = TrainSettings(
    epochs=20,  # FlexiAST
    learning_rate=1e-5,  # FlexiAST, from pretrained weights
    schedule="step",  # AST
    decay_start=2,  # FlexiAST
    decay_every=1,  # FlexiAST
    decay_factor=0.5,  # FlexiAST
    warmup_steps=1000,  # AST
    optimizer="adam",  # AST
    betas=(0.95, 0.999),  # AST
    weight_decay=5e-7,  # AST
    loss="binary",  # FlexiAST, though a clip has one label
    batch_clips=12,  # AST
    segments=64,  # clips of 10 s have 41 tokens at patch 48, and rows hold up to 4,096
)
augment = AugmentSettings(
    freq_mask=48,  # FlexiAST, mel bins
    time_mask_ms=1920.0,  # FlexiAST: 192 frames of 10 ms
)
patch_sizes = PATCH_SIZES  # FlexiAST, drawn uniformly
patches = {"clips_per_draw": 12}  # FlexiAST draws one size for a batch
model = {
    "size": "base",  # FlexiAST
    "pooling": "cls",  # FlexiAST, from ViT or AST with one [CLS]
    "remainder": "crop",  # the papers
    "position": "grid",  # the papers
    "resize": "pi",  # FlexiAST
}
