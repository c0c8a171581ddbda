"""TFLite Metadata: what is attached is read back, by us and by MediaPipe; models run on."""

import io
import zipfile

import numpy as np
import pytest

from keras_flexast.export.tflite_metadata import attach_metadata, read_metadata

SAMPLES, LABELS = 1600, ("Büro", "Hund, groß", "three")
ARTIFACT = {"fbank": {"mean": -4.5}, "patch_sizes": {"serving_default": [16, 24]}}
GIVEN = {"artifact": ARTIFACT, "sample_rate": 8000}
WORDS = {
    "name": "ears",
    "description": "hears three things",
    "version": "1.2",
    "author": "someone",
    "license": "Apache-2.0",
}


@pytest.fixture(scope="module")
def plain():
    """Bytes of a small model from a waveform to three scores."""
    import tensorflow as tf

    matrix = np.random.default_rng(0).normal(size=(SAMPLES, 3)).astype("float32")
    function = tf.function(
        lambda waveform: tf.nn.softmax(waveform @ matrix),
        input_signature=[tf.TensorSpec([1, SAMPLES], tf.float32)],
    )
    return tf.lite.TFLiteConverter.from_concrete_functions(
        [function.get_concrete_function()]
    ).convert()


@pytest.fixture(scope="module")
def described(plain):
    return attach_metadata(plain, LABELS, **GIVEN, **WORDS)


@pytest.fixture(scope="module")
def waveform():
    return np.random.default_rng(1).normal(scale=0.05, size=(1, SAMPLES)).astype("float32")


def scores(content, waveform):
    interpreter = pytest.importorskip("ai_edge_litert.interpreter").Interpreter
    interpreter = interpreter(model_content=content)
    interpreter.allocate_tensors()
    (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], waveform)
    interpreter.invoke()
    return interpreter.get_tensor(result["index"])[0]


def test_what_is_attached_is_read_back(described):
    found = read_metadata(described)
    assert {name: found[name] for name in WORDS} == WORDS
    assert found["labels"] == LABELS
    assert found["artifact"] == ARTIFACT
    assert found["min_parser_version"] == "1.3.0"  # AudioProperties came with it
    (graph,) = found["subgraphs"]
    assert graph["input"]["name"] == "waveform"
    assert (graph["input"]["sample_rate"], graph["input"]["channels"]) == (8000, 1)
    assert graph["output"]["labels"] == "labels.txt"
    assert (graph["output"]["min"], graph["output"]["max"]) == (0, 1)


def test_features_are_no_audio(plain):
    found = read_metadata(attach_metadata(plain, LABELS, **GIVEN, input="features"))
    (graph,) = found["subgraphs"]
    assert graph["input"]["name"] == "features"
    assert "sample_rate" not in graph["input"]
    assert found["min_parser_version"] == "1.0.0"


def test_interpreters_do_not_mind(plain, described, waveform):
    np.testing.assert_array_equal(scores(described, waveform), scores(plain, waveform))


def test_the_tail_is_a_zip_of_stored_files(described):
    with zipfile.ZipFile(io.BytesIO(described)) as archive:
        assert archive.namelist() == ["labels.txt", "artifact.json"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert tuple(archive.read("labels.txt").decode().splitlines()) == LABELS


def test_attached_again_it_replaces(plain, described):
    other = attach_metadata(plain, ["a", "b", "c"], artifact={}, sample_rate=44100)
    assert attach_metadata(other, LABELS, **GIVEN, **WORDS) == described


def test_buffers_are_aligned(described):
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    model = schema.Model.GetRootAs(described, 0)
    starts = []
    for index in range(model.BuffersLength()):
        table = model.Buffers(index)._tab
        if table.Offset(4):
            starts.append(table.Vector(table.Offset(4)))
    assert len(starts) > 2
    assert not np.any(np.array(starts) % 16), starts


def test_errors(plain, described):
    with pytest.raises(
        ValueError,
        match=r"\[\[1, 3\]\]; expected one input, or two with `length`, and one output \(1, 2",
    ):
        attach_metadata(plain, LABELS[:2], **GIVEN)
    for function in (read_metadata, lambda content: attach_metadata(content, LABELS, **GIVEN)):
        with pytest.raises(ValueError, match=r"not a TFLite model: bytes 4 to 8 are b'loud', not"):
            function(b"not loud")
    with pytest.raises(ValueError, match="no metadata"):
        read_metadata(plain)
    with pytest.raises(ValueError, match="begins with b'M009', not b'M001': another schema"):
        read_metadata(described.replace(b"M001", b"M009"))


def test_media_pipe_classifies(described, waveform, tmp_path):
    pytest.importorskip("mediapipe")
    from mediapipe.tasks.python import audio
    from mediapipe.tasks.python.components.containers.audio_data import AudioData

    path = tmp_path / "ears.tflite"
    path.write_bytes(described)
    with audio.AudioClassifier.create_from_model_path(str(path)) as classifier:
        (result,) = classifier.classify(AudioData.create_from_array(waveform[0], 8000))
    found = {one.category_name: one.score for one in result.classifications[0].categories}
    expected = dict(zip(LABELS, scores(described, waveform), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)


def test_media_pipe_reads_every_field(described):
    tables = pytest.importorskip("mediapipe.tasks.metadata.metadata_schema_py_generated")
    models = pytest.importorskip("mediapipe.tasks.metadata.schema_py_generated")
    model = models.ModelT.InitFromPackedBuf(described, 0)
    (place,) = [one.buffer for one in model.metadata if one.name == b"TFLITE_METADATA"]
    content = bytes(model.buffers[place].data)
    assert tables.ModelMetadata.ModelMetadataBufferHasIdentifier(content, 0)
    found = tables.ModelMetadataT.InitFromPackedBuf(content, 0)
    assert {name: getattr(found, name).decode() for name in WORDS} == WORDS
    assert [file.name for file in found.associatedFiles] == [b"artifact.json"]
    (graph,) = found.subgraphMetadata
    (given,), (result,) = graph.inputTensorMetadata, graph.outputTensorMetadata
    assert vars(given.content.contentProperties) == {"sampleRate": 8000, "channels": 1}
    (labels,) = result.associatedFiles
    assert labels.name == b"labels.txt"
    assert labels.type == tables.AssociatedFileType.TENSOR_AXIS_LABELS
    assert (list(result.stats.min), list(result.stats.max)) == ([0], [1])
