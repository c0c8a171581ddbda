"""Any data set to shards that trainings read; what is done stays when it is killed."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from typing import Any

import numpy as np

from tf_data_pipelines.atomic import PARTIAL, atomic_write
from tf_data_pipelines.clips import check_usable, measured_splits
from tf_data_pipelines.hints import PathLike
from tf_data_pipelines.listing import SPLITS
from tf_data_pipelines.parts import HDF5, AudioError
from tf_data_pipelines.settings import SHARES, FbankSettings, check_positive
from tf_data_pipelines.shards import (
    FULL_SCALE,
    INDEX,
    VERSION,
    WEIGHT,
    checksum,
    from_text,
    front_end,
    ids_to_text,
    is_prepared,
    to_text,
)
from tf_data_pipelines.sources import load_source

CLIPS_PER_SHARD = 128  # at most
SHARD_BYTES = 64 << 20  # a training holds a few shards in memory
ANNOUNCED = 64  # clips whose length is asked for that
MEASURED = 32  # clips of a shard on which the mean and deviation are measured,
MEASURED_SHARDS = 128  # in the first of them: 4,096 clips
PLAN = "plan.json"
LOCK = "lock"
KEPT = (  # of what a shard's own JSON holds, in dataset.json
    "name", "split", "clips", "bytes", "sha256",
    "ids", "samples", "label_counts", "labels", "weights",
)  # fmt: skip


def prepare_data(
    data: PathLike,
    out: PathLike,
    *,
    layout: str | None = None,
    sample_rate: int = 16000,
    clips_per_shard: int | None = None,
    shares: tuple[float, float] = SHARES,
    seed: int = 1337,
    progress: bool = False,
) -> dict[str, Any]:
    """Write a data set as shards, which are DATA wherever data is asked for.

    Every clip is decoded, mixed to mono, resampled and stored as 16-bit PCM, in a random order
    that follows from the names. Shards appear whole, one after the other, in OUT.partial, and
    OUT when all are there: after a kill, the same call goes on, and the result is that of an
    unbroken one, byte for byte. A shard whose files changed meanwhile is written again.

    Args:
        data: folder, manifest or published data set, see `load_source`.
        out: folder to write.
        layout: name of the published layout; None tells it from what is there.
        sample_rate: sample rate of the stored clips in Hz.
        clips_per_shard: number of clips in a shard; None for CLIPS_PER_SHARD, or fewer where clips
            are long, so that a shard has some SHARD_BYTES.
        shares: shares of validation and test clips where data has no splits.
        seed: random seed of these splits and of the order.
        progress: whether to show a progress bar.

    Returns:
        what dataset.json holds, a dictionary.

    Raises:
        FileExistsError: `out` exists, or OUT.partial is not of this preparation.
        BlockingIOError: another process prepares `out`.
        ValueError: data is prepared already, `out` lies in it, more than half of the clips or
            all training clips of a class cannot be used; or as in `load_source`.
        OSError: nothing can be written; what is done stays.
    """
    FbankSettings(sample_rate=sample_rate)  # for its error, before anything is written
    if clips_per_shard is not None:
        check_positive("clips_per_shard", clips_per_shard, int)
    out = pathlib.Path(out)
    root = pathlib.Path(data).expanduser().resolve()
    if is_prepared(root):
        raise ValueError(f"data={str(data)!r} is prepared already. Give it as it is.")
    if out.resolve().is_relative_to(root):
        raise ValueError(f"{out} lies in the data, {data}. Choose a place outside.")
    _refuse_existing(out)
    options = {} if layout is None else {"layout": layout}
    source = load_source(data, validation=shares[0], test=shares[1], seed=seed, **options)
    partial = out.with_name(out.name + PARTIAL)
    with _locked(partial, out):
        begun = _begun(partial)
        if clips_per_shard is None:
            clips_per_shard = begun.get("clips_per_shard") or _fitting_clips(source, sample_rate)
        plan = _plan(source, data, clips_per_shard, seed)
        fingerprint = plan.fingerprint(source, sample_rate)
        if begun.setdefault("fingerprint", fingerprint) != fingerprint:
            raise FileExistsError(
                f"{partial} was begun with other data or options, or clips came or went since. "
                f"Remove it, or choose another place than {out}."
            )
        if not (partial / INDEX).exists():
            begun["clips_per_shard"] = clips_per_shard
            atomic_write(partial / PLAN, json.dumps(begun))
            done = _write_shards(partial, source, plan, sample_rate=sample_rate, progress=progress)
            facts = {**_facts(source, done, plan=plan, sample_rate=sample_rate), **begun}
            atomic_write(partial / INDEX, json.dumps(facts, indent=1) + "\n")
        _clean(partial, plan)
        os.rename(partial, out)
    return json.loads((out / INDEX).read_text(encoding="utf-8"))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which clips are in which shard.

    Args:
        root: folder of the data.
        ids: id of every clip, its path below the data and its part.
        shards: {name of a shard: (split, places of its clips)}.
    """

    root: str
    ids: tuple[str, ...]
    shards: dict[str, tuple[str, np.ndarray]]

    def fingerprint(self, source, sample_rate):
        """Text that differs where the shards would."""
        pairs = zip(self.ids, source.clips, strict=True)
        clips = [[id, clip.weight, *clip.labels] for id, clip in pairs]
        shards = {name: places.tolist() for name, (_, places) in self.shards.items()}
        facts = [VERSION, sample_rate, source.classes, source.multi_label, clips, shards]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _plan(source, data, clips_per_shard, seed):
    """Clips of each split in the order of a hash of their ids, so many in a shard."""
    root = os.path.abspath(pathlib.Path(data).expanduser())
    root = root if os.path.isdir(root) else os.path.dirname(root)
    ids = tuple(_id(clip, root) for clip in source.clips)
    keys = [hashlib.sha256(f"{seed} {id}".encode(errors="surrogateescape")).digest() for id in ids]
    shards = {}
    for split in SPLITS:
        places = [place for place, clip in enumerate(source.clips) if clip.split == split]
        places.sort(key=lambda place: (keys[place], ids[place]))
        for number, start in enumerate(range(0, len(places), clips_per_shard)):
            chosen = np.array(places[start : start + clips_per_shard])
            shards[f"{split}-{number:05}"] = (split, chosen)
    return _Plan(root, ids, shards)


