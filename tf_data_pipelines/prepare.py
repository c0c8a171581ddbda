"""Any data set to shards that trainings read; what is done stays when it is killed."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import threading

import numpy as np

from tf_data_pipelines.clips import reasons
from tf_data_pipelines.listing import SPLITS
from tf_data_pipelines.parts import AudioError
from tf_data_pipelines.settings import SHARES, FbankSettings, check_positive
from tf_data_pipelines.shards import (
    FULL_SCALE,
    INDEX,
    VERSION,
    checksum,
    from_text,
    front_end,
    is_prepared,
    to_text,
)
from tf_data_pipelines.sources import load_source

CLIPS_PER_SHARD = 128
MEASURED = 32  # training clips of a shard on which the mean and deviation are measured
PARTIAL = ".partial"  # ending of the folder while it is written
PLAN = "plan.json"
LOCK = "lock"


def prepare_data(
    data,
    out,
    *,
    layout=None,
    sample_rate=16000,
    clips_per_shard=CLIPS_PER_SHARD,
    shares=SHARES,
    seed=1337,
    progress=False,
):
    """Write a data set as shards, which are DATA wherever data is asked for.

    Every clip is decoded, mixed to mono, resampled and stored as 16-bit PCM, in a random order
    that follows from the names. Shards appear whole, one after the other, in OUT.partial, and
    OUT when all are there: after a kill, the same call goes on, and the result is that of an
    unbroken one, byte for byte.

    Args:
        data: folder, manifest or published data set, see `load_source`.
        out: folder to write.
        layout: name of the published layout; None tells it from what is there.
        sample_rate: sample rate of the stored clips in Hz.
        clips_per_shard: number of clips in a shard.
        shares: shares of validation and test clips where data has no splits.
        seed: random seed of these splits and of the order.
        progress: whether to show a progress bar.

    Returns:
        what dataset.json holds, a dictionary.

    Raises:
        FileExistsError: `out` exists, or OUT.partial is not of this preparation.
        BlockingIOError: another process prepares `out`.
        ValueError: data is prepared already, `out` lies in it, or more than half of the clips
            cannot be used; or as in `load_source`.
        OSError: nothing can be written; what is done stays.
    """
    FbankSettings(sample_rate=sample_rate)  # for its error, before anything is written
    check_positive("clips_per_shard", clips_per_shard, int)
    out = pathlib.Path(out)
    root = pathlib.Path(data).expanduser().resolve()
    if is_prepared(root):
        raise ValueError(f"data={str(data)!r} is prepared already. Give it as it is.")
    if out.resolve().is_relative_to(root):
        raise ValueError(f"{out} lies in the data, {data}. Choose a place outside.")
    if out.exists():
        what = "holds a prepared data set" if is_prepared(out) else "exists"
        raise FileExistsError(f"{out} {what} already. Choose another place, or remove it.")
    options = {} if layout is None else {"layout": layout}
    source = load_source(data, validation=shares[0], test=shares[1], seed=seed, **options)
    plan = _plan(source, root if root.is_dir() else root.parent, clips_per_shard, seed)
    partial = out.with_name(out.name + PARTIAL)
    fingerprint = plan.fingerprint(source, sample_rate)
    with _locked(partial, out):
        _check_plan(partial, out, fingerprint)
        if not (partial / INDEX).exists():
            done = _write_shards(partial, source, plan, sample_rate=sample_rate, progress=progress)
            facts = {**_facts(source, done, sample_rate), "fingerprint": fingerprint}
            _write(partial / INDEX, json.dumps(facts, indent=1) + "\n")
        for path in partial.iterdir():
            if path.suffix == ".json" and path.name != INDEX:
                path.unlink()
        (partial / LOCK).unlink()
        os.rename(partial, out)
    return json.loads((out / INDEX).read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which clips are in which shard.

    Args:
        ids: id of every clip, its path below the data and its part.
        shards: {name of a shard: (split, places of its clips)}.
    """

    ids: tuple[str, ...]
    shards: dict[str, tuple[str, np.ndarray]]

    def fingerprint(self, source, sample_rate):
        """Text that differs where the shards would."""
        clips = [[id, *clip.labels] for id, clip in zip(self.ids, source.clips, strict=True)]
        shards = {name: places.tolist() for name, (_, places) in self.shards.items()}
        facts = [VERSION, sample_rate, source.classes, source.multi_label, clips, shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _plan(source, root, clips_per_shard, seed):
    """Clips of each split in the order of a hash of their ids, so many in a shard."""
    ids = tuple(
        os.path.relpath(os.path.abspath(clip.name), root).replace(os.sep, "/")
        for clip in source.clips
    )
    keys = [hashlib.sha256(f"{seed} {id}".encode(errors="surrogateescape")).digest() for id in ids]
    shards = {}
    for split in SPLITS:
        places = [place for place, clip in enumerate(source.clips) if clip.split == split]
        places.sort(key=lambda place: (keys[place], ids[place]))
        for number, start in enumerate(range(0, len(places), clips_per_shard)):
            chosen = np.array(places[start : start + clips_per_shard])
            shards[f"{split}-{number:05}"] = (split, chosen)
    return _Plan(ids, shards)


@contextlib.contextmanager
def _locked(partial, out):
    """The folder, made where it is missing, for this process alone; a kill frees it."""
    partial.mkdir(parents=True, exist_ok=True)
    ours = (partial / LOCK).exists() or is_prepared(partial)
    if not ours and os.listdir(partial):
        raise FileExistsError(
            f"{partial} is in the way: a preparation would write there, and did not make it. Move "
            f"it, or choose another place than {out}."
        )
    with open(partial / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process prepares {out}. Wait for it, or choose another place."
            ) from None
        yield


def _check_plan(partial, out, fingerprint):
    """Raise where the folder was begun with other clips or options; else note what is begun."""
    begun = [path for path in (partial / PLAN, partial / INDEX) if path.exists()]
    for path in begun:
        if json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise FileExistsError(
                f"{partial} was begun with other data or options, or the data changed since. "
                f"Remove it, or choose another place than {out}."
            )
    if not begun:
        _write(partial / PLAN, json.dumps({"fingerprint": fingerprint}))


def _write_shards(folder, source, plan, *, sample_rate, progress):
    """Write the shards that are missing; the facts of all, in order."""
    import rich.progress

    stop = threading.Event()
    with (
        rich.progress.Progress(disable=not progress) as bar,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        task = bar.add_task("Preparing", total=len(plan.ids))

        def advance(clips=1):
            if stop.is_set():
                raise KeyboardInterrupt
            bar.advance(task, clips)

        def one(item):
            name, (split, places) = item
            done = folder / f"{name}.json"
            if not done.exists():
                facts = _write_shard(
                    folder / f"{name}.tfrecord", source, places, ids=plan.ids,
                    sample_rate=sample_rate, measure=split == "train", advance=advance,
                )  # fmt: skip
                _write(done, json.dumps({"name": f"{name}.tfrecord", "split": split, **facts}))
            else:
                advance(len(places))
            return json.loads(done.read_text(encoding="utf-8"))

        futures = [pool.submit(one, item) for item in plan.shards.items()]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(path, source, places, *, ids, sample_rate, measure, advance):
    """Write the usable ones of these clips; what dataset.json says of the shard."""
    import tensorflow as tf

    from tf_data_pipelines.fbank import log_mel

    settings = FbankSettings(sample_rate=sample_rate)
    samples, labels, rejected, clipped = [], [], [], 0
    sums = np.zeros(3)
    half = path.with_name(path.name + PARTIAL)
    with tf.io.TFRecordWriter(str(half)) as writer:
        for place in places:
            clip = source.clips[place]
            advance()
            try:
                waveform = clip.read(sample_rate, min_samples=settings.window)
            except AudioError as error:
                rejected.append([clip.name, str(error)])
                continue
            pcm = np.rint(waveform * FULL_SCALE)
            clipped += bool(np.abs(pcm).max() > FULL_SCALE)
            pcm = np.clip(pcm, -FULL_SCALE, FULL_SCALE - 1).astype("<i2")
            if measure and len(samples) < MEASURED:
                stored = pcm.astype("float32") / FULL_SCALE
                values = log_mel(stored, settings).numpy().astype("float64")
                sums += values.size, values.sum(), np.square(values).sum()
            samples.append(len(pcm))
            labels.append(clip.labels)
            writer.write(_example(ids[place], pcm, clip.labels, len(pcm) / sample_rate))
    with open(half, "rb") as file:
        os.fsync(file.fileno())
    facts = {
        "clips": len(samples),
        "bytes": half.stat().st_size,
        "sha256": checksum(half),
        "samples": to_text(samples),
        "label_counts": to_text([len(one) for one in labels]),
        "labels": to_text([label for one in labels for label in one]),
        "clipped": clipped,
        "rejected": rejected,
        "sums": sums.tolist(),
    }
    os.replace(half, path)
    return facts


def _example(id, pcm, labels, seconds):
    """Bytes of a tf.train.Example, the same ones every time."""
    import tensorflow as tf

    features = {
        "id": tf.train.Feature(
            bytes_list=tf.train.BytesList(value=[id.encode(errors="surrogateescape")])
        ),
        "pcm": tf.train.Feature(bytes_list=tf.train.BytesList(value=[pcm.tobytes()])),
        "labels": tf.train.Feature(int64_list=tf.train.Int64List(value=labels)),
        "seconds": tf.train.Feature(float_list=tf.train.FloatList(value=[seconds])),
    }
    example = tf.train.Example(features=tf.train.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def _facts(source, done, sample_rate):
    """What dataset.json holds, from the facts of the shards."""
    rejected = [pair for shard in done for pair in shard.pop("rejected")]
    clips = sum(shard["clips"] for shard in done)
    if 2 * len(rejected) > len(source) or not clips:
        raise ValueError(
            f"{len(rejected)} of {len(source)} clips cannot be used:\n{reasons(rejected)}"
        )
    count, total, squares = np.sum([shard.pop("sums") for shard in done], 0)
    mean = total / max(1, count)
    splits = {}
    for shard in done:
        of = splits.setdefault(shard["split"], {"clips": 0, "hours": 0.0})
        of["clips"] += shard["clips"]
        of["hours"] += int(from_text(shard["samples"]).sum()) / (sample_rate * 3600)
    return {
        "version": VERSION,
        "sample_rate": sample_rate,
        "classes": list(source.classes),
        "multi_label": source.multi_label,
        "splits": splits,
        "clipped": sum(shard.pop("clipped") for shard in done),
        "rejected": rejected,
        "missing": len(source.missing),
        "mean": float(mean),
        "std": float(np.sqrt(max(0.0, squares / max(1, count) - mean**2))),
        "fbank": front_end(FbankSettings(sample_rate=sample_rate)),
        "shards": [shard for shard in done if shard["clips"]],
    }


def _write(path, text):
    """Write a text file that appears whole or not at all."""
    half = path.with_name(path.name + PARTIAL)
    with open(half, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)
