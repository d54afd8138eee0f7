"""A head that predicts further tokens: a projection and a block beside a model, not a part of it.

llama.cpp drafts with it. Such a head stays as it is, and goes along where llama.cpp takes it: where
it is whole, and as wide as the blocks of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from racdeploy.models import widths
from racdeploy.models.families import Family
from racdeploy.tensors.safetensors import TensorEntry

PREFIX = "mtp."
BEGINNINGS = ("model.mtp.", PREFIX)
_BLOCK = re.compile(rf"{re.escape(PREFIX)}layers\.(\d{{1,6}})\.(.+)")
Entry = TypeVar("Entry")


def take(stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors of the head, by names that begin with :data:`PREFIX`."""
    found = {}
    for name, entry in stored.items():
        for begins in BEGINNINGS:
            if name.startswith(begins):
                found[PREFIX + name.removeprefix(begins)] = entry
                break
    return found


def split_block(name: str) -> tuple[int | None, str]:
    """Return the number of a tensor's block in the head, or None, and its name inside."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name.removeprefix(PREFIX))


def count_blocks(names: Sequence[str]) -> int:
    """Return how many blocks a head has, given its tensors."""
    return len({split_block(name)[0] for name in names} - {None})


def expected_shapes(
    family: Family, kinds: Sequence[str], sizes: Mapping[str, int], blocks: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a head whose blocks are like one of the model.

    ``kinds`` and ``sizes`` are of that block.
    """
    shapes = {}

    for name, stored in family.further.items():
        letters = family.shapes.get(stored.removesuffix(".weight"), ("D",))
        shapes[PREFIX + name] = widths.lengths(letters, sizes)

    for block in range(blocks):
        for inside in family.block_tensors:
            if family.has(kinds, inside) and not inside.endswith(".bias"):
                shapes[f"{PREFIX}layers.{block}.{inside}"] = widths.shape(family, inside, sizes)

    return shapes


def fits(entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a head has these tensors and no others."""
    return {name: tuple(entry.shape) for name, entry in entries.items()} == dict(shapes)
