"""Every clip of a data set through the packed model, once, and what that says of it."""

import dataclasses

import keras
import numpy as np
from rich.progress import Progress

from keras_flexast.metrics import accuracy, mean_average_precision
from keras_flexast.models import PackedModel
from tf_data_pipelines.settings import patch_name

MAX_ROW_LENGTH = 8192  # tokens; dense attention over more needs over 3 GB a layer


def clip_outputs(model, batches, clips, description=None):
    """The model's output of every clip, in the order of the source.

    Args:
        model: keras.Model on packed batches with one output vector a segment slot. A
            PackedModel attends as is fastest for these rows, and keeps to it.
        batches: of `tf_data_pipelines.evaluation_batches`.
        clips: number of clips.
        description: text beside a progress bar; None shows none.

    Returns:
        outputs float32 (clips, width), and a dictionary: `rows` that held a clip, `tokens`
        in them, and `fill`, the share of their places that was a token.

    Raises:
        ValueError: a clip came back never or twice.
    """
    outputs, seen = np.zeros((clips, model.output_shape[-1]), "float32"), np.zeros(clips, "int64")
    rows = tokens = places = 0
    with Progress(disable=description is None) as progress:
        task = progress.add_task(description or "", total=clips)
        for inputs, _, weights, clip_ids in batches:
            inputs = {name: np.asarray(value) for name, value in inputs.items()}
            if isinstance(model, PackedModel):
                model.choose_attention(inputs["segment_ids"].shape[1])
            output = keras.ops.convert_to_numpy(model.predict_on_batch(inputs))
            real = np.asarray(weights) > 0
            output = output[:, : real.shape[1]]  # rows may be packed with fewer slots
            ids = np.asarray(clip_ids)[real]
            outputs[ids] = output[real]
            np.add.at(seen, ids, 1)
            used = inputs["segment_ids"] > 0
            rows += int(used.any(1).sum())
            tokens += int(used.sum())
            places += int(used.any(1).sum()) * used.shape[1]
            progress.advance(task, len(ids))
    if not (seen == 1).all():
        raise ValueError(
            f"{(seen != 1).sum()} of {clips} clips came back not exactly once; the batches do "
            f"not belong to this source."
        )
    return outputs, {"rows": rows, "tokens": tokens, "fill": tokens / places}


def evaluate_run(run, data, patch_sizes, frame_shift_ms=None, progress=False):
    """Accuracy (or mAP) at each patch size, with one set of weights.

    However many patch sizes, the batches have at most two shapes, so that the model compiles
    at most twice: rows of the run's own length, and longer rows for the sizes whose clips do
    not all fit them.

    Args:
        run: Run.
        data: ScannedSource of the clips; its classes are the run's.
        patch_sizes: ints or (frequency, time) pairs.
        frame_shift_ms: milliseconds; None for the filterbank's own.
        progress: show a bar for each size.

    Returns:
        list of dictionaries: `patch_size` (frequency, time), `metric` ("accuracy" or
        "mAP"), `value`, `clips`, `rows`, `tokens` and `fill`.
    """
    from tf_data_pipelines.pipeline import clip_tokens, evaluation_batches

    pairs = run.patches_at(patch_sizes, frame_shift_ms).patch_sizes
    most = clip_tokens(data, run.fbank, run.patches_at(pairs, frame_shift_ms)).max(1)
    fits = dict(zip(pairs, most <= run.packing.row_length, strict=True))
    results = {}
    for group in (True, False):  # one shape after the other: the model is traced for one
        chosen = [pair for pair in pairs if fits[pair] == group]
        if not chosen:
            continue
        together = run.patches_at(chosen, frame_shift_ms)
        packing = packing_for(data, run.fbank, together, run.packing)
        for pair in chosen:
            patches = run.patches_at([pair], frame_shift_ms)
            logits, counts = clip_outputs(
                run.model,
                evaluation_batches(data, run.fbank, patches, packing),
                len(data.source),
                f"Evaluating at patch {patch_name(pair)}" if progress else None,
            )
            metric, value = score_clips(data.source, logits)
            results[pair] = {
                "patch_size": pair, "metric": metric, "value": value, "clips": len(logits),
                **counts,
            }  # fmt: skip
    return [results[pair] for pair in pairs]


def score_clips(source, logits):
    """("accuracy", value) of single-label clips, ("mAP", value) of multi-label ones."""
    if source.multi_label:
        targets = np.zeros((len(source), len(source.classes)))
        for row, clip in zip(targets, source.clips, strict=True):
            row[list(clip.labels)] = 1
        return "mAP", mean_average_precision(targets, logits)
    return "accuracy", accuracy([clip.labels[0] for clip in source.clips], logits)


def packing_for(data, fbank, patches, packing):
    """Pack settings whose rows are long enough for every clip at every patch size.

    The run's own rows are kept where they suffice, so that one compilation serves; a few
    clips that fit into less than one of them get one row. Other lengths than the run's own
    are one of 20, so that a cache of compiled models serves the next clips too.

    Raises:
        ValueError: a clip needs more than MAX_ROW_LENGTH tokens; it is named.
    """
    from tf_data_pipelines.pipeline import clip_tokens

    tokens = clip_tokens(data, fbank, patches).max(0)
    most, total = int(tokens.max()), int(tokens.sum())
    if total <= packing.row_length and len(tokens) <= packing.segments:
        row_length = min(packing.row_length, _round_up(total))
        return dataclasses.replace(packing, rows=1, row_length=row_length)
    if most <= packing.row_length:
        return packing
    if most > MAX_ROW_LENGTH:
        clip = int(tokens.argmax())
        raise ValueError(
            f"clip {data.source.clips[clip].path!r} ({data.durations[clip]:.1f} s) has "
            f"{most:,} tokens, more than {MAX_ROW_LENGTH:,}. Use a larger patch size, or cut the "
            f"recording into shorter files."
        )
    length = _round_up(most)
    rows = max(1, packing.rows * packing.row_length // length)
    return dataclasses.replace(packing, row_length=length, rows=rows)


def _round_up(tokens):
    """To a multiple of 128 up to 1,024; above, of a quarter of the power of two below."""
    step = max(128, 2 ** ((tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step
