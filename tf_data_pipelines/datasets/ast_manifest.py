"""The JSON manifests that AST, SSAST, FlexiAST and ElasticAST are trained from.

    train_data.json             {"data": [{"wav": "a.flac", "labels": "/m/09x0r,/m/05zppz"}]}
    train_data_weight.csv       how often each clip is wanted, one number a line, if any
    class_labels_indices.csv    index,mid,display_name, here or in the folder above, if any

The split is the word in the name of a manifest: train, val, valid, eval or test.
"""

import json
import math
import os
import re

from tf_data_pipelines.datasets.audioset import class_names, read_class_labels
from tf_data_pipelines.datasets.lists import (
    Row,
    draw_validation,
    read_lines,
    source_of,
)
from tf_data_pipelines.listing import SPLIT_ALIASES, some_of, text_of

LABELS = "*class_labels_indices.csv"  # as AST's recipes call it: esc_class_labels_indices.csv
HEAD = 65536  # bytes that tell a manifest from other JSON


def is_ast(data):
    """Whether this is a .json file, or a folder with manifests of AST."""
    if data.is_dir():
        return bool(_manifests(data))
    return data.suffix.lower() == ".json"


def read_ast(data):
    """Manifests of AST as a Source that carries their weights.

    Classes are the display names of the class list, in its order; without a class list they are
    the labels, sorted. Paths are relative to the manifest. A manifest without a split in its name
    is for training; where there are training clips, but no manifest for validation, a tenth of
    them is drawn.

    Args:
        data: pathlib.Path of a manifest, or of a folder whose manifests belong together.

    Raises:
        FileNotFoundError: there is no manifest, or every clip is missing.
        ValueError: a manifest is not JSON of this form, a clip is in two splits, a label is not
            in the class list, or the weights are not one for each clip.
    """
    manifests = _manifests(data) if data.is_dir() else [data]
    if not manifests:
        raise FileNotFoundError(
            f'{data} has no manifest, a .json file with {{"data": [{{"wav": ..., "labels": '
            f"...}}]}}. Give the folder that has them."
        )
    classes, mids = _class_list(manifests[0].parent)
    rows = {}
    for manifest in manifests:
        for row in _read_manifest(manifest, mids):
            other = rows.setdefault(row.name, row)
            if (other.split, other.labels) != (row.split, row.labels):
                raise ValueError(
                    f"{manifest}: {row.name} is in another manifest too, for {other.split} with "
                    f"{some_of(other.labels)}, here for {row.split} with {some_of(row.labels)}. "
                    f"Give one manifest, or a folder with those of one experiment."
                )
    rows = list(rows.values())
    splits = {row.split for row in rows}
    if "train" in splits and "validation" not in splits:
        # A name without its folder is the same on every machine.
        rows = draw_validation(rows, lambda row: os.path.basename(row.name))
    if classes is None:
        classes = sorted({label for row in rows for label in row.labels})
    multi_label = any(len(row.labels) > 1 for row in rows)
    return source_of(data, rows, classes, multi_label=multi_label)


def _manifests(folder):
    """The .json files in a folder that begin as a manifest does, sorted."""
    found = []
    for path in sorted(folder.glob("*.json")):
        with open(path, "rb") as file:
            head = file.read(HEAD)
        begins = re.match(rb'(?:\xef\xbb\xbf)?\s*\{\s*"data"\s*:\s*\[', head)
        if begins and b'"wav"' in head and b'"labels"' in head:
            found.append(path)
    return found


def _class_list(folder):
    """Classes and {mid: class} of the class list beside the manifests; None, None without one."""
    for place in (folder, folder.resolve().parent):
        found = sorted(place.glob(LABELS))
        if len(found) > 1:
            raise ValueError(
                f"{place} has several class lists: {some_of([path.name for path in found])}. Keep "
                f"the one that belongs to the manifests."
            )
        if found:
            return read_class_labels(found[0])
    return None, None


def _read_manifest(path, mids):
    """The rows of one manifest."""
    try:
        entries = json.loads(text_of(path))["data"]
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON: {error}. Write it again, or copy it again."
        ) from None
    except (KeyError, TypeError):
        entries = None
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f'{path} has no list of clips; expected {{"data": [{{"wav": "a.wav", "labels": '
            f'"mid1,mid2"}}]}}. Write it as AST\'s recipes do.'
        )
    words = re.findall("[a-z]+", path.stem.lower())
    split = next((SPLIT_ALIASES[word] for word in words if word in SPLIT_ALIASES), "train")
    rows = []
    weights = _read_weights(path, len(entries))
    for number, (entry, weight) in enumerate(zip(entries, weights, strict=True), 1):
        where = f"{path} clip {number}"
        for key in ("wav", "labels"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key]:
                raise ValueError(
                    f"{where} has no text {key!r}; expected "
                    f'{{"wav": "a.wav", "labels": "mid1,mid2"}}. Write the manifest again.'
                )
        wav = os.path.normpath(path.parent / os.path.expanduser(entry["wav"]))
        labels = class_names(entry["labels"], mids, where)
        found = wav if os.path.isfile(wav) else None
        rows.append(Row(wav, found, labels, split, weight=weight))
    return rows


def _read_weights(manifest, count):
    """The weight of each clip of a manifest; 1 without a list of weights."""
    path = manifest.with_name(f"{manifest.stem}_weight.csv")
    if not path.is_file():
        return [1.0] * count
    lines = read_lines(path)
    try:
        weights = [float(text) for _, text in lines]
    except ValueError as error:
        raise ValueError(f"{path} is no list of weights: {error}. Write it again.") from None
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"{path} has a weight below 0 or without end. Write it again.")
    if len(weights) != count:
        raise ValueError(
            f"{path} has {len(weights):,} weights, {manifest.name} {count:,} clips; expected one "
            f"a line for each clip. Write the weights again, or remove the file."
        )
    return weights
