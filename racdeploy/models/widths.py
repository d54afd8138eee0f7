"""Widths of the parts of each block, and the kept indices of a tensor whose part was cut.

A family lists the sizes of each tensor, in the letters of :mod:`racdeploy.models.decoder`. So a cut
of the feed-forward part (``F``) or of heads (``Q``, ``KV``) finds every tensor that it narrows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ModelError
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family, generalize_expert

KEY = "racdeploy_block_widths"
"""Key of ``config.json``: a setting of :data:`SETTINGS` → its value in each block.

Only settings that differ between blocks are listed; transformers' own key has the largest value.
"""
SETTINGS = {
    "F": "intermediate_size",
    "Q": "num_attention_heads",
    "KV": "num_key_value_heads",
}
KeptIndices = Mapping[str, NDArray[np.int64]]
"""Letter → kept indices along it, ascending: channels (``F``), columns (``Q``, ``KV``)."""
AxisIndices = tuple[NDArray[np.int64] | None, ...]
"""Kept indices along each axis of a tensor; None: all."""


def list_axes(family: Family, name: str) -> tuple[str, ...]:
    """Return the axes of a tensor, outputs first, as letters or sums: ``("Q", "D")``.

    ``name`` is the name inside its block, or of a tensor outside the blocks.
    """
    inside = generalize_expert(name)
    stored = family.block_tensors.get(inside) or family.model_tensors[name]
    stored_name, _, kind = stored.rpartition(".")
    stored_name = stored_name or kind  # some names have no ".weight"
    letters = family.axes.get(stored_name, ("D",))
    return letters[:1] if kind == "bias" else letters


def tensor_shape(family: Family, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a tensor, outputs first, given the sizes of the letters."""
    return axis_lengths(list_axes(family, name), sizes)


def axis_lengths(list_axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the lengths of axes that are given as letters or sums of them."""
    lengths = []
    for axis in list_axes:
        lengths.append(sum(sizes[letter] for letter in axis.split("+")))
    return tuple(lengths)


def width_per_unit(letter: str, sizes: Mapping[str, int]) -> int:
    """Return the size of a letter per unit of its setting: 1 per channel, K columns per head."""
    return 1 if letter == "F" else sizes["K"]


def list_kept_indices(
    family: Family, name: str, kept: KeptIndices, sizes: Mapping[str, int]
) -> AxisIndices:
    """Return the kept indices along each axis of a block's tensor.

    ``sizes`` are those before the cut. Matrices in one tensor, as ``Q+KV+KV``, are cut one by one.
    """
    indices: list[NDArray[np.int64] | None] = []
    for axis in list_axes(family, name):
        letters = axis.split("+")
        if kept.keys().isdisjoint(letters):
            indices.append(None)
            continue

        parts = []
        start = 0
        for letter in letters:
            parts.append(start + kept.get(letter, np.arange(sizes[letter])))
            start += sizes[letter]
        indices.append(np.concatenate(parts))

    return tuple(indices)


def read_widths(config: Config, blocks: int, where: str) -> dict[str, tuple[int, ...]]:
    """Return the settings that differ between blocks; raises ModelError if they are damaged."""
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


def cut_config(
    config: Config, blocks: Sequence[int], widths: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return the config of a model with only some of the blocks, given by their numbers.

    ``widths`` are settings with one value for each kept block. A setting that is equal in all of
    them is written under its usual key, so that transformers reads it.
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
