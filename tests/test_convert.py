"""Conversion: every name accounted for, the papers' initializations, and wrong files."""

import dataclasses
import inspect
import json
import pathlib
import shutil

import numpy as np
import pytest
from helpers import pack_rows
from safetensors.numpy import load_file, save_file

from keras_flexast import fixed_model
from keras_flexast.conversion import convert_checkpoint, convert_run
from keras_flexast.conversion.class_names import read_classes
from keras_flexast.conversion.convert import Options
from keras_flexast.runs import load_run
from tf_data_pipelines import log_mel, patch_tokens
from tf_data_pipelines.resize import bilinear_matrix

DATA = pathlib.Path(__file__).parent / "data"
HUGGING_FACE = DATA / "hf_ast_overlap"
BODY = "audio_spectrogram_transformer"


def golden(name):
    """(weights under the papers' names, meta) of a reference file."""
    with np.load(DATA / f"{name}.npz") as archive:
        weights = {k[8:]: archive[k] for k in archive if k.startswith("weights/")}
        return weights, json.loads(str(archive["meta"]))


def save_npz(path, weights, meta):
    np.savez(path, meta=json.dumps(meta), **{f"weights/{k}": v for k, v in weights.items()})
    return path


def vit(side=2, distilled=False):
    """Weights of a one-block timm ViT or DeiT."""
    rng, dim = np.random.default_rng(0), 6
    shapes = {
        "cls_token": (1, 1, dim), "pos_embed": (1, side**2 + 1 + distilled, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,),
        "blocks.0.norm1.weight": (dim,), "blocks.0.norm1.bias": (dim,),
        "blocks.0.attn.qkv.weight": (3 * dim, dim), "blocks.0.attn.qkv.bias": (3 * dim,),
        "blocks.0.attn.proj.weight": (dim, dim), "blocks.0.attn.proj.bias": (dim,),
        "blocks.0.norm2.weight": (dim,), "blocks.0.norm2.bias": (dim,),
        "blocks.0.mlp.fc1.weight": (10, dim), "blocks.0.mlp.fc1.bias": (10,),
        "blocks.0.mlp.fc2.weight": (dim, 10), "blocks.0.mlp.fc2.bias": (dim,),
        "norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (1000, dim),
        "head.bias": (1000,),
    }  # fmt: skip
    if distilled:
        shapes["dist_token"] = (1, 1, dim)
    return {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}


@pytest.fixture
def folder(tmp_path):
    """A copy of the Hugging Face checkpoint that a test may damage."""
    copy = tmp_path / "hf"
    shutil.copytree(HUGGING_FACE, copy)
    for path in copy.iterdir():
        path.chmod(0o644)
    return copy


