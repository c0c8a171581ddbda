"""Differences between converted models and published ones, on the numbers in tests/data.

    python tests/parity.py            # the table that stands in examples/parity.md

Live comparisons need the other packages: transformers and torch, timm, keras-hub.
"""

import functools
import importlib
import os
import pathlib
import tempfile

from helpers import pack_rows, run_python

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_flexast import fixed_model
from keras_flexast.conversion import convert_checkpoint, convert_run
from keras_flexast.models import embedding_model
from tf_data_pipelines import PackSettings, log_mel, normalize, patch_tokens
from tf_data_pipelines.resize import axis_grid, resize_kernel, table_weights
from tf_data_pipelines.settings import Axis

DATA = pathlib.Path(__file__).parent / "data"
OTHER_BACKEND = {"tensorflow": "jax", "jax": "tensorflow"}[keras.backend.backend()]
CASES = {}  # name: (bound, function to the largest difference, packages it needs)


def case(name, bound, needs=()):
    """Register a function that returns a difference under a name and its bound."""

    def register(function):
        CASES[name] = bound, function, needs
        return function

    return register


def arrays(name):
    with np.load(DATA / name) as archive:
        return dict(archive)


def by_size(file, kind):
    """{(p_f, p_t): array} of the keys KIND/PFxPT of a file."""
    found = {key: array for key, array in arrays(file).items() if key.startswith(f"{kind}/")}
    return {tuple(map(int, key.split("/")[1].split("x"))): found[key] for key in found}


def largest(pairs):
    differences = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs]
    assert differences
    return max(differences)


def tokens_of(model, features, patch_size=None):
    """A clip's (tokens, positions) as the pipeline makes them for this model."""
    sizes = None if patch_size is None else [patch_size]
    return tuple(part.numpy() for part in patch_tokens(features, model.patch_settings(sizes)))


def packed(model, layout, length):
    """The model's output of each clip in a layout of rows of clips, in order."""
    batch = pack_rows(layout, length)
    output = model.predict_on_batch(batch)
    return [output[row, slot] for row, clips in enumerate(layout) for slot in range(len(clips))]


def fixed_logits(model, features, patch_size=None, **options):
    """Logits of clips (clips, frames, mel_bins) by the fixed face."""
    patch_size = model.backbone.base_patch if patch_size is None else patch_size
    fixed = fixed_model(model, patch_size, features.shape[1], **options)
    return fixed.predict_on_batch(features)


# === FlexiAST ===


def flexiast(file, faces):
    model, inputs = convert_checkpoint(DATA / file), arrays(file)["input_batch_time_freq"]
    expected = by_size(file, "logits")
    assert len(expected) == 13
    if faces == "fixed":
        return largest((fixed_logits(model, inputs, size), expected[size]) for size in expected)
    sizes = [(8, 8), (16, 16), (24, 24), (16, 48), (8, 16)]  # clips of mixed sizes in a row
    rows = [[tokens_of(model, inputs[clip], size) for size in sizes] for clip in range(3)]
    logits = np.reshape(packed(model, rows, 1152), (3, len(sizes), -1))
    return largest((logits[:, k], expected[size]) for k, size in enumerate(sizes))


for prefix, file in (("[CLS]", "flexiast_cls"), ("[CLS] + distillation", "flexiast_cls_dist")):
    for faces, text in (("fixed", "13 patch sizes"), ("packed", "5 patch sizes, packed together")):
        case(f"FlexiAST {prefix}: logits, {text}", 1e-4)(
            lambda file=file, faces=faces: flexiast(f"{file}.npz", faces)
        )

for resize, text in (("pi", "PI-resize"), ("bilinear", "bilinear")):

    @case(f"FlexiAST: resized kernels, {text}", 1e-5)
    def kernels(resize=resize):
        pairs = []
        for file in ("flexiast_cls.npz", "flexiast_cls_dist.npz"):
            weight = arrays(file)["weights/patch_embed.proj.weight"]
            base = np.moveaxis(weight[:4, 0], 0, 2)
            for size, expected in by_size(file, f"kernel_{resize}").items():
                ours = np.moveaxis(resize_kernel(base, size, resize=resize), 2, 0)
                pairs.append((ours, expected[:, 0]))
        return largest(pairs)


