"""What TensorBoard is given: exact counts, attention that is the model's own, readable pictures."""

import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import write_tones

from keras_flexast import PackedAST, monitoring
from keras_flexast.monitoring import (
    GAP,
    SCALE,
    ClipPictures,
    Meter,
    TrainingBoard,
    _picture,
)
from keras_flexast.runs import Run
from tf_data_pipelines import read_data
from tf_data_pipelines.settings import FbankSettings, PackSettings, PatchSettings


def test_a_meter_counts_what_is_taken():
    weights = tf.constant([[[1.0, 0.5, 0]], [[1, 0, 0]], [[1, 1, 1]]])
    ids = tf.constant([[[1, 1, 2, 0]], [[1, 0, 0, 0]], [[1, 2, 3, 3]]])
    data = tf.data.Dataset.from_tensor_slices(({"segment_ids": ids}, weights, weights))
    meter = Meter(data)
    assert meter.read().tolist() == [0, 0, 0]
    taken = [*meter.batches.take(2)]
    assert meter.read().tolist() == [2, 3, 4]
    np.testing.assert_array_equal(taken[0][2], weights[0])


@pytest.mark.parametrize("remainder", ["cover", "pad", "crop"])
def test_a_picture_has_the_grid_and_the_attention_in_its_place(remainder):
    patches = PatchSettings(((12, 20),), remainder=remainder, grid=(4, 8))
    spectrogram = np.full((50, 32), -9.0, "float32")  # black
    spectrogram[30:, :5] = 9.0
    bands, columns = (2, 2) if remainder == "crop" else (3, 3)
    weights = np.zeros(bands * columns)
    weights[columns - 1] = 1.0  # the lowest band, the last column
    picture = _picture(spectrogram, weights, patches)
    height, width = 32 * SCALE, 50 * SCALE
    assert picture.shape == (2 * height + GAP, width, 3) and picture.dtype == np.uint8
    grid, heat = picture[:height], picture[height + GAP :]
    assert (grid[-8:-2, -8:-2] > 200).all()  # the sound, low and late
    assert (grid == (229, 153, 25)).all(-1).all(0).sum() >= columns  # lines
    bright = heat.sum(-1)
    assert bright[-4:, (columns - 1) * 20 * SCALE - 6].max() > 0
    assert not bright[: height // 2].max() > 40 and bright[:, :30].max() < 40


def test_pictures_are_of_the_beginning_of_long_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "LONGEST", 0.3)
    data = read_data(write_tones(tmp_path), FbankSettings())
    ast = PackedAST(2, dim=16, depth=1, num_heads=2)
    run = Run(
        ast, FbankSettings(), patches=ast.patch_settings(), packing=PackSettings(),
        classes=data.source.classes,
    )  # fmt: skip
    pictures = ClipPictures(run, data)
    assert {len(one) for one in pictures.spectrograms} == {28} and min(data.durations) > 0.3
    assert all(picture.shape[1] == 28 * SCALE for picture in pictures.draw(ast).values())


def test_a_clip_shorter_than_a_patch_has_a_picture():
    patches = PatchSettings(((16, 48),), grid=(2, 8))
    assert _picture(np.zeros((9, 32), "float32"), np.ones(2), patches).shape[1] == 9 * SCALE


def test_pictures_of_short_epochs_are_drawn_in_the_first_and_the_last(tmp_path):
    line = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    line.compile("sgd", "mse")
    drawn = []

    def draw(model):
        drawn.append(int(model.optimizer.iterations))
        return {"clip": np.zeros((4, 4, 3), "uint8")}

    board = TrainingBoard(
        tmp_path, types.SimpleNamespace(read=lambda: None, last_ready=lambda: 0.0),
        packing=PackSettings(), pictures=types.SimpleNamespace(draw=draw),
    )  # fmt: skip
    ones = np.ones((1, 1), "float32")
    line.fit(ones, ones, epochs=5, validation_data=(ones, ones), callbacks=[board], verbose=0)
    assert drawn == [1, 5]


def test_what_waits_for_its_input_shows(tmp_path):
    """A pipeline that takes all the time waits longer than one that has its batches at once."""
    waits = []
    for pause in (0.2, 0.0):

        def read(number, pause=pause):
            time.sleep(pause)
            return np.ones((1, 4), "int32")

        data = tf.data.Dataset.range(18).map(
            lambda n, read=read: tf.numpy_function(read, [n], "int32")
        )
        data = data.map(
            lambda ids: ({"segment_ids": tf.ensure_shape(ids, (1, 4))}, [[1.0]], [[1.0]])
        )
        ids = keras.Input((4,), name="segment_ids")
        line = keras.Model({"segment_ids": ids}, keras.layers.Dense(1)(ids))
        line.compile("sgd", "mse")
        meter, epochs = Meter(data), []
        board = TrainingBoard(tmp_path / str(pause), meter, packing=PackSettings())
        note = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_, board=board, epochs=epochs: epochs.append(
                (board.waited, board._speed()["input_wait"])
            )
        )
        line.fit(
            meter.batches, epochs=3, steps_per_epoch=5, verbose=0, shuffle=False,
            callbacks=[board, note],
        )  # fmt: skip
        assert all(0 <= share <= 1 for _, share in epochs)
        # The first epoch also waits for tracing, and any for a machine that does other work.
        waits.append(min(seconds for seconds, _ in epochs))
    assert waits[0] >= 0.8 > waits[1]  # five times 0.2 s, but for the first one
