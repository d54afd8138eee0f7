"""The zero-padded twin of a model whose blocks differ in width: every block as wide as the widest.

It computes the same, since what is added gives zeros and is multiplied by zeros. So a program that
knows one width for all blocks can write its graph, from which the padding is then cut out.
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

Own = tuple[NDArray[np.int64] | None, ...]
"""For each axis of a tensor the places in the twin that the model's values have; None: all."""


def refuse_widths(shape: ModelShape) -> str:
    """Return why a model cannot be padded, or an empty string.

    Caches have one shape for all blocks, and zeros are added to each group of query heads alike.
    """
    if len(set(shape.widths["num_key_value_heads"])) > 1:
        return "its blocks differ in key and value heads"

    groups = shape.num_key_value_heads
    for block, heads in enumerate(shape.widths["num_attention_heads"]):
        if heads % groups:
            return f"block {block} has {heads} query heads for {groups} groups"

    return ""


def pad(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write the twin of a model into a new folder, one tensor at a time; return the folder.

    All files but weights and settings are linked.
    """
    folder.mkdir(parents=True)
    written = {"config.json", "model.safetensors.index.json"}
    for entry in checkpoint.entries.values():
        written.add(entry.file.name)

    for file in checkpoint.folder.iterdir():
        if file.name not in written:
            (folder / file.name).symlink_to(file.resolve())

    config = dict(checkpoint.written)
    del config[widths.KEY]
    config["head_dim"] = checkpoint.shape.head_dim
    for setting, values in checkpoint.shape.widths.items():
        config[setting] = max(values)

    text = json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")

    _write_weights(checkpoint, folder / "model.safetensors")
    return folder


def count_twin_weights(checkpoint: Checkpoint) -> int:
    """Return how many weights the twin has."""
    shapes = [_shape(checkpoint, name) for name in checkpoint.entries]
    return sum(map(math.prod, shapes))


def find_own(checkpoint: Checkpoint, name: str) -> Own:
    """Return where the values of a tensor lie in the twin's tensor of the same name."""
    shape = checkpoint.shape
    block, inside = _place(checkpoint.family, name)
    if not inside:
        entry = checkpoint.entries[name]
        return (None,) * len(entry.shape)

    sizes = _largest_sizes(shape)
    kept = _keep(shape.sizes[block], sizes, shape.num_key_value_heads)
    return widths.find_kept(checkpoint.family, inside, kept, sizes)


def _place(family: Family, name: str) -> tuple[int, str]:
    """Return the block that a tensor is in, and its name there; empty outside of blocks."""
    block, inside = family.split_block(name)
    return (block or 0, inside) if inside in family.block_tensors else (0, "")


def _keep(own: Mapping[str, int], largest: Mapping[str, int], groups: int) -> widths.Kept:
    """Return what a block has of the widest one: its first channels, the first heads of a group."""
    assert own["H"] % groups == 0, "refuse_widths was not asked"
    by_group = np.arange(largest["Q"]).reshape(groups, -1)
    first = by_group[:, : own["Q"] // groups]
    return {"Q": first.reshape(-1), "F": np.arange(own["F"])}


def _largest_sizes(shape: ModelShape) -> Mapping[str, int]:
    largest = {}
    for letter in shape.sizes[0]:
        largest[letter] = max(sizes[letter] for sizes in shape.sizes)
    return largest


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor in the twin."""
    _, inside = _place(checkpoint.family, name)
    if not inside:
        return checkpoint.entries[name].shape
    return widths.shape(checkpoint.family, inside, _largest_sizes(checkpoint.shape))


def _write_weights(checkpoint: Checkpoint, file: Path) -> None:
    described = {}
    for name, entry in checkpoint.entries.items():
        described[name] = (entry.dtype, _shape(checkpoint, name))

    with file.open("wb") as target:
        write_header(target, described)

        for name, (_, shape) in described.items():
            values = checkpoint.read_raw(name)
            padded = np.zeros(shape, values.dtype)

            own = zip(find_own(checkpoint, name), shape, strict=True)
            places = [np.arange(size) if kept is None else kept for kept, size in own]
            padded[np.ix_(*places)] = values
            flat = padded.reshape(-1)
            target.write(flat.view(np.uint8).data)