def _table_matrix(size, patch, cells):
    """Matrix (patches, cells) from a position table to the patches of a spectrogram axis."""
    axis = Axis(16, 16, cells=cells)
    _, centers, extents = axis_grid(size, patch, axis=axis, remainder="crop", position="grid")
    return table_weights(centers, extents, cells=cells)


@case("FlexiAST: resized position tables", 1e-5)
def tables():
    pairs = []
    for prefix, file in ((1, "flexiast_cls.npz"), (2, "flexiast_cls_dist.npz")):
        table = arrays(file)["weights/pos_embed.pos_embed"][0]
        for (patch_f, patch_t), expected in by_size(file, "position").items():
            over_f, over_t = (
                _table_matrix(size, patch, cells)
                for size, patch, cells in ((128, patch_f, 8), (256, patch_t, 16))
            )
            ours = np.einsum("fi,tj,ijd->ftd", over_f, over_t, table[prefix:].reshape(8, 16, 48))
            pairs.append((np.concatenate([table[:prefix], ours.reshape(-1, 48)]), expected[0]))
    return largest(pairs)


# === ElasticAST ===


def elasticast():
    """(model, clips, logits, clips in each of the authors' rows)."""
    reference = arrays("elasticast.npz")
    expected = reference["logits"]
    clips = [reference[f"input_{i}_freq_time"].T for i in range(len(expected))]
    return (
        convert_checkpoint(DATA / "elasticast.npz"),
        clips,
        expected,
        reference["rows_clip_counts"],
    )


@case("ElasticAST: logits, clips alone", 1e-4)
def elasticast_alone():
    model, clips, expected, _ = elasticast()
    return largest(
        (fixed_logits(model, clip[None])[0], logits)
        for clip, logits in zip(clips, expected, strict=True)
    )


