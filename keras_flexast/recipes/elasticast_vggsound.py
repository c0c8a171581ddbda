"""ElasticAST on VGGSound at frame shifts of 10 to 40 ms: train VGGSOUND --init RUN --out ...

Numbers of ElasticAST (arXiv:2407.08691) and its code.
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import AugmentSettings

train = TrainSettings(
    epochs=40,  # ElasticAST
    learning_rate=1e-5,  # ElasticAST, from pretrained weights
    schedule="step",  # AST
    decay_start=10,  # ElasticAST
    decay_every=1,  # ElasticAST
    decay_factor=0.75,  # ElasticAST
    warmup_steps=1000,  # ElasticAST
    optimizer="adam",  # AST
    betas=(0.95, 0.999),  # AST
    weight_decay=5e-7,  # AST
    loss="binary",  # ElasticAST, though a clip has one label
    row_length=2048,  # ElasticAST
    batch_clips=12,  # ElasticAST; a row of 2,048 tokens holds 10 clips of 210 on average
    seed=1337,  # ElasticAST
)
augment = AugmentSettings(
    freq_mask=48,  # ElasticAST, mel bins
    time_mask_ms=1920.0,  # ElasticAST: 192 / C frames of 10 C ms
    token_dropout=0.1,  # ElasticAST
)
patch_sizes = (16,)  # ElasticAST
frame_shifts_ms = tuple(range(10, 41, 2))  # ElasticAST: C = 1.0 to 4.0 by 0.2
model = {
    "size": "base",  # ElasticAST
    "pooling": "attention",  # ElasticAST
    "remainder": "crop",  # the papers
    "position": "grid",  # the papers
}
