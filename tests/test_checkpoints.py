"""Published checkpoints: every format read whole, nothing in them run, damage named."""

import io
import json
import math
import os
import pathlib
import pickle
import re
import resource
import shutil
import struct
import sys
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from helpers import ONCE, randomize, run_python

from keras_flexast.conversion.checkpoints import read_checkpoint

DATA = pathlib.Path(__file__).parent / "data"
FOLDER = DATA / "hf_ast_overlap"
WEIGHTS = {"b.weight": np.arange(6, dtype="float32").reshape(2, 3), "a": np.arange(5)}

# What torch 2.13.0 wrote to zip.pth and legacy.pth, every name behind `module.`; each as the
# same expression of torch.arange and, where it matters, as a view.
WHOLE = np.arange(24, dtype="float32") / 4
SAVED = {
    "matrix": (np.arange(6, dtype="float32") / 4).reshape(2, 3),
    "transposed": np.arange(15, dtype="float32").reshape(3, 5).T,
    "whole": WHOLE,
    "inner.module.slice": WHOLE[7:19].reshape(3, 4)[:, 1:3],  # offset 8 in the storage of `whole`
    "expanded": np.arange(3, dtype="float32") + np.zeros((2, 1), "float32"),  # stride 0
    "count": np.array(41),
    "float16": np.arange(7, dtype="float16") / 8,
    "bfloat16": ((np.arange(11) * 23 - 128) / 64).astype("float32"),  # 8 bits, none is rounded
    "float64": np.arange(5) / 3,
    "int32": np.arange(5, dtype="int32") * -70000,
    "int16": np.arange(5, dtype="int16") * -300,
    "int8": np.arange(5, dtype="int8") - np.int8(3),
    "uint8": np.arange(5, dtype="uint8") * 60,
    "bool": np.arange(9) % 3 == 0,
    "empty": np.zeros((0, 3), "float32"),
    "parameter": -np.arange(4, dtype="float32"),  # a torch.nn.Parameter
}


def assert_same(weights, expected):
    assert list(weights) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(weights[name], expected[name], name, strict=True)


def naming(path):
    """Pattern for `match`: a message that names the file."""
    return re.escape(str(path))


# === Pickles put together by hand ===


