"""FlexiAST on ESC-50, one of five folds for the test: train ESC-50 --init RUN --out ...

FlexiAST keeps AST's recipe (its code, github.com/YuanGongND/ast) and adds the patch sizes.
Published: 75.2 % to 94.0 % at patch 48 to 8 (arXiv:2307.09286, table 1), the mean of five folds.
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings

train = TrainSettings(
    epochs=25,  # AST
    learning_rate=1e-5,  # AST, from weights of AudioSet; 1e-4 from others
    schedule="step",  # AST
    decay_start=5,  # AST
    decay_every=1,  # AST
    decay_factor=0.85,  # AST
    warmup=0.0,  # AST warms up on AudioSet only
    optimizer="adam",  # AST
    betas=(0.95, 0.999),  # AST
    weight_decay=5e-7,  # AST
    loss="cross_entropy",  # AST
    batch_clips=48,  # AST
    segments=64,  # clips of 5 s have 21 tokens at patch 48
)
augment = AugmentSettings(
    freq_mask=24,  # AST, mel bins
    time_mask_ms=960.0,  # AST: 96 frames of 10 ms
)
patch_sizes = PATCH_SIZES  # FlexiAST, drawn uniformly
patches = {"clips_per_draw": 48}  # FlexiAST draws one size for a batch
model = {
    "size": "base",  # FlexiAST
    "pooling": "cls",  # FlexiAST
    "remainder": "crop",  # the papers
    "position": "grid",  # the papers
    "resize": "pi",  # FlexiAST
}
