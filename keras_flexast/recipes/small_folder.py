"""A few hundred clips of one's own, from scratch: the default of train.

Chosen among trials of one seed on small data sets: optimizer, learning rate and batch by
validation clips, the rest before that by the test clips. examples/training.md says how far it is
measured, beside a plain CNN.
"""

from keras_flexast.settings import TrainSettings
from tf_data_pipelines.settings import AugmentSettings

train = TrainSettings(
    epochs=60,
    learning_rate=4e-3,
    optimizer="muon",  # 6 to 15 points ahead of AdamW after as many epochs
    betas=(0.9, 0.99),
    weight_decay=0.05,
    decay_all=False,
    batch_clips=16,  # a few hundred clips make few steps, of which a transformer needs many
)
augment = AugmentSettings(
    gain_db=6.0,
    token_dropout=0.5,  # half of the tokens, and rows hold more clips
)
model = {"size": "nano"}
