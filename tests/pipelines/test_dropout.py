"""Tokens that are left out: whole rows and columns or single ones, as many as the lengths say."""

import numpy as np
import pytest
import tensorflow as tf

from tf_data_pipelines.draws import TOKENS, subset
from tf_data_pipelines.dropout import kept_counts
from tf_data_pipelines.lengths import batches_per_epoch, mean_tokens
from tf_data_pipelines.ordering import training_places
from tf_data_pipelines.packing import pack
from tf_data_pipelines.pipeline import training_clips
from tf_data_pipelines.settings import AugmentSettings, FbankSettings, PackSettings, PatchSettings
from tf_data_pipelines.sources import WaveformSource
from tf_data_pipelines.stages import drawn_tokens, make_tokens

FBANK = FbankSettings(mel_bins=37, mean=-7.0, std=3.0)
PATCHES = PatchSettings((8, (5, 12)), remainder="crop", prefix_tokens=2, grid=(4, 8))
PACKING = PackSettings(rows=2, row_length=128, segments=16)
HALF = AugmentSettings(token_dropout=0.5)
GRID = AugmentSettings(drop_freq=0.4, drop_time=0.25)
ALL = AugmentSettings(
    gain_db=3.0, fill_ms=90.0, crop_ms=300.0, roll=0.5, mixup=0.5, token_dropout=0.3,
    drop_freq=0.4, drop_time=0.25, frame_shift_range_ms=(8, 23), balanced=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(3)
    lengths = rng.integers(3000, 7000, 17)
    return WaveformSource([rng.normal(0, 0.1, length).astype("float32") for length in lengths])


def clips_of(data, augment, count, **options):
    """The first training clips, and what each must have drawn."""
    how = {"patches": options.pop("patches", PATCHES), "packing": PACKING, **options}
    clips = training_clips(data, FBANK, augment=augment, **how)
    places = training_places(data, augment or AugmentSettings(), 1337)
    return list(tf.data.Dataset.zip((places, clips)).take(count).as_numpy_iterator())


@pytest.fixture(scope="module")
def found(data):
    """The clips of two epochs: whole, with half of the tokens, and without rows and columns."""
    return [clips_of(data, augment, 34) for augment in (None, HALF, GRID)]


def test_what_stays_is_a_part_of_the_clip(found):
    """The tokens are some of the whole clip's in their order, the prefix tokens in front."""
    for clips in found[1:]:
        chosen = set()
        for (_, whole), (_, kept) in zip(found[0], clips, strict=True):
            places = {tuple(row): place for place, row in enumerate(whole["positions"])}
            here = [places[tuple(row)] for row in kept["positions"]]
            assert here[:2] == [0, 1] and here == sorted(set(here))
            np.testing.assert_array_equal(kept["tokens"], whole["tokens"][here])
            chosen.add((kept["clip_id"], tuple(here)))
        assert len(chosen) > 30  # both epochs of a clip differ, but for a few small grids


def test_half_the_tokens_stay_of_every_clip(found):
    for (_, whole), (_, kept) in zip(found[0], found[1], strict=True):
        assert len(kept["tokens"]) - 2 == -(-(len(whole["tokens"]) - 2) // 2)


def test_whole_rows_and_columns_go(found):
    for (_, whole), (_, kept) in zip(found[0], found[2], strict=True):
        sizes = [
            [len(np.unique(one["positions"][2:, axis])) for axis in (0, 1)] for one in (whole, kept)
        ]
        (rows, columns), (kept_rows, kept_columns) = sizes
        assert (kept_rows, kept_columns) == (rows - int(0.4 * rows), columns - columns // 4)
        assert len(kept["positions"]) - 2 == kept_rows * kept_columns  # a full grid


def test_a_row_holds_twice_as_many_clips():
    def rows(augment):
        clip = {"features": tf.zeros([40, 37]), "frame_shift_scale": 1.0, "label": 0}
        clips = tf.data.Dataset.range(300).map(lambda number: {**clip, "clip_id": number})
        patches = PatchSettings((8,), remainder="crop", grid=(4, 8))
        clips = make_tokens(clips, patches, packing=PACKING, augment=augment)
        return sum(1 for _ in pack(clips, PACKING))

    assert (rows(None), rows(HALF)) == (50, 25)  # 20 tokens, 6 in a row; 10, 12 in a row


def test_every_subset_comes_equally_often_and_none_is_empty():
    @tf.function
    def drawn(number, size, clip_id):
        return subset(number, size, {"clip_id": clip_id}, seed=3, stream=TOKENS)

    ids = [tf.constant(number, tf.int64) for number in range(600)]
    found = [tuple(drawn(2, 4, clip_id).numpy()) for clip_id in ids]
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 65 and counts.max() < 140
    assert all(first < second for first, second in found)
    assert drawn(1, 1, ids[0]).numpy() == [0]
    most = AugmentSettings(drop_freq=0.95, drop_time=0.95, token_dropout=0.95)
    assert kept_counts(1, 1, most) == (1, 1, 1)
    sizes = np.array([1, 7, 300, 50_000])
    in_graph = kept_counts(sizes.astype("int32"), tf.constant(sizes, tf.int32), ALL)
    for one, other in zip(kept_counts(sizes, sizes, ALL), in_graph, strict=True):
        np.testing.assert_array_equal(one[:3], other[:3])


DRAWS = PatchSettings(
    (8, 12, (5, 12)), remainder="crop", prefix_tokens=1, grid=(4, 8), patch_weights=(1, 3, 2),
    clips_per_draw=3, pool_frames=(1, 2, 3),
)  # fmt: skip


@pytest.mark.parametrize(
    ("augment", "patches", "fbank"),
    [
        (ALL, DRAWS, FBANK),
        (ALL, DRAWS, FbankSettings(mel_bins=37, clip_ms=217.0)),
        (HALF, PatchSettings((8, 12), frame_shifts_ms=(7, 11), grid=(4, 8)), FBANK),
    ],
    ids=["all", "one length", "half"],
)
def test_the_number_of_tokens_follows_from_the_length(data, augment, patches, fbank):
    """Of every clip, without its sound; and their mean over all draws from no draw at all."""
    how = {"patches": patches, "packing": PACKING, "augment": augment}
    longest = max(map(len, data.waveforms))
    longest = min(longest, round(16 * augment.crop_ms) or longest)
    sizes = tf.constant([len(waveform) for waveform in data.waveforms])

    def tokens(place):
        size = tf.gather(sizes, place["clip_id"])
        return drawn_tokens(place, size, fbank, seed=1337, longest=longest, **how)

    places = training_places(data, augment, 1337)
    expected = list(places.map(tokens).take(60 * 17).as_numpy_iterator())
    clips = training_clips(data, fbank, **how).take(3 * 17).as_numpy_iterator()
    assert [len(clip["tokens"]) for clip in clips] == expected[: 3 * 17]
    mean = mean_tokens(data, fbank, **how).mean()
    assert mean == pytest.approx(np.mean(expected), rel=0.04)
    batches = batches_per_epoch(data, fbank, **how)
    assert batches == max(1, -(-max(17 * mean / 256, 17 / 32) // 1))
