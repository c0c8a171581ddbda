"""Sound files of four formats to packed batches; what is inside a batch and in which order."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import tensorflow as tf

import tf_data_pipelines
from tf_data_pipelines import pipeline
from tf_data_pipelines.audio import read_audio
from tf_data_pipelines.draws import PATCH, choice
from tf_data_pipelines.fbank import features
from tf_data_pipelines.lengths import (
    batches_per_epoch,
    check_lengths,
    clip_tokens,
    lengths_warning,
    packing_for,
    training_packing,
)
from tf_data_pipelines.packing import batch_rows, pack
from tf_data_pipelines.patches import patch_tokens
from tf_data_pipelines.pipeline import (
    evaluation_batches,
    extract_features,
    load_waveforms,
    make_tokens,
    training_batches,
)
from tf_data_pipelines.settings import (
    AugmentSettings,
    FbankSettings,
    PackSettings,
    PatchSettings,
    round_row_length,
)
from tf_data_pipelines.sources import WaveformSource, load_source, scan_source

PACKAGE = pathlib.Path(tf_data_pipelines.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
HERTZ = {"low": 311, "middle": 1201, "top": 3001}
FORMATS = [("wav", 16000, 1), ("wav", 8000, 1), ("ogg", 16000, 2), ("mp3", 44100, 1)]
PATCHES = PatchSettings(((12, 20),), remainder="cover", prefix_tokens=1, grid=(4, 8))
DRAWN = PatchSettings((8, 16, (16, 24)), frame_shifts_ms=(10, 12.5, 20), grid=(4, 8))
PACKING = PackSettings(rows=3, row_length=89, segments=5)
LONG_ROWS = PackSettings(rows=2, row_length=401, segments=16)
VORBIS = 2e-3  # tensorflow-io's decoder against libsndfile's, in normalized log-mel


def write_sine(path, hertz, *, seconds, rate=16000, channels=1, seed=0):
    """A sine in noise; each further channel half as loud."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(rate * seconds)) / rate
    wave = 0.3 * np.sin(2 * np.pi * hertz * times) + rng.normal(0, 0.03, len(times))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave[:, None] * 0.5 ** np.arange(channels), rate)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Three classes, four formats and rates each, 0.15 to 0.8 s, all of them different."""
    root = tmp_path_factory.mktemp("corpus")
    for number, (name, (extension, rate, channels)) in enumerate(itertools.product(HERTZ, FORMATS)):
        path = root / name / f"{rate}.{extension}"
        seconds = 0.15 + 0.059 * number
        write_sine(path, HERTZ[name], seconds=seconds, rate=rate, channels=channels, seed=number)
    return root


@pytest.fixture(scope="session")
def scanned(corpus):
    return scan_source(load_source(corpus, validation=0, test=0), FbankSettings(mel_bins=64))


@pytest.fixture(scope="session")
def fbank(scanned):
    return FbankSettings(mel_bins=64, mean=scanned.mean, std=scanned.std)


def clips_in(batches):
    """{clip id: (tokens, positions, label)} of evaluation batches; each clip only once."""
    if isinstance(batches, tf.data.Dataset):
        batches = batches.as_numpy_iterator()
    found = {}
    for inputs, labels, weights, clip_ids in batches:
        np.testing.assert_array_equal(weights, clip_ids >= 0)
        for row, slot in np.argwhere(clip_ids >= 0):
            inside = inputs["segment_ids"][row] == slot + 1
            assert clip_ids[row, slot] not in found and inside.any()
            found[int(clip_ids[row, slot])] = (
                inputs["tokens"][row][inside],
                inputs["positions"][row][inside],
                labels[row, slot],
            )
    return found


def direct(path, fbank, patches, frame_shift_ms=None):
    """Tokens and positions of one clip without tf.data and without packing."""
    settings = fbank.with_frame_shift(frame_shift_ms)
    return patch_tokens(
        features(read_audio(path), settings),
        patches,
        frame_shift_scale=settings.frame_shift_ms / fbank.frame_shift_ms,
    )


def assert_equal_batches(one, other):
    for left, right in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
        np.testing.assert_array_equal(left, right)


def take(dataset, batches):
    return list(dataset.take(batches).as_numpy_iterator())


def test_scan_of_mixed_files(scanned):
    assert len(scanned.source) == 12 and scanned.rejected == ()
    expected = [0.15 + 0.059 * number for number in range(12)]
    by_class = {name: [] for name in HERTZ}
    for clip, seconds in zip(scanned.source.clips, scanned.durations, strict=True):
        by_class[scanned.source.classes[clip.labels[0]]].append(seconds)
    for name, wanted in zip(HERTZ, np.reshape(expected, [3, 4]), strict=True):
        np.testing.assert_allclose(np.sort(by_class[name]), wanted, atol=0.04)  # mp3 adds delay


def test_training_batches_keep_the_contract(scanned, fbank):
    batches = training_batches(scanned, fbank, patches=PATCHES, packing=PACKING)
    inputs = {
        "tokens": tf.TensorSpec([3, 89, 256], tf.float32),
        "positions": tf.TensorSpec([3, 89, 4], tf.float32),
        "segment_ids": tf.TensorSpec([3, 89], tf.int32),
    }
    labels, weights = tf.TensorSpec([3, 5], tf.int32), tf.TensorSpec([3, 5], tf.float32)
    assert batches.element_spec == (inputs, labels, weights)
    for found, label, weight in take(batches, 5):
        np.testing.assert_array_equal(weight.sum(1), found["segment_ids"].max(1))
        assert (weight.sum(1) >= 1).all()
        assert set(label[weight > 0]) <= {0, 1, 2} and not label[weight == 0].any()
        padding = found["segment_ids"] == 0
        assert np.isfinite(found["tokens"]).all() and not found["tokens"][padding].any()


def test_evaluation_holds_every_clip_once(scanned, fbank):
    packing = dataclasses.replace(PACKING, rows=5, segments=1)
    batches = evaluation_batches(scanned, fbank, patches=PATCHES, packing=packing)
    assert batches.element_spec[3] == tf.TensorSpec([5, 1], tf.int64)
    batches = list(batches.as_numpy_iterator())
    weights = [batch[2] for batch in batches]
    assert [w.sum() for w in weights] == [5, 5, 2]  # the last is filled up with empty rows
    clips = clips_in(batches)
    assert sorted(clips) == list(range(12))
    counts = clip_tokens(scanned, fbank, PATCHES)[0]
    for clip_id, (tokens, _, label) in clips.items():
        assert len(tokens) == counts[clip_id]
        assert (label,) == scanned.source.clips[clip_id].labels


def test_no_iterator_waits_for_autotuning_when_it_ends(scanned, fbank):
    """Also of what is made of the batches, as the Meter of a training does."""
    for make in (training_batches, evaluation_batches):
        batches = make(scanned, fbank, patches=PATCHES, packing=PACKING).map(lambda *batch: batch)
        assert batches.repeat().options().autotune.enabled is False
    batches = pipeline.prediction_batches(list, fbank, patches=PATCHES, packing=PACKING)
    assert batches.options().autotune.enabled is False


def test_tokens_are_those_of_the_clip_alone(scanned, fbank):
    clips = clips_in(evaluation_batches(scanned, fbank, patches=PATCHES, packing=PACKING))
    for clip_id, (tokens, positions, _) in clips.items():
        path = scanned.source.clips[clip_id].path
        expected = direct(path, fbank, PATCHES)
        scale = VORBIS if path.endswith("ogg") else 1e-4
        np.testing.assert_allclose(tokens, expected[0], rtol=0, atol=scale)
        np.testing.assert_allclose(positions, expected[1], rtol=1e-6)


def test_drawn_sizes_and_shifts(scanned, fbank):
    """The extents tell what a clip drew; its tokens are those of that size and shift."""
    extents = {
        (size[0] / 16, size[1] * shift / 160): (size, shift)
        for size in DRAWN.patch_sizes
        for shift in DRAWN.frame_shifts_ms
    }
    batches = evaluation_batches(scanned, fbank, patches=DRAWN, packing=LONG_ROWS, seed=5)
    clips = clips_in(batches)
    draws = {}
    for clip_id, (tokens, positions, _) in clips.items():
        assert (positions[:, 2:] == positions[0, 2:]).all()
        draws[clip_id] = size, shift = extents[tuple(positions[0, 2:].tolist())]
        path = scanned.source.clips[clip_id].path
        alone = dataclasses.replace(DRAWN, patch_sizes=(size,), frame_shifts_ms=())
        expected = direct(path, fbank, alone, shift)
        atol = VORBIS if path.endswith("ogg") else 1e-4
        np.testing.assert_allclose(tokens, expected[0], rtol=0, atol=atol)
        np.testing.assert_allclose(positions, expected[1], rtol=1e-6, atol=1e-6)
    assert {size for size, _ in draws.values()} == set(DRAWN.patch_sizes)
    assert {shift for _, shift in draws.values()} == set(DRAWN.frame_shifts_ms)
    again = clips_in(batches)
    assert all(len(again[clip_id][0]) == len(clips[clip_id][0]) for clip_id in clips)


def test_one_training_batch_mixes_sizes(scanned, fbank):
    for inputs, _, _ in take(training_batches(scanned, fbank, patches=DRAWN, packing=LONG_ROWS), 2):
        extents = inputs["positions"][inputs["segment_ids"] > 0][:, 2:]
        assert len(np.unique(extents, axis=0)) >= 4


def test_a_run_repeats_exactly(scanned, fbank):
    def batches(seed):
        packing = dataclasses.replace(PACKING, row_length=401)
        return take(training_batches(scanned, fbank, patches=DRAWN, packing=packing, seed=seed), 2)

    first = batches(7)
    assert_equal_batches(first, batches(7))
    assert any(
        not np.array_equal(one[0]["tokens"], other[0]["tokens"])
        for one, other in zip(first, batches(8), strict=True)
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_each_pass_has_every_clip_in_a_new_order(scanned, fbank, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(pipeline, "CACHE_SECONDS", 0)
    # One clip a row and twelve rows a batch: a batch is a pass, in order.
    packing = PackSettings(rows=12, row_length=89, segments=1)
    expected = [direct(clip.path, fbank, PATCHES)[0] for clip in scanned.source.clips]
    orders = []
    for inputs, labels, _ in take(
        training_batches(scanned, fbank, patches=PATCHES, packing=packing), 3
    ):
        order = []
        for row, segment_ids, label in zip(
            inputs["tokens"], inputs["segment_ids"], labels[:, 0], strict=True
        ):
            tokens = row[segment_ids == 1]
            (clip_id,) = (
                i
                for i, other in enumerate(expected)
                if other.shape == tokens.shape and np.abs(tokens - other).max() < VORBIS
            )
            assert (label,) == scanned.source.clips[clip_id].labels
            order.append(clip_id)
        assert sorted(order) == list(range(12))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("in_memory", [True, False])
def test_shortened_clips_are_short_in_training_too(scanned, fbank, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(pipeline, "CACHE_SECONDS", 0)
    clips = pipeline.training_clips(scanned.shortened(0.1), fbank, patches=PATCHES)
    tokens = [len(clip["tokens"]) for clip in clips.take(24).as_numpy_iterator()]
    counts = clip_tokens(scanned, fbank, PATCHES)
    assert {*tokens} == {counts.min()} and counts.max() > counts.min()


@pytest.mark.parametrize("batches_of", [training_batches, evaluation_batches])
def test_a_clip_too_long_for_a_row_is_named_first(scanned, fbank, batches_of):
    counts = clip_tokens(scanned, fbank, PATCHES)[0]
    longest = scanned.source.clips[np.argmax(counts)]
    packing = dataclasses.replace(PACKING, row_length=int(counts.max()) - 1)
    gone = [dataclasses.replace(c, path=f"{c.path}.gone") for c in scanned.source.clips]
    source = dataclasses.replace(scanned.source, clips=tuple(gone))
    lost = dataclasses.replace(scanned, source=source)  # the check opens no file
    with pytest.raises(ValueError, match=r"Raise row_length \(--row-length\), .*crop") as error:
        batches_of(lost, fbank, patches=PATCHES, packing=packing)
    for part in (f"{longest.path}.gone", f"{counts.max()} tokens at patch 12x20", "more than"):
        assert part in str(error.value)


def test_a_long_clip_draws_from_the_sizes_at_which_it_fits_a_row(fbank):
    """And what fits at every size draws as if there were no rows."""
    lengths = [4000, 16000, 40000] * 8
    data = WaveformSource([np.linspace(0, 1, length) for length in lengths])
    tokens = clip_tokens(data, fbank, DRAWN)
    packing = PackSettings(rows=2, row_length=50, segments=3)
    fits = tokens <= packing.row_length
    assert [tuple(column) for column in fits.T[:3]] == [
        (True, True, True), (False, True, True), (False, False, True),
    ]  # fmt: skip
    fine = dataclasses.replace(DRAWN, frame_shifts_ms=())
    clips = clips_in(evaluation_batches(data, fbank, patches=fine, packing=packing, seed=3))
    assert sorted(clips) == list(range(len(lengths)))
    for clip_id, (found, _, _) in clips.items():
        draw = choice(int(fits[:, clip_id].sum()), {"clip_id": np.int64(clip_id)}, 3, PATCH)
        assert len(found) == tokens[fits[:, clip_id], clip_id][draw]
    endless = training_batches(data, fbank, patches=fine, packing=packing)
    assert all((inputs["segment_ids"] > 0).any() for inputs, _, _ in take(endless, 9))
    message = lengths_warning([data], fbank, patches=DRAWN, packing=packing)
    assert "16 of 24 clips are too long for a row of 50 tokens at some patch sizes" in message
    assert "(16 not from 8, 8 not from 16)" in message and "--row-length" in message
    roomy = dataclasses.replace(packing, row_length=999, segments=99)
    assert lengths_warning([data], fbank, patches=DRAWN, packing=roomy) is None
    small = dataclasses.replace(packing, row_length=15, overlong="crop")
    message = lengths_warning([data], fbank, patches=DRAWN, packing=small)
    assert "16 of 24 clips" in message and "lose their end" in message
    wide = dataclasses.replace(packing, row_length=4000, segments=16)
    message = lengths_warning([data], fbank, patches=DRAWN, packing=wide)
    assert "A row of 4,000 tokens has room for 16 clips" in message and "--segments" in message
    crop = AugmentSettings(crop_ms=1000.0 * min(lengths) / 16000)
    how = {"patches": DRAWN, "packing": packing, "augment": crop}
    assert lengths_warning([data], fbank, **how) is None
    assert "16 of 48 clips" in lengths_warning([data, data], fbank, **how)


def test_the_number_of_batches_is_known_when_they_are_counted(tmp_path, fbank):
    for number, name in enumerate(["a/0", "a/1", "b/0", "b/1", "b/2"]):
        write_sine(tmp_path / f"{name}.wav", 500 + 100 * number, seconds=0.3)
    data = scan_source(load_source(tmp_path, validation=0, test=0), fbank)
    packing = PackSettings(rows=1, row_length=89, segments=2)
    batches = evaluation_batches(data, fbank, patches=PATCHES, packing=packing, cache=True)
    assert batches.cardinality() == tf.data.UNKNOWN_CARDINALITY
    batches = pipeline.counted(batches)
    assert batches.cardinality() == 3
    for clip in data.source.clips:
        pathlib.Path(clip.path).unlink()  # all of them are in memory
    assert sorted(clips_in(batches)) == list(range(5)) and len(list(batches)) == 3


def test_overlong_crop(scanned, fbank):
    packing = PackSettings(rows=2, row_length=19, segments=3, overlong="crop")
    counts = clip_tokens(scanned, fbank, PATCHES)[0]
    assert counts.min() <= 19 < counts.max()
    clips = clips_in(evaluation_batches(scanned, fbank, patches=PATCHES, packing=packing))
    assert sorted(clips) == list(range(12))
    for clip_id, (tokens, _, _) in clips.items():
        # Six bands of patches and a prefix token: three columns make 19 tokens.
        assert len(tokens) == min(counts[clip_id], 19)
    small = dataclasses.replace(packing, row_length=6)
    with pytest.raises(ValueError, match="64 mel bins give 7 tokens at patch 12x20 in a single"):
        training_batches(scanned, fbank, patches=PATCHES, packing=small)


LENGTHS = (0, 77, 399, 400, 4001, 16000, 7321, 400, 12003)  # samples of clips in memory


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(8)
    return WaveformSource([rng.normal(0, 0.1, length).astype("float32") for length in LENGTHS])


def test_clips_in_memory_are_those_of_files(scanned, fbank):
    waveforms = [read_audio(clip.path) for clip in scanned.source.clips]
    data, settings = WaveformSource(waveforms), {"patches": DRAWN, "packing": LONG_ROWS}
    clips = clips_in(evaluation_batches(data, fbank, **settings))
    expected = clips_in(evaluation_batches(scanned, fbank, **settings))
    assert clips.keys() == expected.keys()
    for clip_id, (tokens, positions, label) in clips.items():
        np.testing.assert_allclose(tokens, expected[clip_id][0], rtol=0, atol=VORBIS)
        np.testing.assert_array_equal(positions, expected[clip_id][1])
        assert label == 0


def test_clips_in_memory_may_have_any_length(arrays, fbank):
    packing = packing_for(arrays, fbank, PATCHES, PACKING)
    clips = clips_in(evaluation_batches(arrays, fbank, patches=PATCHES, packing=packing))
    assert sorted(clips) == list(range(len(LENGTHS)))
    counts = clip_tokens(arrays, fbank, PATCHES)[0]
    for clip_id, (tokens, _, _) in clips.items():
        assert len(tokens) == counts[clip_id]
        spectrogram = features(arrays.waveforms[clip_id], fbank)
        expected, _ = patch_tokens(spectrogram, PATCHES)
        np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-4)
    training = training_batches(arrays, fbank, patches=PATCHES, packing=packing)
    assert not any(labels.any() for _, labels, _ in take(training, 3))


def test_clips_in_memory_are_named_by_their_place(arrays, fbank):
    small = dataclasses.replace(PACKING, row_length=20)
    with pytest.raises(ValueError, match=r"'waveforms\[5\]' \(1\.0 s\) has .* tokens"):
        evaluation_batches(arrays, fbank, patches=PATCHES, packing=small)
    other = dataclasses.replace(arrays, sample_rate=8000)
    with pytest.raises(ValueError, match=r"sample_rate=8000 .* differs .* 16000"):
        load_waveforms(other, 16000)


def test_stages_pass_other_columns_along(arrays, fbank):
    """A column added to the waveforms arrives in the slots of the rows."""
    clips = load_waveforms(arrays, fbank.sample_rate)
    clips = clips.map(lambda clip: {**clip, "samples": tf.size(clip["waveform"])})
    clips = extract_features(clips, fbank)
    names = {"features", "frame_shift_scale", "label", "clip_id", "samples"}
    assert set(clips.element_spec) == names
    assert clips.element_spec["features"].shape.as_list() == [None, 64]
    clips = make_tokens(clips, PATCHES)
    assert set(clips.element_spec) == {"tokens", "positions", "label", "clip_id", "samples"}
    slots = {}
    for row in pack(clips, LONG_ROWS).as_numpy_iterator():
        slots.update(zip(row["clip_ids"].tolist(), row["samples"].tolist(), strict=True))
    slots.pop(-1, None)
    assert slots == dict(enumerate(LENGTHS))


def test_stages_together_are_the_evaluation_batches(scanned, fbank):
    clips = load_waveforms(scanned, fbank.sample_rate)
    shifts = DRAWN.frame_shifts_ms
    clips = extract_features(clips, fbank, frame_shifts_ms=shifts, seed=5)
    rows = pack(make_tokens(clips, DRAWN, seed=5), LONG_ROWS)
    batches = evaluation_batches(scanned, fbank, patches=DRAWN, packing=LONG_ROWS, seed=5)
    for batch, (inputs, *others) in zip(batch_rows(rows, LONG_ROWS), batches, strict=True):
        assert_equal_batches(inputs, {name: batch[name] for name in inputs})
        assert_equal_batches(others, [batch[name] for name in ("labels", "weights", "clip_ids")])


def test_a_cached_source_is_read_once(tmp_path, fbank):
    for number, name in enumerate(["a/0", "a/1", "b/0"]):
        write_sine(tmp_path / f"{name}.wav", 500 + 100 * number, seconds=0.3)
    data = scan_source(load_source(tmp_path, validation=0, test=0), fbank)
    packing = dataclasses.replace(PACKING, rows=1, segments=1)
    batches = training_batches(data, fbank, patches=PATCHES, packing=packing).as_numpy_iterator()
    next(batches)
    for clip in data.source.clips:
        pathlib.Path(clip.path).unlink()
    assert len(list(itertools.islice(batches, 20))) == 20


def test_training_packing_holds_the_longest_clip_of_any_split(arrays, scanned, fbank):
    def row_length(*splits, **options):
        found = training_packing(splits, fbank, patches=PATCHES, batch_tokens=2048, **options)
        assert found.rows == max(1, 2048 // found.row_length) and found.segments == 16
        return found.row_length

    long = WaveformSource([np.zeros(16000 * 17)])
    most = clip_tokens(long, fbank, PATCHES).max()
    assert row_length(arrays) == row_length(scanned, arrays) == 256  # the shortest
    assert row_length(arrays, long) == row_length(long, arrays) == round_row_length(most) == 512
    assert row_length(WaveformSource([np.zeros(16000 * 200)])) == 4096  # the longest
    assert row_length(long, row_length=3001, overlong="crop") == 3001
    fine = AugmentSettings(frame_shift_range_ms=(2, 40))  # of the training clips alone
    for splits in ([arrays], [arrays, arrays]):
        drawn = training_packing(splits, fbank, patches=PATCHES, batch_tokens=2048, augment=fine)
        check_lengths(arrays, fbank, PATCHES, drawn, augment=fine)
        listed = dataclasses.replace(PATCHES, frame_shifts_ms=(2, 40))
        assert drawn == training_packing(splits, fbank, patches=listed, batch_tokens=2048)
    settings = training_packing(
        [arrays], fbank, patches=PATCHES, batch_tokens=600, segments=7, overlong="crop"
    )
    assert settings == PackSettings(2, 256, 7, overlong="crop")


@pytest.mark.parametrize("augment", [AugmentSettings(), AugmentSettings(token_dropout=0.5)])
def test_a_training_batch_holds_so_many_clips_on_average(fbank, augment):
    many = WaveformSource([np.zeros(16000 * (1 + number % 5)) for number in range(600)])
    found = training_packing(
        [many, WaveformSource([np.zeros(16000 * 17)])],
        fbank, patches=PATCHES, batch_clips=60, segments=32, augment=augment,
    )  # fmt: skip
    assert found.row_length == 512
    batches = batches_per_epoch(many, fbank, patches=PATCHES, packing=found, augment=augment)
    assert 600 / batches == pytest.approx(60, rel=0.2)
    short = WaveformSource([np.zeros(1600)] * 100)
    slots = training_packing([short], fbank, patches=PATCHES, batch_clips=60)
    assert slots.rows == 4  # of 16 slots


@pytest.mark.parametrize("given", [{}, {"batch_tokens": 512, "batch_clips": 4}])
def test_a_batch_is_given_in_tokens_or_in_clips(arrays, fbank, given):
    with pytest.raises(ValueError, match=r"batch_tokens=.*: give one of the two\."):
        training_packing([arrays], fbank, patches=PATCHES, **given)


@pytest.mark.parametrize("given", [{"batch_clips": 0}, {"batch_tokens": -1}])
def test_a_batch_of_nothing_is_refused(arrays, fbank, given):
    with pytest.raises(ValueError, match=r"batch_.* must be a positive number"):
        training_packing([arrays], fbank, patches=PATCHES, **given)


def test_evaluation_rows_are_long_enough(arrays, fbank):
    run = PackSettings(rows=6, row_length=256, segments=4)
    assert packing_for(arrays, fbank, PATCHES, run) == run
    few = WaveformSource(arrays.waveforms[:4])
    assert packing_for(few, fbank, PATCHES, run) == dataclasses.replace(run, rows=1, row_length=128)
    long = WaveformSource([np.zeros(16000 * 17), *arrays.waveforms])
    longer = packing_for(long, fbank, PATCHES, run)
    assert longer == dataclasses.replace(run, rows=3, row_length=512)
    endless = WaveformSource([np.zeros(16000), np.zeros(16000 * 400)])
    with pytest.raises(ValueError, match=r"waveforms\[1\] \(400\.0 s\) has 12,001 .* 8,192"):
        packing_for(endless, fbank, PATCHES, run)
    cut = packing_for(endless, fbank, PATCHES, run, crop=True)
    assert cut == dataclasses.replace(run, rows=1, row_length=8192, overlong="crop")


def test_rounded_row_lengths_are_few_and_close():
    tokens = np.arange(1, 8193)
    rounded = np.array([round_row_length(int(count)) for count in tokens])
    assert (rounded >= tokens).all() and len(np.unique(rounded)) == 20
    assert (rounded[128:] < 1.25 * tokens[128:] + 128).all()
    assert all(round_row_length(int(count)) == count for count in np.unique(rounded))


def test_multi_label_manifest(corpus):
    manifest = corpus.parent / f"{corpus.name}.csv"
    rows = [("low/16000.wav", "wind;rain"), ("top/8000.wav", "rain"), ("top/44100.mp3", "bird")]
    lines = [f"{corpus.name}/{path},{labels}" for path, labels in rows]
    manifest.write_text("\n".join(["path,label", *lines]))
    fbank = FbankSettings(mel_bins=64)
    found = scan_source(load_source(manifest, validation=0, test=0), fbank)
    batches = evaluation_batches(found, fbank, patches=PATCHES, packing=PACKING)
    assert batches.element_spec[1] == tf.TensorSpec([3, 5, 3], tf.float32)
    labels = {clip_id: label.tolist() for clip_id, (*_, label) in clips_in(batches).items()}
    assert found.source.classes == ("bird", "rain", "wind")
    assert labels == {0: [0, 1, 1], 1: [0, 1, 0], 2: [1, 0, 0]}
    training = training_batches(found, fbank, patches=PATCHES, packing=PACKING)
    assert training.element_spec[1] == tf.TensorSpec([3, 5, 3], tf.float32)
    for _, targets, weights in take(training, 1):
        np.testing.assert_array_equal(targets.any(-1), weights > 0)


def test_a_corrupt_file_is_left_out(tmp_path):
    for number, name in enumerate(["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]):
        write_sine(tmp_path / f"{name}.wav", 500 + 100 * number, seconds=0.3, seed=number)
    truncated = tmp_path / "a" / "1.wav"
    truncated.write_bytes(truncated.read_bytes()[:2000])
    (tmp_path / "b" / "2.wav").write_bytes(b"not a sound")
    fbank = FbankSettings(mel_bins=64)
    found = scan_source(load_source(tmp_path, validation=0, test=0), fbank)
    warning = found.warning()
    assert warning.startswith("2 of 6 clips are left out")
    assert str(truncated) in warning and str(tmp_path / "b" / "2.wav") in warning
    clips = clips_in(evaluation_batches(found, fbank, patches=PATCHES, packing=PACKING))
    paths = {found.source.clips[clip_id].path for clip_id in clips}
    kept = {"a/0", "a/2", "b/0", "b/1"}
    assert paths == {str(tmp_path / f"{name}.wav") for name in kept}


def loaded_by(statement):
    """Names of the modules that a fresh Python has after the statement."""
    command = f"import sys; {statement}; print(*sys.modules)"
    run = [sys.executable, "-c", command]
    done = subprocess.run(run, cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_never_loads_keras_flexast():
    imports = ", ".join(f"tf_data_pipelines.{name}" for name in MODULES)
    loaded = loaded_by(f"import {imports}")
    assert {f"tf_data_pipelines.{name}" for name in MODULES} <= loaded
    assert not {name for name in loaded if name.split(".")[0] == "keras_flexast"}
    for name in ["__init__", *MODULES]:
        text = (PACKAGE / f"{name}.py").read_text()
        for word in ("import keras", "from keras", "tf.keras", "import keras_flexast"):
            assert word not in text, (name, word)


def test_settings_and_matrices_need_numpy_only():
    loaded = loaded_by("import tf_data_pipelines.settings, tf_data_pipelines.resize")
    assert not {"tensorflow", "soundfile", "soxr"} & loaded
    for name in tf_data_pipelines.__all__:
        assert getattr(tf_data_pipelines, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        tf_data_pipelines.fit  # noqa: B018
