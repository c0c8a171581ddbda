"""The whole pipeline on tf.data service workers that have TensorFlow and nothing of ours."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import tensorflow as tf

from tf_data_pipelines import pipeline
from tf_data_pipelines.pipeline import evaluation_batches, training_batches
from tf_data_pipelines.prepare import prepare_data
from tf_data_pipelines.settings import AugmentSettings, FbankSettings, PackSettings, PatchSettings
from tf_data_pipelines.shards import read_prepared
from tf_data_pipelines.sources import load_source, scan_source

CLIPS = 14
FBANK = FbankSettings(mel_bins=64)
PATCHES = PatchSettings((8, 16, (16, 24)), frame_shifts_ms=(10.0, 20.0), grid=(4, 64))
PACKING = PackSettings(rows=2, row_length=512, segments=4)
DYNAMIC = tf.data.experimental.service.ShardingPolicy.DYNAMIC
DISPATCHER = """
import sys, tensorflow as tf
service = tf.data.experimental.service
server = service.DispatchServer(service.DispatcherConfig(port=int(sys.argv[1])))
"""
WORKER = """
import sys, tensorflow as tf
service = tf.data.experimental.service
server = service.WorkerServer(service.WorkerConfig(f"localhost:{sys.argv[1]}"))
"""
UNTIL_CLOSED = 'print("READY", flush=True)\nsys.stdin.read()\n'


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("sounds")
    for number in range(CLIPS):
        path = root / f"class{number % 3}" / f"{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.1, 6000 + 1111 * number), 16000)
    return scan_source(load_source(root, validation=0, test=0), FBANK)


@pytest.fixture(scope="module")
def stored(scanned, tmp_path_factory):
    """The same clips in shards of four."""
    root, out = os.path.dirname(os.path.dirname(scanned.clip_name(0))), tmp_path_factory.mktemp("s")
    prepare_data(root, out / "shards", clips_per_shard=4, shares=(0, 0))
    return read_prepared(out / "shards", FBANK)


@pytest.fixture(params=["files", "shards"])
def data(request, scanned, stored):
    return scanned if request.param == "files" else stored


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Address of a dispatcher with two workers, each a process of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with contextlib.ExitStack() as stack:
        processes = []
        for code in (DISPATCHER, WORKER, WORKER):
            process = subprocess.Popen(
                [sys.executable, "-c", code + UNTIL_CLOSED, str(port)], env=environment,
                cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            assert process.stdout.readline() == "READY\n"
        yield f"grpc://localhost:{port}"


def distributed(batches, address):
    return batches.apply(tf.data.experimental.service.distribute(DYNAMIC, address))


def operations(dataset):
    graph = tf.compat.v1.GraphDef.FromString(dataset._as_serialized_graph().numpy())
    inner = (node.op for function in graph.library.function for node in function.node_def)
    return {node.op for node in graph.node}.union(inner)


def clips_in(batches):
    """{clip id: its tokens}; each clip only once."""
    found = {}
    for inputs, _, weights, clip_ids in batches.as_numpy_iterator():
        np.testing.assert_array_equal(weights, clip_ids >= 0)
        for row, slot in np.argwhere(clip_ids >= 0):
            assert clip_ids[row, slot] not in found
            inside = inputs["segment_ids"][row] == slot + 1
            found[int(clip_ids[row, slot])] = inputs["tokens"][row][inside]
    return found


def test_plain_wav_files_need_no_python(scanned, tmp_path):
    assert scanned.graph_only
    graph = operations(training_batches(scanned, FBANK, patches=PATCHES, packing=PACKING))
    assert "DecodeRaw" in graph and not {op for op in graph if "Py" in op}, graph
    other = dataclasses.replace(scanned, graph_only=False)
    graph = operations(training_batches(other, FBANK, patches=PATCHES, packing=PACKING))
    assert "PyFuncStateless" in graph
    # One file of another kind is enough.
    flac = tmp_path / "0.flac"
    soundfile.write(flac, np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    first = dataclasses.replace(scanned.source.clips[0], path=str(flac))
    source = dataclasses.replace(scanned.source, clips=(first, *scanned.source.clips[1:]))
    assert not scan_source(source, FBANK).graph_only


def test_parallel_calls_share_no_map(scanned, monkeypatch):
    # tf.data.experimental.at of a map is not safe there: now and then a process crashed.
    monkeypatch.setattr(pipeline, "CACHE_SECONDS", 0)
    graph = operations(training_batches(scanned, FBANK, patches=PATCHES, packing=PACKING))
    assert "ParallelMapDatasetV2" in graph and "GetElementAtIndex" not in graph


def test_a_file_changed_since_the_scan_is_named(scanned, tmp_path):
    gone = tmp_path / "other.wav"
    soundfile.write(gone, np.zeros(8000), 8000)
    first = dataclasses.replace(scanned.source.clips[0], path=str(gone))
    source = dataclasses.replace(scanned.source, clips=(first, *scanned.source.clips[1:]))
    changed = dataclasses.replace(scanned, source=source)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"changed file:.*other\.wav"):
        list(evaluation_batches(changed, FBANK, patches=PATCHES, packing=PACKING))


def test_the_service_evaluates_every_clip_once(data, service):
    patches = dataclasses.replace(PATCHES, patch_sizes=(16,), frame_shifts_ms=())
    batches = evaluation_batches(data, FBANK, patches=patches, packing=PACKING)
    clips, expected = clips_in(distributed(batches, service)), clips_in(batches)
    assert sorted(clips) == list(range(CLIPS))
    for clip_id, tokens in clips.items():
        np.testing.assert_allclose(tokens, expected[clip_id], rtol=0, atol=1e-5)


def test_the_service_makes_training_batches(data, service):
    augment = AugmentSettings(gain_db=6.0, freq_mask=9, time_mask_ms=100.0)
    batches = training_batches(data, FBANK, patches=PATCHES, packing=PACKING, augment=augment)
    assert not {op for op in operations(batches) if "Py" in op}
    made = distributed(batches, service)
    assert made.element_spec == batches.element_spec
    extents = set()
    for inputs, labels, weights in made.take(100).as_numpy_iterator():
        np.testing.assert_array_equal(weights.sum(1), inputs["segment_ids"].max(1))
        assert weights.any(1).all() and set(labels[weights > 0]) <= {0, 1, 2}
        real = inputs["segment_ids"] > 0
        assert np.isfinite(inputs["tokens"]).all() and not inputs["tokens"][~real].any()
        extents |= set(map(tuple, inputs["positions"][real][:, 2:].tolist()))
        if len(extents) == 6:  # three patch sizes at two frame shifts
            break
    assert len(extents) == 6
