"""A head that predicts further tokens: a projection and a block beside a model, not a part of it.

llama.cpp drafts with it. Such a head stays as it is, and goes along where llama.cpp takes it: where
it is whole, and as wide as the blocks of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from racdeploy.models import widths
from racdeploy.models.shape import ModelShape
from racdeploy.tensors.safetensors import TensorEntry

PREFIX = "mtp."
BEGINNINGS = ("model.mtp.", PREFIX)
_BLOCK = re.compile(rf"{re.escape(PREFIX)}layers\.(\d{{1,6}})\.(.+)")


def take(stored: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the tensors of the head, by names that begin with :data:`PREFIX`."""
    head = {name: entry for name, entry in stored.items() if name.startswith(BEGINNINGS)}
    return {name.removeprefix("model."): entry for name, entry in head.items()}


def split_block(name: str) -> tuple[int | None, str]:
    """Return the number of a tensor's block in the head, or None, and its name inside."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name.removeprefix(PREFIX))


def count_blocks(names: Iterable[str]) -> int:
    """Return how many blocks a head has, given its tensors."""
    return len({split_block(name)[0] for name in names} - {None})


def fits(shape: ModelShape, head: Mapping[str, TensorEntry]) -> bool:
    """Return whether llama.cpp takes a head: it is whole, and like the last block that attends."""
    attending = [block for block, attends in enumerate(shape.attends) if attends]
    if not (head and shape.family.further and attending):
        return False

    found = {name: tuple(entry.shape) for name, entry in head.items()}
    return found == _expect_shapes(shape, attending[-1], count_blocks(head))


def _expect_shapes(shape: ModelShape, like: int, blocks: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a head whose blocks are like one of the model."""
    family = shape.family
    sizes = shape.sizes[like]
    shapes = {}

    for name, stored in family.further.items():
        letters = family.shapes.get(stored.removesuffix(".weight"), ("D",))
        shapes[PREFIX + name] = widths.lengths(letters, sizes)

    for block in range(blocks):
        for inside in family.block_tensors:
            if family.has(shape.kinds[like], inside) and not inside.endswith(".bias"):
                shapes[f"{PREFIX}layers.{block}.{inside}"] = widths.shape(family, inside, sizes)

    return shapes