def pickled(value):
    """Opcodes that leave value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def named(name):
    return "c{}\n{}\n".format(*name.split(":")).encode()


def called(name, *arguments):
    return named(name) + b"(" + b"".join(arguments) + b"tR"


def dictionary(entries):
    return b"}(" + b"".join(pickled(name) + value for name, value in entries.items()) + b"u"


def tensor(offset, shape, strides):
    """A view of the storage of four float32 that `write_zip` and `write_legacy` add."""
    storage = [pickled("storage"), named("torch:FloatStorage"), *map(pickled, ("0", "cpu", 4))]
    view = map(pickled, (offset, shape, strides, False, {}))
    return called("torch._utils:_rebuild_tensor_v2", b"(" + b"".join(storage) + b"tQ", *view)


def write_zip(path, program, *, storage=bytes(16)):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/data/0", storage)


def write_legacy(path, program, *, storage=bytes(16), place=3, count=4):
    parts = [pickled(v) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, ["0"])]
    parts[place] = program
    content = b"".join(b"\x80\x02" + part + b"." for part in parts)
    path.write_bytes(content + struct.pack("<q", count) + storage)


writers = pytest.mark.parametrize("write", [write_zip, write_legacy])


# === PyTorch files ===


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_a_file_of_torch_is_read_without_torch(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    checkpoint = read_checkpoint(DATA / "torch" / name)
    assert_same(checkpoint.weights, SAVED)
    assert checkpoint.origin == str(DATA / "torch" / name)
    assert (checkpoint.config, checkpoint.features, checkpoint.ignored) == ({}, {}, {})


def test_the_state_dictionary_of_a_training_checkpoint_is_found():
    checkpoint = read_checkpoint(DATA / "torch" / "wrapped.pth")
    assert_same(checkpoint.weights, {"weight": np.arange(6, dtype="float32").reshape(2, 3)})
    assert checkpoint.ignored == {"steps": "not an array", "note": "not an array"}


@pytest.mark.parametrize("wrapper", ["model", "model_state", "model_state_dict", "state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_every_wrapper_and_suffix(tmp_path, wrapper, suffix):
    path = tmp_path / f"x{suffix}"
    state = dictionary({"module.a": tensor(1, (2,), (2,))})
    numbers = np.arange(4, dtype="float32")
    program = dictionary({"epoch": pickled(3), wrapper: state})
    write_zip(path, program, storage=numbers.tobytes())
    assert_same(read_checkpoint(path).weights, {"a": numbers[1::2]})


@pytest.mark.parametrize("zipped", [True, False])
def test_equal_to_torch(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    layers = torch.nn.Conv2d(3, 5, (2, 7)), torch.nn.BatchNorm1d(11), torch.nn.Linear(13, 2)
    model = torch.nn.Sequential(*layers, torch.nn.Embedding(3, 5).half())
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    assert_same(read_checkpoint(str(path)).weights, expected)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("os:mkdir", "{mark}"),
        ("posix:system", "mkdir {mark}"),
        ("builtins:eval", "__import__('os').mkdir('{mark}')"),
        ("builtins:exec", "import os; os.mkdir('{mark}')"),
        ("__builtin__:eval", "__import__('os').mkdir('{mark}')"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="the programs need a POSIX shell")
def test_no_program_is_run(tmp_path, name, argument):
    mark, path = tmp_path / "mark", tmp_path / "x.pth"
    program = called(name, pickled(argument.format(mark=mark)))
    pickle.loads(b"\x80\x02" + program + b".")
    mark.rmdir()  # so the program does run where nothing stops it

    refused = rf"{naming(path)} asks for {name.replace(':', '.')}.*not run.*state_dict"
    for content in (program, dictionary({"a": tensor(0, (4,), (1,)), "b": program})):
        write_zip(path, content)
        with pytest.raises(ValueError, match=refused):
            read_checkpoint(path)
    for place in range(5):
        write_legacy(path, program, place=place)
        with pytest.raises(ValueError, match=refused):
            read_checkpoint(path)
    path.write_bytes(b"\x80\x02" + program + b".")
    with pytest.raises(ValueError, match=refused):
        read_checkpoint(path)
    assert os.listdir(tmp_path) == ["x.pth"]


@writers
@pytest.mark.parametrize(
    "name",
    [
        "torch.storage:_load_from_bytes",
        "torch:load",
        "torch.nn.modules.linear:Linear",
        "torch._utils:_rebuild_device_tensor_from_numpy",
        "numpy._core.multiarray:_reconstruct",
        "collections:OrderedDict.fromkeys",
        "keras_flexast.conversion.torch_reader:read_torch",
        "copyreg:_reconstructor",
        "os:FloatStorage",
    ],
)
def test_only_what_tensors_need_is_looked_up(tmp_path, write, name):
    path = tmp_path / "x.pth"
    write(path, dictionary({"a": tensor(0, (4,), (1,)), "b": named(name)}))
    with pytest.raises(ValueError, match=rf"{naming(path)} asks for {name.replace(':', '.')}, "):
        read_checkpoint(path)


@writers
@pytest.mark.parametrize(
    "view",
    [
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (4, (), ()),
        (0, (2, 2), (3, 1)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (0, (-2,), (0,)),
        (0, (2, 2), (1,)),
    ],
)
def test_a_tensor_stays_within_its_storage(tmp_path, write, view):
    path = tmp_path / "x.pth"
    write(path, dictionary({"a": tensor(*view)}))
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)
    write(path, dictionary({"a": tensor(3, (2, 1), (0, 9))}))  # as far as it goes
    assert read_checkpoint(path).weights["a"].shape == (2, 1)


@writers
@pytest.mark.parametrize("size", [0, 15])
def test_a_storage_is_whole(tmp_path, write, size):
    path = tmp_path / "x.pth"
    write(path, dictionary({"a": tensor(0, (2,), (1,))}), storage=bytes(size))
    with pytest.raises(ValueError, match=rf"{naming(path)} .* {size} bytes, not 16"):
        read_checkpoint(path)


def test_a_storage_has_as_many_numbers_as_announced(tmp_path):
    path = tmp_path / "x.pth"
    write_legacy(path, dictionary({"a": tensor(0, (2,), (1,))}), count=5)
    with pytest.raises(ValueError, match=rf"{naming(path)} .*storage 0 has 5 values, not 4"):
        read_checkpoint(path)


def test_numbers_changed_on_the_way_are_noticed(tmp_path):
    path = tmp_path / "x.pth"
    content = bytearray((DATA / "torch" / "zip.pth").read_bytes())
    content[content.index(WHOLE.tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)


def test_big_endian_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    write_zip(path, dictionary({"a": tensor(0, (2,), (1,))}))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(ValueError, match=rf"{naming(path)} .*not little endian"):
        read_checkpoint(path)


def test_a_pickle_of_something_else(tmp_path):
    path = tmp_path / "x.pth"
    write_zip(path, pickled([1, 2]))
    with pytest.raises(ValueError, match=rf"{naming(path)} .*a list, not a state dictionary"):
        read_checkpoint(path)
    write_zip(path, pickled({"lr": 0.1}))
    with pytest.raises(ValueError, match=rf"{naming(path)} holds no weights"):
        read_checkpoint(path)


# === .npz and .safetensors ===


def test_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **{f"module.{name}": array for name, array in WEIGHTS.items()})
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.weights, WEIGHTS)
    assert (checkpoint.config, checkpoint.ignored) == ({}, {})


def test_npz_with_a_configuration(tmp_path):
    path = tmp_path / "x.npz"
    arrays = {f"weights/{name}": array for name, array in WEIGHTS.items()}
    np.savez_compressed(path, logits=np.zeros(3), meta=json.dumps({"heads": 3}), **arrays)
    checkpoint = read_checkpoint(path)
    assert_same(checkpoint.weights, WEIGHTS)
    assert checkpoint.config == {"heads": 3}
    assert checkpoint.ignored == {"logits": "not under weights/"}


def test_npz_of_objects_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "mark"),)

    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([Payload()]))
    with pytest.raises(ValueError, match=rf"{naming(path)} is not a whole \.npz file of arrays"):
        read_checkpoint(path)
    assert os.listdir(tmp_path) == ["x.npz"]


def test_npz_without_arrays(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, meta="{}")
    with pytest.raises(ValueError, match=rf"{naming(path)} holds no weights"):
        read_checkpoint(path)


def test_safetensors(tmp_path):
    path = tmp_path / "x.safetensors"
    weights = {**WEIGHTS, "float16": np.arange(3, dtype="float16"), "empty": np.zeros((0, 2))}
    save_file = pytest.importorskip("safetensors.numpy").save_file
    save_file({f"module.{name}": array for name, array in weights.items()}, path)
    read = read_checkpoint(path).weights
    assert_same(dict(sorted(read.items())), dict(sorted(weights.items())))


@pytest.mark.parametrize("kind, size", [("BF16", 2), ("F8_E4M3", 1)])
def test_safetensors_of_types_that_numpy_lacks(tmp_path, kind, size):
    path = tmp_path / "x.safetensors"
    header = {"a": {"dtype": kind, "shape": [3], "data_offsets": [0, 3 * size]}}
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<q", len(header)) + header + bytes(3 * size))
    with pytest.raises(ValueError, match=rf"{naming(path)}: a is {kind}.*as float32"):
        read_checkpoint(path)


# === Damaged and missing ===


@pytest.fixture(params=["zip.pth", "legacy.pth", "x.npz", "x.safetensors"])
def whole_file(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".pth":
        shutil.copy(DATA / "torch" / path.name, path)
    elif path.suffix == ".npz":
        np.savez_compressed(path, **WEIGHTS)
    else:
        pytest.importorskip("safetensors.numpy").save_file(WEIGHTS, path)
    return path


@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9, 0.99, 1])
def test_files_cut_short_are_named(whole_file, part):
    read_checkpoint(whole_file)
    content = whole_file.read_bytes()
    whole_file.write_bytes(content[: min(int(part * len(content)), len(content) - 1)])
    with pytest.raises(ValueError, match=rf"{naming(whole_file)} is not a whole "):
        read_checkpoint(whole_file)


@pytest.mark.parametrize("name", ["x.pth", "x.npz", "x.safetensors"])
def test_empty_files_and_text_are_named(tmp_path, name):
    if name == "x.safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / name
    path.touch()
    with pytest.raises(ValueError, match=rf"{naming(path)} is empty"):
        read_checkpoint(path)
    for text in ("hello\n", "<!DOCTYPE html>\n", "version https://git-lfs.github.com/spec/v1\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"{naming(path)} is not a whole "):
            read_checkpoint(path)


def test_unknown_suffixes_are_named(tmp_path):
    path = tmp_path / "x.h5"
    path.write_bytes(b"HDF")
    with pytest.raises(ValueError, match=rf"{naming(path)} is of an unknown kind.*\.npz, .*\.pth"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["nowhere.pth", "./nowhere", "some/where.safetensors"])
def test_missing_files_are_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"^{naming(name)} does not exist"):
        read_checkpoint(name)
    with pytest.raises(FileNotFoundError, match=rf"^{naming(tmp_path / name)} does not exist"):
        read_checkpoint(tmp_path / name)


# === Hugging Face ===


def test_a_folder_of_hugging_face():
    pytest.importorskip("safetensors")
    checkpoint = read_checkpoint(FOLDER)
    assert checkpoint.origin == str(FOLDER)
    assert checkpoint.config["num_attention_heads"] == 3
    assert checkpoint.features["mean"] == pytest.approx(-4.2677393)
    file = read_checkpoint(FOLDER / "model.safetensors")
    assert (file.config, file.features) == ({}, {})
    assert_same(checkpoint.weights, file.weights)
    kernel = "audio_spectrogram_transformer.embeddings.patch_embeddings.projection.weight"
    assert checkpoint.weights[kernel].shape == (48, 1, 16, 16)


def test_a_folder_with_weights_of_torch(tmp_path):
    (tmp_path / "config.json").write_text('{"layers": 3}')
    shutil.copy(DATA / "torch" / "zip.pth", tmp_path / "pytorch_model.bin")
    checkpoint = read_checkpoint(str(tmp_path))
    assert_same(checkpoint.weights, SAVED)
    assert (checkpoint.config, checkpoint.features) == ({"layers": 3}, {})

    pytest.importorskip("safetensors.numpy").save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).weights.keys() == WEIGHTS.keys()


def test_incomplete_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "config.json")):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    expected = rf"{naming(tmp_path)} holds no model\.safetensors and no pytorch_model\.bin"
    with pytest.raises(FileNotFoundError, match=expected):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_damaged_settings_are_named(tmp_path, name, content):
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(DATA / "torch" / "zip.pth", tmp_path / "pytorch_model.bin")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{naming(tmp_path / name)} is not JSON"):
        read_checkpoint(tmp_path)


@ONCE
def test_hub_names(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    files = {
        "safe-model": (FOLDER / "model.safetensors", "model.safetensors"),
        "torch-model": (DATA / "torch" / "zip.pth", "pytorch_model.bin"),
    }
    for name, (weights, cached) in files.items():
        model, commit = tmp_path / f"models--someone--{name}", "0123456789" * 4
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(commit)
        shutil.copy(FOLDER / "config.json", snapshot)
        shutil.copy(weights, snapshot / cached)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = """
    from keras_flexast.conversion.checkpoints import read_checkpoint
    for name in ("someone/safe-model", "someone/torch-model"):
        checkpoint = read_checkpoint(name)
        print(len(checkpoint.weights), checkpoint.config["num_attention_heads"])
    for name in ("someone/no-model", "not a name/at all"):
        try:
            read_checkpoint(name)
        except FileNotFoundError as error:
            print(*str(error).splitlines())
    """
    *found, unknown, invalid = run_python(code, backend="jax").splitlines()
    assert found == [f"{len(read_checkpoint(FOLDER).weights)} 3", f"{len(SAVED)} 3"]
    message = "{} is neither a file nor a folder here, and the Hugging Face hub did not give it: "
    assert unknown.startswith(message.format("someone/no-model"))
    assert "HF_HUB_OFFLINE" in unknown
    assert invalid.startswith(message.format("not a name/at all"))


@pytest.mark.parametrize("published", [("safe", "torch"), ("torch",)])
def test_one_file_of_weights_is_downloaded(tmp_path, monkeypatch, published):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    files = {"safe": "model.safetensors", "torch": "pytorch_model.bin"}
    sources = {"safe": FOLDER / "model.safetensors", "torch": DATA / "torch" / "zip.pth"}

    def snapshot_download(name, allow_patterns):
        assert name == "someone/some-model"
        shutil.copy(FOLDER / "config.json", tmp_path)
        for kind in published:
            if files[kind] in allow_patterns:
                shutil.copy(sources[kind], tmp_path / files[kind])
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    checkpoint = read_checkpoint("someone/some-model")
    assert sorted(os.listdir(tmp_path)) == ["config.json", files[published[0]]]
    assert checkpoint.weights.keys() == read_checkpoint(sources[published[0]]).weights.keys()


def test_without_the_hubs_their_names_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    install = re.escape('pip install "keras-flexast[hub]"')
    with pytest.raises(ImportError, match=rf"^someone/some-model is neither.*{install}"):
        read_checkpoint("someone/some-model")
    with pytest.raises(FileNotFoundError, match=rf"^vit_nowhere does not exist.*{install}"):
        read_checkpoint("vit_nowhere")


# === KerasHub ===

SIZES = dict(image_shape=(48, 40, 3), patch_size=(16, 8), num_layers=2, num_heads=2, hidden_dim=10)


@pytest.fixture(scope="module", params=["ViTBackbone", "DeiTBackbone"])
def backbone(request):
    keras_hub = pytest.importorskip("keras_hub")
    width = {"ViTBackbone": "mlp_dim", "DeiTBackbone": "intermediate_dim"}[request.param]
    model = getattr(keras_hub.models, request.param)(**SIZES, **{width: 14})
    return randomize(model)


def as_timm(weights, image, heads, epsilon):
    """Final tokens of timm's VisionTransformer for one image (height, width, channels)."""

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(x, name):
        q, k, v = (
            dense(x, f"{name}.{one}").reshape(len(x), heads, -1).transpose(1, 0, 2) for one in "qkv"
        )
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        return dense(mixed.transpose(1, 0, 2).reshape(len(x), -1), f"{name}.proj")

    kernel = weights["patch_embed.proj.weight"]  # (dim, channels, height, width)
    dim, channels, height, width = kernel.shape
    patches = image.reshape((image.shape[0] // height, height, -1, width, channels))
    x = np.einsum("fhtwc,dchw->ftd", patches, kernel).reshape(-1, dim)
    x = x + weights["patch_embed.proj.bias"]
    tokens = [weights[name][0] for name in ("cls_token", "dist_token") if name in weights]
    x = np.concatenate([*tokens, x]) + weights["pos_embed"][0]
    for block in ("blocks.0", "blocks.1"):
        x = x + attention(norm(x, f"{block}.norm1"), f"{block}.attn")
        hidden = dense(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        gelu = hidden * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) / 2
        x = x + dense(gelu, f"{block}.mlp.fc2")
    return norm(x, "norm")


def test_a_backbone_computes_the_same_under_the_names_of_timm(backbone):
    checkpoint = read_checkpoint(backbone)
    assert checkpoint.origin == type(backbone).__name__
    assert checkpoint.config == {"num_attention_heads": 2, "layer_norm_eps": 1e-6}
    tokens = 1 + ("dist_token" in checkpoint.weights)
    assert tokens == {"ViTBackbone": 1, "DeiTBackbone": 2}[checkpoint.origin]
    assert checkpoint.weights["pos_embed"].shape == (1, tokens + 3 * 5, 10)
    assert checkpoint.weights["patch_embed.proj.weight"].shape == (10, 3, 16, 8)
    assert checkpoint.weights["blocks.1.mlp.fc1.weight"].shape == (14, 10)
    assert sum(w.size for w in checkpoint.weights.values()) == backbone.count_params()

    image = np.random.default_rng(1).normal(size=SIZES["image_shape"]).astype("float32")
    expected = backbone.predict_on_batch(image[None])[0]
    np.testing.assert_allclose(as_timm(checkpoint.weights, image, 2, 1e-6), expected, atol=1e-5)


def test_a_preset_folder_is_its_backbone(backbone, tmp_path):
    backbone.save_to_preset(str(tmp_path))
    checkpoint, expected = read_checkpoint(tmp_path), read_checkpoint(backbone)
    assert_same(checkpoint.weights, expected.weights)
    assert (checkpoint.config, checkpoint.origin) == (expected.config, str(tmp_path))


def test_a_backbone_without_biases_and_class_token():
    keras_hub = pytest.importorskip("keras_hub")
    absent = ("use_mha_bias", "use_mlp_bias", "use_class_token", "use_patch_bias")
    backbone = keras_hub.models.ViTBackbone(**SIZES, mlp_dim=14, **dict.fromkeys(absent, False))
    weights = read_checkpoint(backbone).weights
    assert "cls_token" not in weights
    assert [n for n in weights if "bias" in n and "norm" not in n] == []
    assert weights["pos_embed"].shape == (1, 3 * 5, 10)


def test_other_presets_and_models_are_refused(tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    other = keras_hub.models.BertBackbone(
        vocabulary_size=11, num_layers=1, num_heads=1, hidden_dim=2, intermediate_dim=3,
        max_sequence_length=5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="BertBackbone; expected a ViTBackbone or a DeiTBackbone"):
        read_checkpoint(other)
    with pytest.raises(ValueError, match="is a dict; expected a ViTBackbone"):
        read_checkpoint({"a": np.ones(3)})
    unknown = "^vit_nowhere is neither a file nor a folder here, and KerasHub could not load"
    with pytest.raises(FileNotFoundError, match=unknown):
        read_checkpoint("vit_nowhere")

    (tmp_path / "config.json").write_text('{"registered_name": "keras_hub>ViTBackbone"}')
    with pytest.raises(ValueError, match=rf"^{naming(tmp_path)} is not a whole KerasHub preset"):
        read_checkpoint(tmp_path)


# === Files made to be misread ===


@writers
@pytest.mark.parametrize("part", ["tensor", "storage", "class"])
def test_attributes_cannot_be_set(tmp_path, write, part):
    """Opcode BUILD would set them behind the checks."""
    path = tmp_path / "x.pth"
    storage = [pickled("storage"), named("torch:FloatStorage"), *map(pickled, ("0", "cpu", 4))]
    storage = b"(" + b"".join(storage) + b"tQ"
    view = (pickled(0), pickled((100,)), pickled((1,)))
    rebuild = "torch._utils:_rebuild_tensor_v2"
    programs = {
        "tensor": dictionary(
            {
                "a": tensor(0, (4,), (1,))
                + b"}("
                + pickled("view")
                + b"("
                + storage
                + b"".join(view)
                + b"tub"
            }
        ),
        "storage": dictionary(
            {"a": called(rebuild, storage + pickled({"count": 100}) + b"b", *view)}
        ),
        "class": named(rebuild)
        + b"N"
        + dictionary({"array": named("torch:Size")})
        + b"\x86b0"
        + dictionary({"a": tensor(0, (4,), (1,))}),
    }
    write(path, programs[part])
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (2.0,), (1,)),
        (0, (2,), (1.0,)),
        (0.5, (2,), (1,)),
        (0, (1,), (10**30,)),
        (0, (0, -1), (1, 1)),
        (0, (1,) * 70, (1,) * 70),
        (0, (10**13,), (0,)),
    ],
)
def test_a_strange_view_is_named(tmp_path, offset, shape, strides):
    path = tmp_path / "x.pth"
    write_zip(path, dictionary({"a": tensor(offset, shape, strides)}))
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)


