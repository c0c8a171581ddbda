"""What TensorBoard shows of a training: speed, full rows, and what the model attends to."""

import time

import keras
import numpy as np

from keras_flexast.distribution import batch_devices
from keras_flexast.evaluation import spread
from keras_flexast.inference.explanation import attention_map, over_spectrogram, patch_starts
from tf_data_pipelines.settings import MAX_ROW_LENGTH, PackSettings

PICTURE_SECONDS = 30.0  # between the pictures of two epochs: one takes as long as some steps
PICTURES = 4  # clips that are shown,
LONGEST = 30.0  # the first seconds of each
SCALE = 2  # pixels for a mel bin or frame
GAP = 4  # pixels between the two pictures of a clip


class Meter:
    """Counts the batches that a training takes: the clips and the tokens in them.

    Args:
        batches: Dataset of `training_batches`.

    Attributes:
        batches: the same Dataset, which counts what is taken from it, and notes when; on several
            devices as it was, because they take their batches from several datasets.
    """

    def __init__(self, batches):
        import tensorflow as tf

        self.counts = None
        self.batches = batches
        if batch_devices() > 1:
            return
        with tf.device("CPU"):
            self.counts = tf.Variable(np.zeros(3, "int64"))  # batches, clips, tokens
            self.ready_at = tf.Variable(0.0, dtype="float64")

        def count(inputs, labels, weights):
            clips, tokens = map(tf.math.count_nonzero, (weights, inputs["segment_ids"]))
            found = [1, clips, tokens]
            with tf.control_dependencies([
                self.counts.assign_add(tf.stack(found)), self.ready_at.assign(tf.timestamp()),
            ]):  # fmt: skip
                return inputs, labels, tf.identity(weights)

        self.batches = batches.map(count)

    def read(self):
        """The batches, clips and tokens so far, int64 (3,); None where nothing is counted."""
        return None if self.counts is None else self.counts.numpy()

    def last_ready(self):
        """When the last batch was ready, in seconds since 1970; 0 where nothing is counted."""
        return 0.0 if self.counts is None else float(self.ready_at.numpy())


class TrainingBoard(keras.callbacks.TensorBoard):
    """Keras's TensorBoard, with more at the end of each epoch.

    Beside loss, metrics and learning rate it shows `row_fill`, the share of the places of the rows
    that held a token; `clips_per_second` and `tokens_per_second`, without validation and pictures;
    on one device `input_wait`, an upper bound on the share of this time that steps waited for
    their batches; and of a few validation clips the spectrogram with the patch grid, over what the
    model attends to, see `attention_map`; these in the first and the last epoch, and every half
    minute between.

    Args:
        folder: folder of the logs.
        meter: Meter of the batches of `fit`.
        packing: PackSettings of the rows.
        pictures: ClipPictures; None for no pictures.
    """

    def __init__(self, folder, meter, *, packing, pictures=None):
        super().__init__(folder, write_graph=False)
        self.meter = meter
        self.places = packing.rows * packing.row_length
        self.pictures = pictures
        self.next_pictures = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self.start, self.seconds, self.before = time.perf_counter(), None, self.meter.read()
        self.waited, self.free = 0.0, time.time()

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch, logs)
        self.waited += max(0.0, self.meter.last_ready() - self.free)
        self.free = time.time()  # the step is over: StopDiverged, before this, read its loss

    def on_test_begin(self, logs=None):
        super().on_test_begin(logs)
        self._stop()

    def on_epoch_end(self, epoch, logs=None):
        self._stop()
        super().on_epoch_end(epoch, {**(logs or {}), **self._speed()})
        last = epoch + 1 == self.params["epochs"]
        if self.pictures is not None and (last or time.monotonic() >= self.next_pictures):
            self.next_pictures = time.monotonic() + PICTURE_SECONDS
            with self._val_writer.as_default():
                for name, picture in self.pictures.draw(self.model).items():
                    self.summary.image(name, picture[None], step=epoch)

    def _stop(self):
        """The steps of an epoch end with its validation, or with the epoch."""
        if getattr(self, "seconds", 0) is None:
            self.seconds, self.after = time.perf_counter() - self.start, self.meter.read()

    def _speed(self):
        if self.before is None or not (self.after > self.before).all():
            return {}
        batches, clips, tokens = (self.after - self.before).tolist()
        return {
            "row_fill": tokens / (batches * self.places),
            "clips_per_second": clips / self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "input_wait": self.waited / self.seconds,
        }


class ClipPictures:
    """Pictures of a few clips, which are read once: spectrogram, patch grid and attention.

    Args:
        run: Run, for its front end and its base patch.
        data: ScannedSource of the validation clips; a few of them, spread over all, are shown.
    """

    def __init__(self, run, data):
        from tf_data_pipelines import extract_features, load_waveforms, make_tokens

        patches, data = run.patches_at([run.model.backbone.base_patch]), spread(data, PICTURES)
        packing = PackSettings(row_length=MAX_ROW_LENGTH, overlong="crop")
        most = round(LONGEST * run.fbank.sample_rate)
        clips = load_waveforms(data, run.fbank.sample_rate)
        clips = clips.map(lambda clip: {**clip, "waveform": clip["waveform"][:most]})
        clips = extract_features(clips, run.fbank)
        clips = clips.map(lambda clip: {**clip, "spectrogram": clip["features"]})
        clips = [*make_tokens(clips, patches, packing=packing).as_numpy_iterator()]
        self.spectrograms = [clip["spectrogram"] for clip in clips]
        self.patches = patches
        self.names = [
            f"clip_{number}/{data.source.classes[clip.labels[0]]}"
            for number, clip in enumerate(data.source.clips, 1)
        ]
        self.counts = [len(clip["tokens"]) for clip in clips]
        longest = max(self.counts)
        self.inputs = {
            name: np.stack([np.pad(clip[name], [(0, longest - len(clip[name])), (0, 0)])
                            for clip in clips])
            for name in ("tokens", "positions")
        }  # fmt: skip
        self.inputs["segment_ids"] = np.int32(np.arange(longest) < np.array(self.counts)[:, None])

    def draw(self, model):
        """{name: picture uint8 (height, width, 3)}; low frequencies are at the bottom."""
        attention = attention_map(model, self.inputs)
        pictures = {}
        for number, name in enumerate(self.names):
            weights = attention[number, self.patches.prefix_tokens : self.counts[number]]
            pictures[name] = _picture(self.spectrograms[number], weights, self.patches)
        return pictures


def _picture(spectrogram, weights, patches):
    """A spectrogram with the patch grid, over the same with the attention of each patch."""
    from matplotlib import colormaps

    sizes, starts = patches.patch_sizes[0], patch_starts(spectrogram.shape, patches)
    loud = np.clip(spectrogram.T / 2 + 0.5, 0, 1)  # normalized: most lies within -1 and 1
    shown = colormaps["gray"](np.kron(loud, np.ones((SCALE, SCALE))))[..., :3]
    for axis, (places, size) in enumerate(zip(starts, sizes, strict=True)):
        edges = (SCALE * edge for edge in (*places, places[-1] + size))
        lines = [edge for edge in edges if edge < shown.shape[axis]]
        shown[(slice(None),) * axis + (lines,)] = (0.9, 0.6, 0.1)
    heat = over_spectrogram(weights, spectrogram.shape, patches)
    heat = colormaps["inferno"](heat)[..., :3] * (0.35 + 0.65 * loud[..., None])
    heat, gap = np.kron(heat, np.ones((SCALE, SCALE, 1))), np.ones((GAP, shown.shape[1], 3))
    return np.uint8(255 * np.concatenate([heat, gap, shown])[::-1])
