"""AST on the balanced part of AudioSet, from ImageNet weights: train AUDIOSET --init RUN --out ...

Numbers of AST (arXiv:2104.01778) and its code. Only balanced_train_segments.csv and
eval_segments.csv are in the folder. Published: mAP 0.347.
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import AugmentSettings

train = TrainSettings(
    epochs=25,  # AST
    learning_rate=5e-5,  # AST
    schedule="step",  # AST
    decay_start=10,  # AST
    decay_every=5,  # AST
    decay_factor=0.5,  # AST
    warmup_steps=1000,  # AST
    optimizer="adam",  # AST
    betas=(0.95, 0.999),  # AST
    weight_decay=5e-7,  # AST
    loss="binary",  # AST; a clip has several labels
    average_epochs=20,  # AST averages epochs 6 to 25
    keep="last",  # the average of all, not the best of some
    batch_clips=12,  # AST
)
augment = AugmentSettings(
    freq_mask=48,  # AST, mel bins
    time_mask_ms=1920.0,  # AST: 192 frames of 10 ms
    mixup=0.5,  # AST, of Beta(10, 10)
)
patch_sizes = (16,)  # AST
model = {
    "size": "base",  # AST
    "pooling": "cls",  # AST has two prefix tokens, of DeiT: --init brings them
    "remainder": "crop",  # the papers
    "position": "grid",  # the papers
}
