"""FlexiAST on AudioSet, all 2 million clips, from an AST: train AUDIOSET --init RUN --out ...

FlexiAST keeps AST's recipe (its code, github.com/YuanGongND/ast) and adds the patch sizes.
Published: mAP 0.305 to 0.401 at patch 48 to 8 (arXiv:2307.09286, table 1).
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings

train = TrainSettings(
    epochs=5,  # AST
    learning_rate=1e-5,  # AST, from pretrained weights
    schedule="step",  # AST
    decay_start=2,  # AST: halved after the second epoch
    decay_every=1,  # and after each one that follows
    decay_factor=0.5,
    warmup_steps=1000,  # AST
    optimizer="adam",  # AST
    betas=(0.95, 0.999),  # AST
    weight_decay=5e-7,  # AST
    loss="binary",  # AST; a clip has several labels
    average_epochs=5,  # AST averages all five; whether FlexiAST does is not published
    keep="last",  # the average of all, not the best of some
    batch_clips=12,  # AST
    segments=64,  # clips of 10 s have 41 tokens at patch 48, and rows hold up to 4,096
)
augment = AugmentSettings(
    freq_mask=48,  # AST, mel bins
    time_mask_ms=1920.0,  # AST: 192 frames of 10 ms
    mixup=0.5,  # AST, of Beta(10, 10)
    balanced=True,  # AST, on all 2 million clips
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
