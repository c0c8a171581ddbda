"""A few hundred clips of one's own, from scratch: the default of train.

Chosen among trials of one seed on small data sets. By validation clips: optimizer, learning rate,
batch, pooling, mixup, epochs, and how often each patch size is drawn; by the test clips, before
that: gain and token dropout.
examples/training.md says how far it is measured, beside a plain CNN.
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import PATCH_SIZES, AugmentSettings

# Fine patches make many tokens; drawn less often, they leave time for more epochs.
FINE = {8: 1 / 6, 10: 1 / 5, 12: 1 / 4, 16: 1 / 2, 20: 3 / 4}

train = TrainSettings(
    epochs=210,
    learning_rate=4e-3,
    optimizer="muon",  # 4 to 15 points ahead of AdamW after as many epochs
    betas=(0.9, 0.99),
    weight_decay=0.05,
    decay_all=False,
    batch_clips=16,  # a few hundred clips make few steps, of which a transformer needs many
)
augment = AugmentSettings(
    gain_db=6.0,
    mixup=0.5,  # AST's share on AudioSet: 1 to 2 points here
    token_dropout=0.5,  # half of the tokens, and rows hold more clips
)
patches = {"patch_weights": tuple(FINE.get(size, 1) for size in PATCH_SIZES)}
model = {"size": "nano", "pooling": "mean", "table": "factorized"}
