"""FlexiAST on Speech Commands v2, from an AST: train SPEECH_COMMANDS --init RUN --out ...

Published: 82.3 % to 96.4 % at patch 48 to 8 (arXiv:2307.09286, table 1).
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings

train = TrainSettings(
    epochs=30,  # AST
    learning_rate=2.5e-4,  # AST, from ImageNet weights
    schedule="step",  # AST
    decay_start=5,  # AST
    decay_every=1,  # AST
    decay_factor=0.85,  # AST
    warmup=0.0,  # AST warms up on AudioSet only
    optimizer="adam",  # AST
    betas=(0.95, 0.999),  # AST
    weight_decay=5e-7,  # AST
    loss="binary",  # AST, though a clip has one label
    batch_clips=128,  # AST
    row_length=1024,  # clips of 1 s have 49 tokens at patch 16 and up to 193 at patch 8
    segments=64,  # 5 tokens at patch 48
)
augment = AugmentSettings(
    freq_mask=48,  # AST, mel bins
    time_mask_ms=480.0,  # AST: 48 frames of 10 ms
    mixup=0.6,  # AST, of Beta(10, 10)
    roll=0.1,  # AST: up to 10 of 100 frames
    noise_snr_db=(20.0, 60.0),  # AST: noise on the spectrogram; ours is on the waveform
)
patch_sizes = PATCH_SIZES  # FlexiAST, drawn uniformly
patches = {"clips_per_draw": 128}  # FlexiAST draws one size for a batch
model = {
    "size": "base",  # FlexiAST
    "pooling": "cls",  # FlexiAST, from ViT or AST with one [CLS]
    "remainder": "crop",  # the papers
    "position": "grid",  # the papers
    "resize": "pi",  # FlexiAST
}