def change(path, **values):
    """Change a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def equal(model, other):
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# === Names ===


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("name", ["flexiast_cls", "flexiast_cls_dist", "elasticast"])
def test_prefixes_and_stale_names_change_nothing(name, kind, tmp_path):
    weights, meta = golden(name)
    stale = {}
    if name != "elasticast":
        stale = {
            "v.patch_embed.proj.weight": np.zeros((48, 1, 16, 16), "float32"),
            "v.pos_embed": np.zeros((1, 129, 48), "float32"),
            "v.head.weight": np.zeros((1000, 48), "float32"),
        }
    path = tmp_path / f"copy.{kind}"
    copy = {f"module.{key}": value for key, value in {**weights, **stale}.items()}
    save_file(copy, path) if kind == "safetensors" else save_npz(path, copy, meta)
    done = convert_run(path, num_heads=3)
    assert set(done.used) == set(weights)
    assert set(done.ignored) == set(stale)
    assert all("unused" in r or "ImageNet" in r for r in done.ignored.values())
    if kind == "npz" or name != "elasticast":  # its epsilon and scale are the family's own
        assert done.run.model.backbone.norm_epsilon == 1e-6
    equal(done.run.model, convert_checkpoint(DATA / f"{name}.npz"))


def test_an_ssast_tells_its_size_and_leaves_its_pretraining_behind(tmp_path):
    weights, _ = golden("flexiast_cls_dist")
    renamed = {k: v for k, v in weights.items() if not k.startswith("mlp_head")}
    renamed["v.pos_embed"] = renamed.pop("pos_embed.pos_embed")
    for name in ("weight", "bias"):
        renamed[f"v.patch_embed.proj.{name}"] = renamed.pop(f"patch_embed.proj.{name}")
    left = {
        "mask_embed": np.zeros((1, 1, 48)),
        "cpredlayer.0.weight": np.zeros((48, 48)),
        "gpredlayer.2.bias": np.zeros(256),
    }
    told = {"p_input_fdim": np.array(128), "p_input_tdim": np.array(256)}
    path = tmp_path / "ssast.npz"
    np.savez(path, **renamed, **left, **told)
    done = convert_run(path, classes=5, num_heads=3)
    model = done.run.model
    assert done.family == "ssast" and set(done.ignored) == set(left)
    assert set(done.used) == {*renamed, *told}
    assert set(done.new) == {"head", "head_norm"}
    assert (model.pooling_name, model.backbone.prefix_tokens, model.backbone.grid) == (
        "mean",
        2,
        (8, 16),
    )
    assert done.run.classes == tuple(f"class {k}" for k in range(5))
    as_cls = convert_checkpoint(path, family="ast", classes=5, num_heads=3)
    assert as_cls.pooling_name == "cls_distillation"


@pytest.mark.parametrize(
    "count, base, found",
    [
        (1212, 16, ((12, 101), (10, 10), 1024)),
        (600, 16, ((12, 50), (10, 10), 512)),  # 8 rows would be 1,200 frames
        (144, 16, ((12, 12), (10, 10), 128)),
        (512, 16, ((8, 64), (16, 16), 1024)),
        (88, 16, ((8, 11), (16, 16), 176)),  # no multiple of 128 frames
        (2048, 8, ((16, 128), (8, 8), 1024)),
    ],
)
def test_the_grid_follows_from_the_table(count, base, found, tmp_path):
    weights, _ = golden("flexiast_cls_dist")
    weights["v.pos_embed"] = np.zeros((1, count + 2, 48), "float32")
    weights["v.patch_embed.proj.weight"] = np.zeros((48, 1, base, base), "float32")
    weights["v.patch_embed.proj.bias"] = weights.pop("patch_embed.proj.bias")
    del weights["pos_embed.pos_embed"], weights["patch_embed.proj.weight"]
    save_file(weights, tmp_path / "ast.safetensors")
    done = convert_run(tmp_path / "ast.safetensors", num_heads=3)
    grid, stride, frames = found
    assert (done.run.model.backbone.grid, done.run.model.stride) == (grid, stride)
    assert done.run.fbank.clip_frames == frames
    assert any(f"a position table of {count} cells" in note for note in done.notes)


def test_settings_come_from_the_checkpoint(folder):
    change(folder / "preprocessor_config.json", mean=-3.0, std=2.0)
    labels = {str(k): f"sound {k}" for k in (3, 1, 0, 2, 6, 5, 4)}
    change(folder / "config.json", id2label=labels, problem_type="multi_label_classification")
    run = convert_run(folder).run
    assert run.classes == tuple(f"sound {k}" for k in range(7)) and run.multi_label
    assert (run.fbank.mean, run.fbank.std, run.fbank.remove_clip_mean) == (-3.0, 2.0, False)
    assert (run.model.stride, run.model.backbone.grid, run.fbank.clip_frames) == (
        (10, 10),
        (12, 25),
        256,
    )
    assert (run.patches.remainder, run.patches.position) == ("crop", "grid")
    assert run.patches.prefix_tokens == 2
    short, long = (log_mel(np.ones(n, "float32") * 0.1, run.fbank) for n in (8000, 80000))
    assert short.shape == long.shape == (256, 128)
    np.testing.assert_array_equal(short[48:], 0)
    assert run.full_length().fbank.frames(80000) == 498
    change(folder / "preprocessor_config.json", do_normalize=False)
    fbank = convert_run(folder, mean=1.0).run.fbank
    assert (fbank.mean, fbank.std) == (1.0, 0.5)  # (x - 0) / (2 * 0.5) but for the mean


def test_the_data_set_tells_mean_and_std(tmp_path):
    weights, meta = golden("flexiast_cls")
    for count, mean in ((309, -5.0767093), (527, -4.2677393), (11, -4.2677393)):
        weights["mlp_head.1.weight"] = np.zeros((count, 48), "float32")
        weights["mlp_head.1.bias"] = np.zeros(count, "float32")
        path = save_npz(tmp_path / f"{count}.npz", weights, {**meta, "classes": count})
        done = convert_run(path)
        assert done.run.fbank.mean == mean
        assert done.run.multi_label == (count == 527)
        assert ("--mean" in done.notes[-1]) == (count == 11)


# === Any patch size, any length ===


@pytest.mark.parametrize("resize", ["pi", "bilinear"])
@pytest.mark.parametrize("patch_size", [16, 8, (16, 24), (24, 16), 37])
def test_overlapping_patches_in_both_faces(patch_size, resize):
    model = convert_checkpoint(HUGGING_FACE)
    rng = np.random.default_rng(0)
    clips = [rng.normal(size=(frames, 128)).astype("float32") for frames in (61, 97)]
    settings = model.patch_settings([patch_size], resize=resize)
    tokens = [tuple(part.numpy() for part in patch_tokens(clip, settings)) for clip in clips]
    length = sum(len(part) for part, _ in tokens) + 5
    packed = model.predict_on_batch(pack_rows([tokens], length))[0]
    for clip, logits in zip(clips, packed, strict=False):
        fixed = fixed_model(model, patch_size, len(clip), resize=resize)
        np.testing.assert_allclose(fixed.predict_on_batch(clip[None])[0], logits, atol=2e-5)


def test_bilinear_is_another_resize():
    model = convert_checkpoint(HUGGING_FACE)
    clip = np.random.default_rng(0).normal(size=(1, 256, 128)).astype("float32")
    pi, bilinear = (
        fixed_model(model, 24, 256, resize=resize).predict_on_batch(clip)
        for resize in ("pi", "bilinear")
    )
    assert np.abs(pi - bilinear).max() > 1e-3
    again = convert_checkpoint(HUGGING_FACE, resize="bilinear")
    np.testing.assert_array_equal(fixed_model(again, 24, 256).predict_on_batch(clip), bilinear)


# === Initialization ===


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_a_flexiast_starts_from_an_ast_of_any_patch(patch, folder):
    weights = load_file(folder / "model.safetensors")
    rng, table = np.random.default_rng(0), f"{BODY}.embeddings.position_embeddings"
    kernel = rng.normal(size=(48, 1, patch, patch)).astype("float32")
    weights[f"{BODY}.embeddings.patch_embeddings.projection.weight"] = kernel
    grid = (128 // patch, 256 // patch)
    weights[table] = rng.normal(size=(1, 2 + grid[0] * grid[1], 48)).astype("float32")
    save_file(weights, folder / "model.safetensors")
    change(folder / "config.json", patch_size=patch, frequency_stride=patch, time_stride=patch)
    done = convert_run(folder, to="flexiast")
    model = done.run.model
    assert (model.backbone.base_patch, model.stride, model.backbone.grid) == (
        (16, 16),
        (16, 16),
        (8, 16),
    )
    assert not done.new and not done.ignored and done.run.fbank.clip_ms is None

    ours = model.backbone.patch_embed.get_weights()[0]
    picture = rng.normal(size=(8, 8))  # seen at either size it is embedded alike
    there, here = (
        bilinear_matrix(8, size) @ picture @ bilinear_matrix(8, size).T for size in (patch, 16)
    )
    if patch <= 16:
        np.testing.assert_allclose(
            np.einsum("ft,dft->d", there, kernel[:, 0]),
            np.einsum("ft,ftd->d", here, ours), atol=1e-3,
        )  # fmt: skip
    else:  # shrinking loses detail: the least-norm kernel, by its definition
        whole = np.kron(bilinear_matrix(32, 16), bilinear_matrix(32, 16))
        expected = np.linalg.pinv(whole.T) @ kernel.reshape(48, -1).T
        np.testing.assert_allclose(ours.reshape(256, 48), expected, atol=1e-4)
    over_f, over_t = (
        bilinear_matrix(grid[0], 8, antialias=True),
        bilinear_matrix(grid[1], 16, antialias=True),
    )
    theirs = weights[table][0, 2:].reshape(*grid, 48)
    np.testing.assert_allclose(
        model.backbone.position_embed.get_weights()[0],
        np.einsum("if,jt,ftd->ijd", over_f, over_t, theirs), atol=1e-5,
    )  # fmt: skip
    tokens = [weights[f"{BODY}.embeddings.{n}_token"][0, 0] for n in ("cls", "distillation")]
    np.testing.assert_allclose(
        model.backbone.prefix.get_weights()[0], tokens + weights[table][0, :2], atol=1e-6
    )


def test_an_elasticast_starts_from_an_ast():
    ast, done = convert_checkpoint(HUGGING_FACE), convert_run(HUGGING_FACE, to="elasticast")
    model = done.run.model
    assert (model.pooling_name, model.backbone.prefix_tokens, model.backbone.attention_scale) == (
        "attention",
        0,
        None,
    )
    assert (model.position, model.backbone.grid, model.stride) == ("physical", (8, 16), (16, 16))
    assert {name.split(".")[-1] for name in done.ignored} == {"cls_token", "distillation_token"}
    assert set(done.new) == {"pooling query"}  # the head is kept
    blocks = [block.self_attention for block in ast.backbone.blocks]
    for name in ("query_dense", "key_dense", "value_dense", "output_dense"):
        ours = getattr(model.pooling, name).get_weights()
        both = zip(*(getattr(block, name).get_weights() for block in blocks), strict=True)
        for array, pair in zip(ours, both, strict=True):
            np.testing.assert_allclose(array, np.mean(pair, 0), atol=1e-7)

    # A table that is a sum of two tables is kept as it is.
    flexiast = convert_checkpoint(HUGGING_FACE, to="flexiast")
    joint = flexiast.backbone.position_embed.get_weights()[0]
    freq, time = model.backbone.position_embed.get_weights()
    additive = joint.mean(1)[:, None] + joint.mean(0)[None] - joint.mean((0, 1))
    np.testing.assert_allclose(freq[:, None] + time[None], additive, atol=1e-6)


def test_an_elasticast_is_taken_to_longer_sounds():
    model = convert_checkpoint(DATA / "elasticast.npz", to="elasticast", frames=1024)
    short = convert_checkpoint(DATA / "elasticast.npz")
    assert (model.backbone.grid, short.backbone.grid, model.backbone.attention_scale) == (
        (8, 64),
        (8, 32),
        1.0,
    )
    time, before = (one.backbone.position_embed.get_weights()[1] for one in (model, short))
    np.testing.assert_allclose(time, bilinear_matrix(32, 64, antialias=True) @ before, atol=1e-6)
    equal(model.pooling, short.pooling)


@pytest.mark.parametrize("table", ["ast", "resize"])
@pytest.mark.parametrize("distilled", [False, True])
def test_an_image_model_becomes_a_flexiast(table, distilled, tmp_path):
    weights = vit(side=3, distilled=distilled)
    save_file(weights, tmp_path / "vit.safetensors")
    done = convert_run(
        tmp_path / "vit.safetensors", classes=["a", "b"], frames=80, mel_bins=32, num_heads=2,
        table=table,
    )  # fmt: skip
    model, prefix = done.run.model, 1 + distilled
    assert done.family == ("deit" if distilled else "vit")
    assert model.pooling_name == ("cls_distillation" if distilled else "cls")
    assert done.ignored == dict.fromkeys(["head.weight", "head.bias"], "ImageNet's classifier")
    np.testing.assert_allclose(
        model.backbone.patch_embed.get_weights()[0],
        weights["patch_embed.proj.weight"].sum(1).transpose(1, 2, 0), atol=1e-5,
    )  # fmt: skip
    joint = weights["pos_embed"][0, prefix:].reshape(3, 3, 6)
    over_t = bilinear_matrix(3, 5, antialias=table == "resize")
    # AST cuts 3 rows to their middle 2, from row 3 // 2 - 2 // 2 on.
    over_f = np.eye(3)[0:2] if table == "ast" else bilinear_matrix(3, 2, antialias=True)
    np.testing.assert_allclose(
        model.backbone.position_embed.get_weights()[0],
        np.einsum("if,jt,ftd->ijd", over_f, over_t, joint), atol=1e-5,
    )  # fmt: skip


def test_a_vit_becomes_an_elasticast(tmp_path):
    save_file(vit(), tmp_path / "vit.safetensors")
    done = convert_run(tmp_path / "vit.safetensors", to="elasticast", classes=3, num_heads=2)
    assert done.run.model.backbone.grid == (8, 64) and done.run.model.backbone.norm_epsilon == 1e-6
    assert done.ignored["cls_token"] == "an ElasticAST has no prefix tokens"
    assert set(done.new) == {"pooling query", "head_norm", "head"}


def test_another_number_of_classes_starts_a_new_head():
    ast, done = convert_checkpoint(HUGGING_FACE), convert_run(HUGGING_FACE, classes=["cat", "dog"])
    assert done.new == {"head": "2 classes instead of the checkpoint's 7"}
    assert done.run.classes == ("cat", "dog") and done.run.model.num_classes == 2
    equal(done.run.model.head_norm, ast.head_norm)
    equal(done.run.model.backbone, ast.backbone)
    renamed = convert_run(HUGGING_FACE, classes=list("abcdefg"))
    assert renamed.run.classes == tuple("abcdefg") and not renamed.new
    equal(renamed.run.model, ast)
    assert convert_run(HUGGING_FACE, classes=7).run.classes[0] == "label 0"


# === The folder of the run ===


def test_a_run_is_written_with_the_account_of_the_names(tmp_path):
    out, names = tmp_path / "run", tmp_path / "names.txt"
    names.write_text("dog\n\n cat \n")
    done = convert_run(HUGGING_FACE, out, to="elasticast", classes=names, ignore=["x"])
    files = {"model.keras", "settings.json", "labels.txt", "conversion.json"}
    assert {path.name for path in out.iterdir()} == files
    assert json.loads((out / "conversion.json").read_text()) == done.to_dict()
    assert len(done.used) == 41 and len(done.ignored) == 2

    run = load_run(out)
    equal(run.model, done.run.model)
    assert run.classes == ("dog", "cat") and run.fbank == done.run.fbank
    assert (run.patches, run.packing) == (done.run.patches, done.run.packing)
    versions = run.made_by.pop("versions")
    assert versions["keras_flexast"] and versions["keras"]
    assert run.made_by == {
        "command": "convert",
        "source": str(HUGGING_FACE),
        "family": "ast",
        "options": {"to": "elasticast", "classes": str(names), "ignore": ["x"]},
    }


def test_nothing_is_written_over_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        convert_run(tmp_path / "absent.pth", tmp_path)  # refused before the source is read
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        convert_run(tmp_path / "absent.pth", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    done = convert_run(HUGGING_FACE, tmp_path / "run")
    again = convert_run(HUGGING_FACE, tmp_path / "run", classes=2, overwrite=True)
    assert done.run.classes != again.run.classes == load_run(tmp_path / "run").classes


def test_options_have_the_defaults_of_the_call():
    parameters = inspect.signature(convert_run).parameters
    for field in dataclasses.fields(Options):
        assert field.default == parameters[field.name].default, field.name
    assert Options().chosen() == {}


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("names.txt", "a\nb c\n\n", ("a", "b c")),
        ("names.txt", "\ufeffa\r\nb\r\n", ("a", "b")),
        ("names.csv", 'index,mid,display_name\n0,/m/1,"Speech, male"\n1,/m/2,Dog\n',
         ("Speech, male", "Dog")),
    ],
)  # fmt: skip
def test_classes_are_named_by_a_file(name, text, expected, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    assert read_classes(tmp_path / name) == read_classes(str(tmp_path / name)) == expected


def test_classes_are_a_number_or_names():
    assert read_classes(None) is None
    assert read_classes(11) == read_classes("11") == 11
    assert read_classes(["a", 2]) == ("a", "2")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.txt", None, "is neither a number nor a file"),
        ("names.txt", b"\n", "holds no names"),
        ("names.txt", b"a\nb\na\n", "holds 'a' more than once"),
        ("names.txt", b"\xff\xfe\x00", "is not a file of class names"),
        ("names.csv", b"index,name\n0,a\n", "has no column display_name"),
        ("names.csv", b"index,display_name\n0,a\n1\n", "row 2 has no display_name"),
    ],
)
def test_damaged_files_of_classes_are_named(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        convert_run(HUGGING_FACE, classes=tmp_path / name)
    assert name in str(error.value)


# === Wrong files ===


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("encoder.layer.1.layernorm_before.weight", None, "has no {}"),
        ("encoder.layer.1.attention.attention.key.bias", None, "has no {}"),
        ("embeddings.cls_token", None, "has no {}"),
        ("layernorm.bias", None, "has no {}"),
        ("classifier.dense.weight", None, "has no classifier.dense.weight"),
        ("classifier.layernorm.bias", None, "has no classifier.layernorm.bias"),
        ("encoder.layer.0.output.dense.weight", np.zeros((48, 47)), r"{} has shape \(48, 47\)"),
        ("layernorm.bias", np.full(48, np.nan), "{} holds NaN"),
        ("encoder.layer.0.gamma", np.ones(48), "without a place in the model: {}"),
        ("embeddings.position_embeddings", np.zeros((1, 301, 48)), "299 cells .* fits none"),
        ("embeddings.position_embeddings", np.zeros((1, 2, 48)), "2 positions for 2 prefix tokens"),
        ("embeddings.patch_embeddings.projection.weight", np.zeros((48, 3, 16, 16)), "3 input ch"),
    ],
)  # fmt: skip
def test_a_damaged_set_of_weights_names_the_weight(name, value, message, folder):
    weights = load_file(folder / "model.safetensors")
    full = name if name.startswith("classifier") else f"{BODY}.{name}"
    weights.pop(full, None)
    if value is not None:
        weights[full] = value.astype("float32")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message.format(full)) as error:
        convert_checkpoint(folder)
    assert str(folder) in str(error.value)


def test_an_unknown_weight_can_be_left_out(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "extra.scale": np.ones(3, "float32")}, folder / "model.safetensors")
    done = convert_run(folder, ignore=[r"extra\."])
    assert done.ignored == {"extra.scale": "left out by choice"}
    with pytest.raises(ValueError, match=r"without a place in the model: extra\.scale"):
        convert_run(folder, ignore="scale")  # one pattern, not one for each letter


@pytest.mark.parametrize(
    "file, values, message",
    [
        ("config.json", {"hidden_size": 64}, "hidden_size=64, the weights say 48"),
        ("config.json", {"num_hidden_layers": 3}, "num_hidden_layers=3, the weights say 2"),
        ("config.json", {"intermediate_size": 96}, "intermediate_size=96, the weights say 192"),
        ("config.json", {"patch_size": 8}, "patch_size=8, the weights say 16"),
        ("config.json", {"time_stride": 16}, "fits none of the grids"),
        ("config.json", {"max_length": 512}, "fits none of the grids"),
        ("config.json", {"num_attention_heads": 5}, "48 is not a multiple of num_heads=5"),
        ("config.json", {"id2label": {"0": "a", "1": "b"}}, "num_labels=2, the weights say 7"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
        ("preprocessor_config.json", {"num_mel_bins": 64}, "num_mel_bins=64, config.json says 128"),
        ("preprocessor_config.json", {"max_length": 1024}, "max_length=1024, config.json says 256"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(file, values, message, folder):
    change(folder / file, **values)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(folder)


@pytest.mark.parametrize(
    "source, options, message",
    [
        (
            "hf_ast_plain",
            {"family": "elasticast"},
            "is of family 'ast' by the names .*'elasticast'",
        ),
        ("elasticast.npz", {"family": "flexiast"}, "is of family 'elasticast'"),
        ("elasticast.npz", {"to": "flexiast"}, "without the .CLS. token"),
        ("fbank.npz", {}, "of no known family .*ast, ssast, flexiast.*speech.waveform"),
        ("hf_ast_plain", {"family": "bert"}, "family='bert' is unknown"),
        ("hf_ast_plain", {"to": "vit"}, "to='vit' is unknown"),
        ("hf_ast_plain", {"table": "ast"}, "give to='flexiast'"),
        ("hf_ast_plain", {"classes": ["a", "a"]}, "classes holds 'a' more than once"),
        ("hf_ast_plain", {"classes": []}, "classes holds no names"),
        ("hf_ast_plain", {"classes": 0}, "classes=0 must be a positive number"),
        ("hf_ast_plain", {"to": "flexiast", "frames": 8}, "8 frames holds no patch of 16x16"),
        ("hf_ast_plain", {"frames": 0}, "frames=0 must be a positive number"),
        ("hf_ast_plain", {"num_heads": 7}, "not a multiple of num_heads=7"),
        ("hf_ast_plain", {"ignore": ["("]}, "is no regular expression"),
    ],
)
def test_wrong_options(source, options, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(DATA / source, **options)


def test_what_no_file_says_has_to_be_given(tmp_path):
    weights, _ = golden("flexiast_cls")
    save_file(weights, tmp_path / "flexiast.safetensors")
    with pytest.raises(ValueError, match="how many attention heads a model of width 48"):
        convert_checkpoint(tmp_path / "flexiast.safetensors")
    save_file(vit(), tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"has no classifier\. Give classes="):
        convert_checkpoint(tmp_path / "vit.safetensors", num_heads=2)
