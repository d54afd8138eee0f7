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
from racdeploy.models.widths import SETTINGS
from racdeploy.tensors.safetensors import write_header

Own = tuple[NDArray[np.int64] | None, ...]
"""For each axis of a tensor the places in the twin that the model's values have; None: all."""


def refuse_widths(checkpoint: Checkpoint) -> str:
    """Return why a model cannot be padded, or an empty string.

    Caches have one shape for all blocks, and zeros are added to each group of query heads alike.
    """
    if len(set(checkpoint.per_block("num_key_value_heads"))) > 1:
        return "its blocks differ in key and value heads"

    groups = checkpoint.key_value_heads
    for block, heads in enumerate(checkpoint.per_block("num_attention_heads")):
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
    config["head_dim"] = checkpoint.head_size
    for setting in SETTINGS.values():
        config[setting] = max(checkpoint.per_block(setting))

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
    block, inside = _place(checkpoint, name)
    if not inside:
        entry = checkpoint.entries[name]
        return (None,) * len(entry.shape)

    kept = _keep(checkpoint, block)
    sizes = _largest_sizes(checkpoint)
    return widths.find_kept(checkpoint.family, inside, kept, sizes)


def _place(checkpoint: Checkpoint, name: str) -> tuple[int, str]:
    """Return the block that a tensor is in, and its name there; empty outside of blocks."""
    family = checkpoint.family
    block, inside = family.split_block(name)
    return (block or 0, inside) if inside in family.block_tensors else (0, "")


def _keep(checkpoint: Checkpoint, block: int) -> widths.Kept:
    """Return what a block has of the widest one: its first channels, the first heads of a group."""
    groups = checkpoint.key_value_heads
    heads = checkpoint.per_block("num_attention_heads")[block]
    assert heads % groups == 0, "refuse_widths was not asked"

    own = checkpoint.sizes(block)
    largest = _largest_sizes(checkpoint)

    columns = np.arange(largest["Q"])
    by_group = columns.reshape(groups, -1)
    own_columns = own["Q"] // groups
    first = by_group[:, :own_columns]

    return {"Q": first.reshape(-1), "F": np.arange(own["F"])}


def _largest_sizes(checkpoint: Checkpoint) -> Mapping[str, int]:
    blocks = range(checkpoint.block_count)
    sizes = [checkpoint.sizes(block) for block in blocks]

    largest = {}
    for letter in sizes[0]:
        largest[letter] = max(each[letter] for each in sizes)
    return largest


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor in the twin."""
    _, inside = _place(checkpoint, name)
    if not inside:
        return checkpoint.entries[name].shape
    return widths.shape(checkpoint.family, inside, _largest_sizes(checkpoint))


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
