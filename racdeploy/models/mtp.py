"""The multi-token-prediction (MTP) head: a projection and blocks beside the model.

llama.cpp drafts with it. The head stays dense, and is exported only if llama.cpp supports it: if it
is complete, and as wide as the blocks of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from racdeploy.models import widths
from racdeploy.models.shape import ModelShape
from racdeploy.tensors.safetensors import TensorEntry

PREFIX = "mtp."
PREFIXES = ("model.mtp.", PREFIX)
_BLOCK = re.compile(rf"{re.escape(PREFIX)}layers\.(\d{{1,6}})\.(.+)")


def split_block(name: str) -> tuple[int | None, str]:
    """Return the block number of a head's tensor, or None, and the name inside the block."""
    match = _BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name.removeprefix(PREFIX))


def count_blocks(names: Iterable[str]) -> int:
    """Return the number of blocks of a head, given the names of its tensors."""
    return len({split_block(name)[0] for name in names} - {None})


def select_tensors(stored: Mapping[str, TensorEntry], shape: ModelShape) -> dict[str, TensorEntry]:
    """Return the tensors of the head, by names that begin with :data:`PREFIX`.

    There are none unless llama.cpp supports it: complete, and like the last attention block.
    """
    head = {}
    for name, entry in stored.items():
        if name.startswith(PREFIXES):
            head[name.removeprefix("model.")] = entry

    if not head or not shape.family.mtp_head or not any(shape.attends):
        return {}

    shapes = {name: tuple(entry.shape) for name, entry in head.items()}
    is_supported = shapes == _list_expected_shapes(shape, count_blocks(head))
    return head if is_supported else {}


def _list_expected_shapes(shape: ModelShape, block_count: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a head's tensors, whose blocks are like the last attention block."""
    family = shape.family
    assert family.mtp_head
    last = max(block for block, attends in enumerate(shape.attends) if attends)
    sizes = shape.sizes[last]
    expected = {}

    for name, in_file in family.mtp_head.tensors.items():
        letters = family.axes.get(in_file.removesuffix(".weight"), ("D",))
        expected[PREFIX + name] = widths.axis_lengths(letters, sizes)

    for block in range(block_count):
        for inside in family.block_tensors:
            if inside.endswith(".bias") or not family.has_tensor(shape.kinds[last], inside):
                continue
            block_shape = widths.tensor_shape(family, inside, sizes)
            expected[f"{PREFIX}layers.{block}.{inside}"] = block_shape

    return expected
