"""A few hundred clips of one's own, from another run: the default of train --init.

Gain and token dropout of small-folder, without its mixup, which was not tried here; AdamW, all
patch sizes alike, fewer epochs, and lower learning rates: the lower a block, the lower. The rate is
a guess for published weights of the base size, on which it was not measured; from a nano run it was
too low (examples/experiments/README.md).
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import AugmentSettings

train = TrainSettings(
    epochs=30,
    learning_rate=3e-4,
    optimizer="adamw",
    betas=(0.9, 0.99),
    weight_decay=0.05,
    decay_all=False,
    layer_decay=0.75,
    batch_clips=32,
)
augment = AugmentSettings(gain_db=6.0, token_dropout=0.5)
