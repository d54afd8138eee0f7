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

from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.tensors.safetensors import write_header


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
    written = {entry.file.name for entry in checkpoint.entries.values()}
    written |= {"config.json", "model.safetensors.index.json"}
    for file in checkpoint.folder.iterdir():
        if file.name not in written:
            (folder / file.name).symlink_to(file.resolve())

    config = dict(checkpoint.raw_config)
    del config[widths.KEY]
    config["head_dim"] = checkpoint.shape.head_dim
    for setting, values in checkpoint.shape.widths.items():
        config[setting] = max(values)

    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_weights(checkpoint, folder / "model.safetensors")
    return folder


def count_padded_weights(checkpoint: Checkpoint) -> int:
    """Return the number of weights of the padded model."""
    return sum(math.prod(_shape(checkpoint, name)) for name in checkpoint.entries)


def find_axis_indices(checkpoint: Checkpoint, name: str) -> widths.AxisIndices:
    """Return the indices of a tensor's values in the padded tensor, by axis."""
    shape = checkpoint.shape
    block, inside = _split_name(checkpoint.family, name)
    if not inside:
        return (None,) * len(checkpoint.entries[name].shape)

    # First channels, and first heads of each group.
    sizes = _largest_sizes(shape)
    own_sizes = shape.sizes[block]
    groups = shape.num_key_value_heads
    assert own_sizes["H"] % groups == 0, "the widths were not checked"
    index_GX = np.arange(sizes["Q"]).reshape(groups, -1)
    first = index_GX[:, : own_sizes["Q"] // groups]
    kept = {"Q": first.reshape(-1), "F": np.arange(own_sizes["F"])}
    return widths.list_kept_indices(checkpoint.family, inside, kept, sizes)


def _split_name(family: Family, name: str) -> tuple[int, str]:
    """Return a tensor's block and its name in the block, which is empty outside of blocks."""
    block, inside = family.split_block(name)
    return (block or 0, inside) if inside in family.block_tensors else (0, "")


def _largest_sizes(shape: ModelShape) -> Mapping[str, int]:
    largest: dict[str, int] = {}
    for sizes in shape.sizes:
        for letter, size in sizes.items():
            largest[letter] = max(size, largest.get(letter, 0))
    return largest


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Return the shape of a padded tensor."""
    _, inside = _split_name(checkpoint.family, name)
    if not inside:
        return checkpoint.entries[name].shape
    return widths.tensor_shape(checkpoint.family, inside, _largest_sizes(checkpoint.shape))


def _write_weights(checkpoint: Checkpoint, file: Path) -> None:
    described = {
        name: (entry.dtype, _shape(checkpoint, name)) for name, entry in checkpoint.entries.items()
    }

    with file.open("wb") as target:
        write_header(target, described)

        for name, (_, shape) in described.items():
            values = checkpoint.read_raw(name)
            padded = np.zeros(shape, values.dtype)

            indices = []
            for kept, size in zip(find_axis_indices(checkpoint, name), shape, strict=True):
                indices.append(np.arange(size) if kept is None else kept)
            padded[np.ix_(*indices)] = values
            target.write(padded.reshape(-1).view(np.uint8).data)