def _id(clip, root):
    """Path of a clip below the data, and its part to the microsecond."""
    path = _below(clip.path, root)
    if clip.stop is None:
        return f"{path}, from {clip.start:.6f} s" if clip.start else path
    return f"{path}, {clip.start:.6f} to {clip.stop:.6f} s"


def _below(path, root):
    return os.path.relpath(os.path.abspath(path), root).replace(os.sep, "/")


def _fitting_clips(source, sample_rate):
    """How many clips a shard of some SHARD_BYTES has, by what a few of the files announce."""
    seconds = []
    for clip in source.clips[:: max(1, len(source) // ANNOUNCED)]:
        with contextlib.suppress(AudioError):
            seconds.append(clip.announced_seconds())
    bytes_of_a_clip = 2 * sample_rate * np.mean(seconds or [1.0])
    return int(np.clip(SHARD_BYTES / bytes_of_a_clip, 1, CLIPS_PER_SHARD))


def _stamp(clips):
    """Text that differs where a file of these clips was changed; reading finds what is missing."""
    files, facts = {"".join(clip.path.partition(HDF5)[:2]).rstrip("/") for clip in clips}, []
    for path in sorted(files):
        with contextlib.suppress(OSError):
            found = os.stat(path)
            facts.append([found.st_size, found.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _refuse_existing(out):
    if os.path.lexists(out):
        what = "holds a prepared data set" if is_prepared(out) else "exists"
        raise FileExistsError(f"{out} {what} already. Choose another place, or remove it.")


@contextlib.contextmanager
def _locked(partial, out):
    """The folder, made where it is missing, for this process alone; a kill frees it."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        raise OSError("prepare needs Linux or macOS. Run it there, or in WSL.") from None
    busy = BlockingIOError(f"another process prepares {out}. Wait for it, or choose another place.")
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino != os.stat(partial / LOCK).st_ino:
                raise busy  # it has just ended
        except (BlockingIOError, FileNotFoundError):
            raise busy from None
        foreign = [name for name in os.listdir(partial) if name != LOCK and not _is_half(name)]
        if foreign and not _begun(partial):
            if not os.path.getsize(partial / LOCK):
                (partial / LOCK).unlink()
            raise FileExistsError(
                f"{partial} is in the way: a preparation would write there, and did not make it. "
                f"Move it, or choose another place than {out}."
            )
        if not foreign and os.path.lexists(out):  # since this call began
            (partial / LOCK).unlink()
            partial.rmdir()
            _refuse_existing(out)
        yield


def _is_half(name):
    """Whether a file of this name is what a killed process was writing."""
    return name.startswith(".") and name.endswith(PARTIAL)


def _begun(partial):
    """What is known of a preparation that was begun in a folder; {} if none was."""
    for name in (INDEX, PLAN):
        found = _json_of(partial / name)
        if isinstance(found.get("fingerprint"), str):
            return {key: found.get(key) for key in ("fingerprint", "clips_per_shard")}
    return {}


def _json_of(path):
    """The dictionary in a JSON file; {} where it is missing, damaged or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _clean(partial, plan):
    """Remove what only the preparation needed, and nothing else."""
    shards = {shard["name"] for shard in _json_of(partial / INDEX)["shards"]}
    for name in plan.shards:
        (partial / f"{name}.json").unlink(missing_ok=True)
        (partial / f"{name}.tfrecord{PARTIAL}").unlink(missing_ok=True)
        if f"{name}.tfrecord" not in shards:  # no clip of it can be used
            (partial / f"{name}.tfrecord").unlink(missing_ok=True)
    for name in os.listdir(partial):
        if name in (PLAN, LOCK) or _is_half(name):
            (partial / name).unlink()


def _write_shards(folder, source, plan, *, sample_rate, progress):
    """Write the shards that are missing; the facts of all, in order."""
    import rich.progress

    from tf_data_pipelines.fbank import log_mel_sums

    stop, measured = threading.Event(), measured_splits(source)
    sums = log_mel_sums(FbankSettings(sample_rate=sample_rate))
    with (
        rich.progress.Progress(disable=not progress) as bar,
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        task = bar.add_task("Preparing", total=len(plan.ids))

        def advance(clips=1):
            if stop.is_set():
                raise concurrent.futures.CancelledError
            bar.advance(task, clips)

        of_measure = [name for name, (split, _) in plan.shards.items() if split in measured]
        of_measure = set(of_measure[:MEASURED_SHARDS])

        def write_or_skip(item):
            name, (split, places) = item
            path = folder / f"{name}.json"
            stamp = _stamp([source.clips[place] for place in places])
            facts = _json_of(path)
            if facts.get("stamp") == stamp:
                advance(len(places))
                return facts
            facts = _write_shard(
                folder / f"{name}.tfrecord", source, places, plan=plan,
                sample_rate=sample_rate, measure=sums if name in of_measure else None,
                advance=advance,
            )  # fmt: skip
            facts = {"name": f"{name}.tfrecord", "split": split, **facts, "stamp": stamp}
            atomic_write(path, json.dumps(facts))
            return facts

        futures = [pool.submit(write_or_skip, item) for item in plan.shards.items()]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(path, source, places, *, plan, sample_rate, measure, advance):
    """Write the usable ones of these clips; what dataset.json says of the shard, and more."""
    import tensorflow as tf

    min_samples = FbankSettings(sample_rate=sample_rate).window
    kept, samples, rejected, clipped = [], [], [], 0
    sums = np.zeros(3)
    half = path.with_name(path.name + PARTIAL)
    with _no_room_named(path.parent), tf.io.TFRecordWriter(os.fsencode(half)) as writer:
        for place in places:
            clip = source.clips[place]
            advance()
            try:
                waveform = clip.read(sample_rate, min_samples=min_samples)
            except AudioError as error:
                reason = str(error).replace(clip.path, _below(clip.path, plan.root))
                rejected.append([int(place), reason])
                continue
            pcm = np.rint(waveform * FULL_SCALE)
            clipped += bool(np.abs(pcm).max() > FULL_SCALE)
            pcm = np.clip(pcm, -FULL_SCALE, FULL_SCALE - 1).astype("<i2")
            if measure and len(kept) < MEASURED:
                sums += measure(pcm.astype("float32") / FULL_SCALE)
            kept.append(int(place))
            samples.append(len(pcm))
            writer.write(_example(plan.ids[place], pcm, clip.labels, len(pcm) / sample_rate))
    with open(half, "rb") as file:
        os.fsync(file.fileno())
    clips = [source.clips[place] for place in kept]
    facts = {
        "clips": len(clips),
        "bytes": half.stat().st_size,
        "sha256": checksum(half),
        "ids": ids_to_text([plan.ids[place] for place in kept]),
        "samples": to_text(samples),
        "label_counts": to_text([len(clip.labels) for clip in clips]),
        "labels": to_text([label for clip in clips for label in clip.labels]),
        "weights": to_text([clip.weight for clip in clips], WEIGHT),
        "clipped": clipped,
        "rejected": rejected,
        "sums": sums.tolist(),
    }
    os.replace(half, path)
    return facts


@contextlib.contextmanager
def _no_room_named(folder):
    """Turn TensorFlow's error for a full disk, which is no OSError, into one that is."""
    import tensorflow as tf

    try:
        yield
    except (tf.errors.ResourceExhaustedError, tf.errors.OutOfRangeError, tf.errors.UnknownError):
        raise OSError(
            f"{folder} cannot be written: there is no room. Make room, and give the same command "
            f"again: what is done stays."
        ) from None


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


def _facts(source, done, *, plan, sample_rate):
    """What dataset.json holds, from the facts of the shards."""
    from tf_data_pipelines.fbank import mean_and_std

    rejected = {place: reason for shard in done for place, reason in shard["rejected"]}
    kept = np.ones(len(source), bool)
    kept[list(rejected)] = False
    named = [(plan.ids[place], rejected[place]) for place in sorted(rejected)]
    check_usable(
        source,
        source.select(kept),
        [(source.clips[place].name, reason) for place, reason in rejected.items()],
    )
    mean, std = mean_and_std(shard["sums"] for shard in done)
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
        "clipped": sum(shard["clipped"] for shard in done),
        "rejected": named,
        "missing": list(source.missing),
        "mean": mean,
        "std": std,
        "fbank": front_end(FbankSettings(sample_rate=sample_rate)),
        "shards": [{key: shard[key] for key in KEPT} for shard in done if shard["clips"]],
    }