@case("ElasticAST: logits, packed as the authors pack", 1e-4)
def elasticast_as_theirs():
    model, clips, expected, counts = elasticast()
    tokens = [tokens_of(model, clip) for clip in clips]
    ends = np.cumsum(counts)
    rows = [tokens[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return largest([(packed(model, rows, 320), expected)])


@case("ElasticAST: logits, packed by our packer", 1e-4)
def elasticast_by_ours():
    import tensorflow as tf

    from tf_data_pipelines.packing import batch_rows, pack

    model, clips, expected, _ = elasticast()
    tokens = [tokens_of(model, clip) for clip in clips]
    spec = {
        "tokens": tf.TensorSpec([None, 256], tf.float32),
        "positions": tf.TensorSpec([None, 4], tf.float32),
        "label": tf.TensorSpec([], tf.int32),
        "clip_id": tf.TensorSpec([], tf.int64),
    }
    dataset = tf.data.Dataset.from_generator(
        lambda: (
            {"tokens": t, "positions": p, "label": 0, "clip_id": i}
            for i, (t, p) in enumerate(tokens)
        ),
        output_signature=spec,
    )
    settings = PackSettings(rows=3, row_length=320, segments=5)
    ours = np.full_like(expected, np.nan)
    for batch in batch_rows(pack(dataset, settings), settings):
        inputs = {name: batch[name].numpy() for name in ("tokens", "positions", "segment_ids")}
        real = batch["clip_ids"].numpy() >= 0
        output = model.predict_on_batch(inputs)[:, : settings.segments]
        ours[batch["clip_ids"].numpy()[real]] = output[real]
    return largest([(ours, expected)])


# === Hugging Face AST ===


def hugging_face(folder, what):
    run, expected = convert_run(DATA / folder).run, arrays(f"{folder}/expected.npz")
    model, inputs = run.model, expected["input_values"]
    if what == "logits":
        return largest([(fixed_logits(model, inputs), expected["logits"])])
    if what == "pooled":
        pooled = fixed_logits(model, inputs, output="embedding")
        return largest([(pooled, expected["pooler_output"])])
    if what == "packed":
        row = [tokens_of(model, clip) for clip in inputs]
        length = sum(len(tokens) for tokens, _ in row) + 7
        return largest([
            (packed(model, [row], length), expected["logits"]),
            (packed(embedding_model(model), [row], length), expected["pooler_output"]),
        ])  # fmt: skip
    features = normalize(log_mel(expected["waveform"], run.fbank), run.fbank).numpy()[None]
    return largest([
        (features, expected["waveform_features"]),
        (fixed_logits(model, features), expected["waveform_logits"]),
    ])  # fmt: skip


for folder, stride in (("hf_ast_overlap", 10), ("hf_ast_plain", 16)):
    for what, text, bound in (
        ("logits", "features to logits", 1e-4),
        ("pooled", "features to pooled output", 1e-4),
        ("packed", "both, packed in one row", 1e-4),
        ("waveform", "waveform to features and logits", 1e-3),
    ):
        case(f"Hugging Face AST, stride {stride}: {text}", bound)(
            lambda folder=folder, what=what: hugging_face(folder, what)
        )


@case(
    "Hugging Face AST, live, other sizes: logits and pooled output", 1e-4, ("transformers", "torch")
)
def hugging_face_live():
    import torch
    from transformers import ASTConfig, ASTForAudioClassification

    pairs = []
    for seed, values in enumerate((
        {"num_mel_bins": 128, "max_length": 1024, "frequency_stride": 10, "time_stride": 10},
        {"num_mel_bins": 64, "max_length": 131, "frequency_stride": 7, "time_stride": 12},
        {"num_mel_bins": 80, "max_length": 100, "patch_size": 8, "frequency_stride": 8,
         "time_stride": 5, "qkv_bias": False},
        {"num_mel_bins": 96, "max_length": 300, "patch_size": 32, "frequency_stride": 32,
         "time_stride": 32},
    )):  # fmt: skip
        torch.manual_seed(seed)
        config = ASTConfig(
            hidden_size=40, num_hidden_layers=3, num_attention_heads=5, intermediate_size=56,
            num_labels=11, initializer_range=0.2, **values,
        )  # fmt: skip
        theirs = ASTForAudioClassification(config).eval()
        table = theirs.audio_spectrogram_transformer.embeddings.position_embeddings
        torch.nn.init.normal_(table)
        inputs = torch.randn(2, values["max_length"], values["num_mel_bins"])
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            theirs.save_pretrained(folder)
            model = convert_checkpoint(folder)
            logits = theirs(inputs).logits
            pooled = theirs.audio_spectrogram_transformer(inputs).pooler_output
        pairs.append((fixed_logits(model, inputs.numpy()), logits))
        pairs.append((fixed_logits(model, inputs.numpy(), output="embedding"), pooled))
    return largest(pairs)


# === Image models ===


def image_case(model, outputs, images, side):
    """Largest difference of the [CLS] tokens on gray images, as high as a spectrogram."""
    ours = convert_checkpoint(model, to="flexiast", classes=3, frames=side, mel_bins=side,
                              num_heads=2)  # fmt: skip
    pooled = fixed_logits(ours, np.transpose(images, (0, 2, 1)), output="embedding")
    return largest([(pooled, outputs)])


@case("timm ViT and DeiT, live, on gray images: [CLS]", 1e-4, ("torch", "timm"))
def timm_live():
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    kinds = (
        ("vit_tiny_patch16_224", "VisionTransformer"),
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
    )
    differences, images = [], torch.randn(2, 64, 64)
    for name, kind in kinds:
        theirs = timm.create_model(name, img_size=64, embed_dim=24, depth=2, num_heads=2).eval()
        assert type(theirs).__name__ == kind
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            save_file(theirs.state_dict(), f"{folder}/{name}.safetensors")
            tokens = theirs.forward_features(images[:, None].expand(-1, 3, -1, -1))
            prefix = tokens[:, : theirs.num_prefix_tokens].mean(1).numpy()
            path = f"{folder}/{name}.safetensors"
            differences.append(image_case(path, prefix, images.numpy(), 64))
    return max(differences)


@case("KerasHub ViT and DeiT, live, on gray images: [CLS]", 1e-4, ("keras_hub",))
def keras_hub_live():
    from keras_hub.models import DeiTBackbone, ViTBackbone

    rng, differences = np.random.default_rng(0), []
    images = rng.normal(size=(2, 64, 64)).astype("float32")
    for kind, hidden in ((ViTBackbone, "mlp_dim"), (DeiTBackbone, "intermediate_dim")):
        theirs = kind(image_shape=(64, 64, 3), patch_size=16, num_layers=2, num_heads=2,
                      hidden_dim=24, **{hidden: 40})  # fmt: skip
        theirs.set_weights([rng.normal(0, 0.2, w.shape) for w in theirs.get_weights()])
        tokens = theirs.predict_on_batch(np.repeat(images[..., None], 3, -1))
        prefix = tokens[:, : 1 if kind is ViTBackbone else 2].mean(1)
        differences.append(image_case(theirs, prefix, images, 64))
    return max(differences)


# === Backends ===


@functools.cache
def across_backends():
    """(largest difference of the logits, of the weights) of models loaded on the other."""
    inputs = arrays("hf_ast_overlap/expected.npz")["input_values"]
    sources = ("hf_ast_overlap", "flexiast_cls_dist.npz", "elasticast.npz")
    sizes = (16, (24, 12))
    code = """
        import sys
        import keras, numpy as np
        from keras_flexast import fixed_model
        folder, inputs = sys.argv[1], np.load(sys.argv[1] + "/inputs.npy")
        assert keras.backend.backend() == sys.argv[2]
        for name in sys.argv[3:]:
            model = keras.saving.load_model(f"{folder}/{name}.keras")
            logits = [
                fixed_model(model, size, inputs.shape[1]).predict_on_batch(inputs)
                for size in (16, (24, 12))
            ]
            np.savez(f"{folder}/{name}.npz", *logits, *model.get_weights())
    """
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/inputs.npy", inputs)
        models = {name: convert_checkpoint(DATA / name) for name in sources}
        for name, model in models.items():
            model.save(f"{folder}/{name}.keras")
        run_python(code, folder, OTHER_BACKEND, *sources, backend=OTHER_BACKEND)
        logits, weights = [], []
        for name, model in models.items():
            with np.load(f"{folder}/{name}.npz") as file:
                first, second, *others = file.values()
            for size, theirs in zip(sizes, (first, second), strict=True):
                logits.append((fixed_logits(model, inputs, size), theirs))
            weights.extend(zip(model.get_weights(), others, strict=True))
    return largest(logits), largest(weights)


case("TensorFlow and JAX, the same converted models: logits", 1e-5)(lambda: across_backends()[0])
case(".keras saved on one, loaded on the other: weights", 0)(lambda: across_backends()[1])


def missing(name):
    """Packages that a case needs and that cannot be imported here."""
    absent = []
    for package in CASES[name][2]:
        try:
            importlib.import_module(package)
        except Exception:  # a torchvision of another build breaks timm with a RuntimeError
            absent.append(package)
    return absent


if __name__ == "__main__":
    from rich.progress import track

    results = {}
    for name in track(CASES, "Comparing"):
        results[name] = None if missing(name) else CASES[name][1]()
    print(f"| case, on {keras.backend.backend()} | bound | largest difference |\n|---|---|---|")
    for name, difference in results.items():
        bound = CASES[name][0]
        text = f"needs {', '.join(missing(name))}" if difference is None else f"{difference:.1e}"
        print(f"| {name} | {bound:g} | {text} |")
    if any(value is not None and value > CASES[name][0] for name, value in results.items()):
        raise SystemExit("A difference is above its bound.")
