"""Names of published weights: how each family calls what a PackedAST has.

Each name of a checkpoint is used, or listed as ignored with the reason, or an error.
"""

import re

import numpy as np

from keras_flexast.settings import FAMILIES

IMAGE_FAMILIES = ("vit", "deit")  # of image models, which only start a new model

# How a weight of ours is called there: the first pattern that fits, and its replacement.
_IMAGE_HEAD = (r"(v\.)?(head(_dist)?|pre_logits(\.fc)?)\.", "ImageNet's classifier")
_AST_HEAD = ((r"head_norm\.", "mlp_head.0."), (r"head\.", "mlp_head.1."))
_NAMES = {
    "ast": ((r"patch_embed\.", "v.patch_embed.proj."), *_AST_HEAD, (r"", "v.")),
    "flexiast": (
        (r"patch_embed\.", "patch_embed.proj."),
        (r"pos_embed$", "pos_embed.pos_embed"),
        *_AST_HEAD,
        (r"", "v."),
    ),
    "elasticast": (
        (r"patch_embed\.", "patch_embed.0."),
        (r"blocks\.", "blocks.modules_list."),
        (r"pool\.", "attn_pool."),
        (r"pool_query$", "attn_pool_queries"),
        (r"head_norm\.", "mlp_norm."),
    ),
    "vit": ((r"patch_embed\.", "patch_embed.proj."),),
    "hugging_face": (
        (r"patch_embed\.", "BODY.embeddings.patch_embeddings.projection."),
        (r"pos_embed$", "BODY.embeddings.position_embeddings"),
        (r"cls_token$", "BODY.embeddings.cls_token"),
        (r"dist_token$", "BODY.embeddings.distillation_token"),
        (r"blocks\.(\d+)\.norm1\.", r"BODY.encoder.layer.\1.layernorm_before."),
        (r"blocks\.(\d+)\.norm2\.", r"BODY.encoder.layer.\1.layernorm_after."),
        (r"blocks\.(\d+)\.attn\.q\.", r"BODY.encoder.layer.\1.attention.attention.query."),
        (r"blocks\.(\d+)\.attn\.k\.", r"BODY.encoder.layer.\1.attention.attention.key."),
        (r"blocks\.(\d+)\.attn\.v\.", r"BODY.encoder.layer.\1.attention.attention.value."),
        (r"blocks\.(\d+)\.attn\.proj\.", r"BODY.encoder.layer.\1.attention.output.dense."),
        (r"blocks\.(\d+)\.mlp\.fc1\.", r"BODY.encoder.layer.\1.intermediate.dense."),
        (r"blocks\.(\d+)\.mlp\.fc2\.", r"BODY.encoder.layer.\1.output.dense."),
        (r"norm\.", "BODY.layernorm."),
        (r"head_norm\.", "classifier.layernorm."),
        (r"head\.", "classifier.dense."),
    ),
}
_IGNORED = {
    "ast": (
        _IMAGE_HEAD,
        (r"[cg]predlayer\.", "head of the pretraining"),
        (r"mask_embed$", "mask token of the pretraining"),
    ),
    "flexiast": (
        _IMAGE_HEAD,
        (r"v\.(patch_embed\.|pos_embed$)", "unused copy beside FlexiAST's own"),
    ),
    "elasticast": (),
    "vit": (_IMAGE_HEAD,),
    "hugging_face": (
        (r"((cls_|distillation_)?classifier|.*pooler\.dense)\.", "ImageNet's classifier"),
        (r".*embeddings\.mask_token$", "mask token of the pretraining"),
    ),
}
_ALIKE = {"ssast": "ast", "deit": "vit"}


def family_of(checkpoint, wanted=None):
    """Family of a checkpoint, recognized by the names of its weights.

    Args:
        checkpoint: Checkpoint.
        wanted: name in FAMILIES that the user gave; None for any.

    Returns:
        name in FAMILIES.

    Raises:
        ValueError: the names are of no known family, or of another than the wanted one.
    """
    names, config = checkpoint.weights, checkpoint.config

    def any_starts(*starts):
        return any(name.startswith(starts) for name in names)

    distilled = any(name.endswith(("dist_token", "distillation_token")) for name in names)
    one_channel = any(array.ndim == 4 and array.shape[1] == 1 for array in names.values())
    if any_starts("blocks.modules_list.", "attn_pool"):
        found = "elasticast"
    elif "pos_embed.pos_embed" in names or (any_starts("patch_embed.") and any_starts("v.")):
        found = "flexiast"
    elif any_starts("v."):
        found = "ssast" if any_starts("p_input_", "cpredlayer.", "gpredlayer.") else "ast"
    elif (
        one_channel
        or any_starts("audio_spectrogram_transformer.")
        or config.get("model_type") == "audio-spectrogram-transformer"
    ):
        found = "ast"
    elif any_starts("blocks.", "vit.", "deit.", "encoder.layer."):
        found = "deit" if distilled else "vit"
    else:
        some = ", ".join(list(names)[:4])
        raise ValueError(
            f"{checkpoint.origin} is of no known family ({', '.join(FAMILIES)}): its weights are "
            f"called {some}, ..."
        )
    # A fine-tuned SSAST has the names of an AST.
    if wanted is None or wanted == found or {wanted, found} == {"ast", "ssast"}:
        return wanted or found
    raise ValueError(
        f"{checkpoint.origin} is of family {found!r} by the names of its weights, not {wanted!r}. "
        f"Leave family out, or give another file."
    )


