"""Spoken digits in forty lines: corpus, pipeline, one flexible model, two faces.

pip install -e ".[demo]" && python examples/spoken_digits.py
"""

import keras
import numpy as np

import keras_flexast as kf
import tf_data_pipelines as tdp
from keras_flexast.schedules import WarmupCosine
from keras_flexast.training import compile_packed
from tf_data_pipelines.speech import make_corpus

STEPS = 400  # 8 rows x 256 tokens hold about 80 words, so 11 passes over 3,000
ROWS, ROW_LENGTH, SEGMENTS = 8, 256, 16  # 256: the longest word at patch 8 is 224 tokens

corpus = make_corpus("/tmp/spoken-digits", validation_clips=0, progress=True)
data = tdp.read_data(corpus, tdp.FbankSettings(), progress=True)
train, test = data.split("train"), data.split("test")
fbank = tdp.FbankSettings(mean=data.mean, std=data.std)
packing = tdp.PackSettings(ROWS, ROW_LENGTH, SEGMENTS)

keras.utils.set_random_seed(1337)
model = kf.ElasticAST(num_classes=10, size="nano", segments=SEGMENTS)
patches = model.patch_settings(tdp.PATCH_SIZES)
compile_packed(model, WarmupCosine(1e-3, [STEPS]), row_length=ROW_LENGTH)
model.fit(
    tdp.training_batches(train, fbank, patches=patches, packing=packing),
    steps_per_epoch=50,  # a line of progress
    epochs=STEPS // 50,
    shuffle=False,
)

# The packed face: every test clip once, each at a patch size of its own.
batches = tdp.evaluation_batches(test, fbank, patches=patches, packing=packing)
loss, accuracy = model.evaluate(batches.map(lambda x, y, weights, _: (x, y, weights)), verbose=0)
print(f"mixed patch sizes: {100 * accuracy:.1f} % of {len(test.source)} clips by other voices")

# The fixed face: one clip, one patch size, from the same weights.
clip = test.source.clips[int(np.argmax(test.durations))]  # long enough for the widest patch
features = tdp.features(tdp.read_audio(clip.path), fbank)
for patch_size in (8, 24, (16, 40)):
    fixed = kf.fixed_model(model, patch_size, frames=features.shape[0])
    answer = data.source.classes[int(np.argmax(fixed.predict(features[None].numpy(), verbose=0)))]
    print(f"{clip.path} at patch {patch_size}: {answer}")
