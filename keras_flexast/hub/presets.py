"""The models that `from_preset` knows by name. None has published weights yet."""

from keras_flexast.settings import SIZES

_FAMILIES = {  # family: what it pools with, and what to say of it
    "flexiast": ("cls", "[CLS] token and one joint position table, as FlexiAST"),
    "elasticast": ("attention", "mask attention pooling and one position table per axis, as "
                   "ElasticAST"),
}  # fmt: skip


def _described(family, size):
    pooling, text = _FAMILIES[family]
    dim, depth, _ = SIZES[size]
    return {
        "metadata": {
            "description": f"{depth} blocks of width {dim}, {text}. Untrained.",
            "path": family,
        },
        "family": family,
        "size": size,
        "pooling": pooling,
    }


PRESETS = {  # name: its metadata, and what to build
    f"{family}_{size}": _described(family, size) for family in _FAMILIES for size in SIZES
}