class WeightNames:
    """Weights of a checkpoint under our names, and the account of the published ones.

    Args:
        checkpoint: Checkpoint.
        family: name in FAMILIES.

    Attributes:
        projections: (name, count) of the weights of an attention layer; a weight may hold
            the query, key and value projections together.
        biased: whether query, key and value have biases; some ViTs have none in any block.
        used: published names that became weights, or gave a size.
        ignored: {published name: reason}.
        notes: sentences on what was assumed where the source does not say.
    """

    def __init__(self, checkpoint, family):
        self.checkpoint = checkpoint
        self.family = family
        self.weights = checkpoint.weights
        hugging_face = any("encoder.layer." in name for name in self.weights)
        key = "hugging_face" if hugging_face else _ALIKE.get(family, family)
        if key == "elasticast":
            self.projections = (("to_q", 1), ("to_kv", 2))
        elif hugging_face or "blocks.0.attn.q.weight" in self.weights:  # or KerasHub
            self.projections = (("q", 1), ("k", 1), ("v", 1))
        else:
            self.projections = (("qkv", 3),)
        self.biased = any(
            re.search(r"(qkv|query|to_q|attn\.q)\.bias$", name) for name in self.weights
        )
        bodies = ("audio_spectrogram_transformer.", "vit.", "deit.")
        body = next((b for b in bodies if any(n.startswith(b) for n in self.weights)), "")
        self._rules = [(ours, theirs.replace("BODY.", body)) for ours, theirs in _NAMES[key]]
        self._ignorable = _IGNORED[key]
        self.used = set()
        self.ignored = dict(checkpoint.ignored)
        self.notes = []

    def theirs(self, name):
        """Published name of a weight of ours."""
        for pattern, replacement in self._rules:
            if re.match(pattern, name):
                return re.sub(f"^{pattern}", replacement, name, count=1)
        return name

    def has(self, name):
        """Whether the checkpoint has a weight of ours."""
        return self.theirs(name) in self.weights

    def get(self, name, shape):
        """float32 array of a weight of ours.

        Args:
            name: our name of the weight.
            shape: expected shape; None in it is any size.

        Raises:
            ValueError: the weight is missing, of another shape, or not finite.
        """
        origin, theirs = self.checkpoint.origin, self.theirs(name)
        if theirs not in self.weights:
            raise ValueError(f"{origin} has no {theirs}, which a model of this family needs.")
        array = self.weights[theirs]
        fits = len(shape) == array.ndim and all(
            wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if one is None else str(one) for one in shape)
            raise ValueError(f"{origin}: {theirs} has shape {array.shape}, expected ({wanted}).")
        array = np.asarray(array, "float32")
        if not np.isfinite(array).all():
            raise ValueError(f"{origin}: {theirs} holds NaN or infinity.")
        self.used.add(theirs)
        return array

    def pair(self, name, shape):
        """[kernel, bias] of Keras; shape is that of PyTorch's weight, the kernel transposed."""
        weight = self.get(f"{name}.weight", shape)
        return [weight.T, self.get(f"{name}.bias", shape[:1])]

    def number(self, name):
        """Whole number that a checkpoint holds among its weights; None where it does not."""
        if name not in self.weights:
            return None
        self.used.add(name)
        return int(self.weights[name])

    def ignore(self, name, reason):
        """List a weight of ours as ignored, if the checkpoint has it."""
        theirs = self.theirs(name)
        if theirs in self.weights:
            self.used.discard(theirs)
            self.ignored[theirs] = reason

    def ignore_rest(self, patterns=()):
        """List every weight that was not used as ignored.

        Args:
            patterns: regular expressions of published names to ignore beside the family's own.

        Raises:
            ValueError: a weight has no place in the model and fits no pattern, or a pattern is
                no regular expression.
        """
        try:
            chosen = [(re.compile(pattern), "left out by choice") for pattern in patterns]
        except re.error as error:
            raise ValueError(f"ignore={patterns!r} is no regular expression: {error}.") from error
        unknown = []
        for name in self.weights:
            if name in self.used:
                continue
            reasons = [r for pattern, r in (*self._ignorable, *chosen) if re.match(pattern, name)]
            if reasons:
                self.ignored[name] = reasons[0]
            else:
                unknown.append(name)
        if unknown:
            raise ValueError(
                f"{self.checkpoint.origin} has weights without a place in the model: "
                f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''} "
                f"({len(unknown)} in all). To leave them out, which may change the results, name "
                f"them in ignore= (--ignore)."
            )
