"""ElasticAST on EPIC-SOUNDS, clips at their own lengths: train EPIC_SOUNDS --init RUN --out ...

Numbers of ElasticAST (arXiv:2407.08691) and its code. It hears another filterbank there (librosa's,
at 24 kHz with a window of 10 ms); this recipe hears Kaldi's at 16 kHz, as elsewhere.
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import AugmentSettings

train = TrainSettings(
    epochs=30,  # ElasticAST
    learning_rate=1e-5,  # ElasticAST, from pretrained weights; its AST 1e-4
    schedule="step",  # AST
    decay_start=5,  # ElasticAST
    decay_every=1,  # ElasticAST
    decay_factor=0.75,  # ElasticAST
    warmup_steps=1000,  # ElasticAST
    optimizer="adam",  # AST
    betas=(0.95, 0.999),  # AST
    weight_decay=5e-7,  # AST
    loss="cross_entropy",  # ElasticAST
    row_length=2048,  # ElasticAST
    overlong="crop",  # validation clips of over 41 s lose their end
    batch_clips=12,  # ElasticAST
    seed=1337,  # ElasticAST
)
augment = AugmentSettings(
    freq_mask=48,  # ElasticAST, mel bins
    time_mask_share=0.1875,  # ElasticAST: 192 of 1,024 frames, scaled with the clip
    crop_ms=30000.0,  # ElasticAST hears up to 30 s
    token_dropout=0.1,  # ElasticAST
)
patch_sizes = (16,)  # ElasticAST
model = {
    "size": "base",  # ElasticAST
    "pooling": "attention",  # ElasticAST
    "remainder": "crop",  # the papers
    "position": "grid",  # the papers
}
