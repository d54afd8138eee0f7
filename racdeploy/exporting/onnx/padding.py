"""Pad a model whose blocks differ in width with zeros, so that all are as wide as the widest.

The padded model computes the same: added channels are zero and are multiplied by zeros. A program
that supports one width for all blocks can write its graph, from which the padding is then removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.tensors.safetensors import write_header

AxisIndices = tuple[NDArray[np.int64] | None, ...]
"""For each axis of a tensor, the indices of the model's values in the padded model; None: all."""


def find_unsupported_widths(shape: ModelShape) -> str:
    """Return why a model cannot be padded, or an empty string.

    Caches have one shape for all blocks, and every group of query heads gets equally many zeros.
    """
    if len(set(shape.widths["num_key_value_heads"])) > 1:
        return "its blocks differ in key and value heads"

    groups = shape.num_key_value_heads
    for block, heads in enumerate(shape.widths["num_attention_heads"]):
        if heads % groups:
            return f"block {block} has {heads} query heads for {groups} groups"

    return ""


def write_padded_model(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the padded model into a new folder, one tensor at a time, and return the folder.

    Other files than weights and config are linked.
    """
    folder.mkdir(parents=True)
    written = {"config.json", "model.safetensors.index.json"}
    for entry in checkpoint.entries.values():
        written.add(entry.file.name)

    for file in checkpoint.folder.iterdir():
        if file.name not in written:
            (folder / file.name).symlink_to(file.resolve())

    config = dict(checkpoint.raw_config)
    del config[widths.KEY]
    config["head_dim"] = checkpoint.shape.head_dim
    for setting, values in checkpoint.shape.widths.items():
        config[setting] = max(values)

    text = json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")

    _write_weights(checkpoint, folder / "model.safetensors")
    return folder


def count_padded_weights(checkpoint: Checkpoint) -> int:
    """Return the number of weights of the padded model."""
    shapes = [_shape(checkpoint, name) for name in checkpoint.entries]
    return sum(map(math.prod, shapes))


def find_axis_indices(checkpoint: Checkpoint, name: str) -> AxisIndices:
    """Return the indices of a tensor's values in the padded tensor, by axis."""
    shape = checkpoint.shape
    block, inside = _split_name(checkpoint.family, name)
    if not inside:
        entry = checkpoint.entries[name]
        return (None,) * len(entry.shape)

    sizes = _largest_sizes(shape)
    kept = _keep(shape.sizes[block], sizes, shape.num_key_value_heads)
    return widths.list_kept_indices(checkpoint.family, inside, kept, sizes)


def _split_name(family: Family, name: str) -> tuple[int, str]:
    """Return a tensor's block and its name in the block, which is empty outside of blocks."""
    block, inside = family.split_block(name)
    return (block or 0, inside) if inside in family.block_tensors else (0, "")


def _keep(
    sizes: Mapping[str, int], largest_sizes: Mapping[str, int], groups: int
) -> widths.KeptIndices:
    """Return the indices kept of the widest block: first channels, first heads of each group."""
    assert sizes["H"] % groups == 0, "the widths were not checked"
    index_GX = np.arange(largest_sizes["Q"]).reshape(groups, -1)
    first = index_GX[:, : sizes["Q"] // groups]
    return {"Q": first.reshape(-1), "F": np.arange(sizes["F"])}


def _largest_sizes(shape: ModelShape) -> Mapping[str, int]:
    largest = {}
    for letter in shape.sizes[0]:
        largest[letter] = max(sizes[letter] for sizes in shape.sizes)
    return largest


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Return the shape of a padded tensor."""
    _, inside = _split_name(checkpoint.family, name)
    if not inside:
        return checkpoint.entries[name].shape
    return widths.tensor_shape(checkpoint.family, inside, _largest_sizes(checkpoint.shape))


def _write_weights(checkpoint: Checkpoint, file: Path) -> None:
    described = {}
    for name, entry in checkpoint.entries.items():
        described[name] = (entry.dtype, _shape(checkpoint, name))

    with file.open("wb") as target:
        write_header(target, described)

        for name, (_, shape) in described.items():
            values = checkpoint.read_raw(name)
            padded = np.zeros(shape, values.dtype)

            axes = zip(find_axis_indices(checkpoint, name), shape, strict=True)
            indices = [np.arange(size) if kept is None else kept for kept, size in axes]
            padded[np.ix_(*indices)] = values
            flat = padded.reshape(-1)
            target.write(flat.view(np.uint8).data)