def test_a_storage_that_never_comes_is_named(tmp_path):
    path = tmp_path / "x.pth"
    parts = [pickled(v) for v in (0x1950A86A20F9469CFC6C, 1001, {})]
    parts += [dictionary({"a": tensor(0, (4,), (1,))}), pickled([])]
    path.write_bytes(b"".join(b"\x80\x02" + part + b"." for part in parts))
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)


def nested(depth):
    """Opcodes of a tuple of a memorized tuple twice, and so on: 2 ** depth of them on paper."""
    return b")" + b"".join(b"q%ch%ch%c\x86" % (k, k, k) for k in range(depth))


REBUILD = "torch._utils:_rebuild_tensor_v2"
STORAGE = b"(" + pickled("storage") + named("torch:FloatStorage")
BOMBS = {
    "stride 0": dictionary({"a": tensor(0, (600_000_000,), (0,))}),
    "many views": dictionary({str(k): tensor(0, (9_000_000,), (0,)) for k in range(2)}),
    "shape": dictionary(
        {"a": called(REBUILD, STORAGE + pickled("0") + b"NK\4tQK\0", nested(200), b")")}
    ),
    "key": b"}" + nested(200) + b"K\1s",
    "storage": dictionary({"a": called(REBUILD, STORAGE + nested(200) + b"NK\4tQK\0))")}),
    "size": b"}" + called("torch:Size", b"](" + nested(200) + b"e") + b"K\1s",
    "text": dictionary({"a": b"B" + struct.pack("<I", 2**31 - 1)}),
    "memo": b"}r" + struct.pack("<I", 2**31 - 1),
}


