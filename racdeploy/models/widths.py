"""How wide the parts of each block are, and what of a tensor stays where a part is narrower.

A family says which sizes each tensor has, in the letters of :mod:`racdeploy.models.decoder`. So a
cut of the feed-forward part (``F``) or of heads (``Q``, ``KV``) finds every tensor that it narrows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ModelError
from racdeploy.models.families import Family, generalize

KEY = "racdeploy_block_widths"
"""Key of ``config.json``: a setting of :data:`SETTINGS` → its value in each block.

Only what differs between blocks is there; transformers' own key then holds the largest value.
"""
SETTINGS = {
    "F": "intermediate_size",
    "Q": "num_attention_heads",
    "KV": "num_key_value_heads",
}
Kept = Mapping[str, NDArray[np.int64]]
"""Letter → indices of what stays along it, rising: channels (``F``), columns (``Q``, ``KV``)."""


def axes(family: Family, name: str) -> tuple[str, ...]:
    """Return the sizes of a tensor, outputs first, as letters or sums: ``("Q", "D")``.

    ``name`` is that inside its block, or of a tensor outside the blocks.
    """
    inside = generalize(name)
    stored = family.block_tensors.get(inside) or family.model_tensors[name]
    in_file, _, kind = stored.rpartition(".")
    in_file = in_file or kind  # some names have no end
    letters = family.shapes.get(in_file, ("D",))
    return letters[:1] if kind == "bias" else letters


def shape(family: Family, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return how large a tensor is, outputs first, where the letters have these sizes."""
    return lengths(axes(family, name), sizes)


def lengths(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return how long axes are, given as letters or sums of them."""
    return tuple(sum(sizes[letter] for letter in axis.split("+")) for axis in axes)


def unit(letter: str, sizes: Mapping[str, int]) -> int:
    """Return what one of a setting of :data:`SETTINGS` adds to the size of a letter."""
    return 1 if letter == "F" else sizes["K"]


def find_kept(
    family: Family, name: str, kept: Kept, sizes: Mapping[str, int]
) -> tuple[NDArray[np.int64] | None, ...]:
    """Return for each axis of a block's tensor the indices that stay, None where all do.

    ``sizes`` are those before the cut. Matrices laid into one, as ``Q+KV+KV``, are cut one by one.
    """
    found: list[NDArray[np.int64] | None] = []

    for axis in axes(family, name):
        letters = axis.split("+")
        if not any(letter in kept for letter in letters):
            found.append(None)
            continue

        parts = []
        start = 0
        for letter in letters:
            own = kept.get(letter)
            parts.append(start + (np.arange(sizes[letter]) if own is None else own))
            start += sizes[letter]
        found.append(np.concatenate(parts))

    return tuple(found)


def read(config: Mapping[str, Any], blocks: int, where: str) -> dict[str, tuple[int, ...]]:
    """Return the settings that differ between blocks, or raise a ModelError on nonsense."""
    written = config.get(KEY) or {}
    known = SETTINGS.values()
    if not isinstance(written, Mapping) or set(written) - set(known):
        raise ModelError("damaged-config", f"{where}: {KEY} is not a table of {', '.join(known)}")

    widths = {}
    for setting, values in written.items():
        is_list = isinstance(values, list) and len(values) == blocks
        if not is_list or not all(type(value) is int and value > 0 for value in values):
            raise ModelError(
                "damaged-config",
                f"{where}: {KEY}.{setting} is not a list of {blocks} counts above 0",
            )

        widths[setting] = tuple(values)

    return widths


def write(
    config: Mapping[str, Any], blocks: Sequence[int], widths: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return the config of a model that consists of some blocks of one, by their numbers.

    ``widths`` are settings with one value for each of them. What is equal everywhere is written
    plainly, so that transformers reads it.
    """
    count = config["num_hidden_layers"]
    changed = {key: value for key, value in config.items() if key != KEY}
    changed["num_hidden_layers"] = len(blocks)

    for key in ("layer_types", "no_rope_layers"):  # one value for each block
        values = config.get(key)
        if isinstance(values, list) and len(values) == count:
            changed[key] = [values[block] for block in blocks]

    differing = {}
    for setting, values in widths.items():
        assert len(values) == len(blocks), f"{setting}: {len(values)} of {len(blocks)} blocks"
        changed[setting] = max(values)
        if len(set(values)) > 1:
            differing[setting] = list(values)

    if differing:
        changed[KEY] = differing
    return changed
