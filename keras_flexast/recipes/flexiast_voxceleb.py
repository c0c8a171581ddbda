"""FlexiAST on VoxCeleb1 identification, resized in time only: train VOXCELEB --init RUN --out ...

Numbers of FlexiAST (arXiv:2307.09286) and its code, which hears 10.24 s of each clip.
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings, patch_sizes_along

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
    loss="cross_entropy",  # FlexiAST
    batch_clips=12,  # AST
)
augment = AugmentSettings(
    freq_mask=48,  # FlexiAST, mel bins
    time_mask_ms=1920.0,  # FlexiAST: 192 frames of 10 ms
    crop_ms=10240.0,  # FlexiAST: 1,024 frames; theirs are the first, ours any
)
patch_sizes = patch_sizes_along("time", PATCH_SIZES)  # FlexiAST: 16 x p
patches = {"clips_per_draw": 12}  # FlexiAST draws one size for a batch
model = {
    "size": "base",  # FlexiAST
    "pooling": "cls",  # FlexiAST, from ViT or AST with one [CLS]
    "remainder": "crop",  # the papers
    "position": "grid",  # the papers
    "resize": "pi",  # FlexiAST
}