@writers
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_stays_small(tmp_path, write, name):
    path = tmp_path / "x.pth"
    write(path, BOMBS[name])
    assert path.stat().st_size < 4000
    tracemalloc.start()
    with pytest.raises(ValueError, match=naming(path)) as caught:
        read_checkpoint(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e7 and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0", "archive/more"])
def test_a_zip_that_unpacks_to_far_more_is_refused(tmp_path, name):
    path = tmp_path / "x.pth"
    write_zip(path, dictionary({"a": tensor(0, (2,), (1,))}))
    packed = zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1)
    with packed as archive, warnings.catch_warnings(action="ignore"):  # of a name that is there
        archive.writestr(name, bytes(70_000_000))
    with pytest.raises(ValueError, match=rf"{naming(path)} .*promise 70,"):
        read_checkpoint(path)
    path.rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"x\.npz .*promise 70,"):
        read_checkpoint(tmp_path / "x.npz")


def test_a_pickle_of_megabytes_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    write_zip(path, b"]" * 5_000_000)
    with pytest.raises(ValueError, match=rf"{naming(path)} .*data\.pkl has more than 4,194,304"):
        read_checkpoint(path)


def test_an_npz_that_announces_far_more_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "<f8", "fortran_order": False, "shape": (300_000_000,)}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content.getvalue() + bytes(32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def npz_npy(path):
    with open(path, "wb") as file:
        np.save(file, np.ones(3))


def npz_zip_of_text(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")


def npz_bad_member(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", "text")


def npz_method(path):
    np.savez(path, a=np.ones(3))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 10] = 99  # compression method
    path.write_bytes(content)


def npz_encrypted(path):
    np.savez(path, a=np.ones(3))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    content[6] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        npz_npy,
        npz_zip_of_text,
        npz_bad_member,
        npz_method,
        npz_encrypted,
        lambda path: np.savez(path, meta="{", a=np.ones(2)),
        lambda path: np.savez(path, meta=np.ones(3), a=np.ones(2)),
        lambda path: np.savez(path, meta="[1]", a=np.ones(2)),
    ],
)
def test_damaged_npz_are_named(tmp_path, damage):
    path = tmp_path / "x.npz"
    damage(path)
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)


@pytest.mark.parametrize("content", ["3", "null", "[]"])
def test_settings_that_are_no_object(tmp_path, content):
    shutil.copy(DATA / "torch" / "zip.pth", tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=naming(tmp_path / "config.json")):
        read_checkpoint(tmp_path)


def test_names_that_collide(tmp_path):
    path = tmp_path / "x.pth"
    write_zip(path, dictionary({"module.a": tensor(0, (2,), (1,)), "a": tensor(2, (2,), (1,))}))
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)


def test_a_type_given_as_text(tmp_path):
    path = tmp_path / "x.pth"
    storage = b"(" + b"".join(map(pickled, ("storage", "V4", "0", "cpu", 4))) + b"tQ"
    view = map(pickled, (0, (4,), (1,)))
    write_zip(path, dictionary({"a": called("torch._utils:_rebuild_tensor_v2", storage, *view)}))
    with pytest.raises(ValueError, match=naming(path)):
        read_checkpoint(path)
