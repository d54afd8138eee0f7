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
    named = {name: entry for name, entry in stored.items() if name.startswith(PREFIXES)}
    head = {name.removeprefix("model."): entry for name, entry in named.items()}

    attending = [block for block, attends in enumerate(shape.attends) if attends]
    family = shape.family
    if not (head and family.mtp_head and attending):
        return {}

    sizes, kinds = shape.sizes[attending[-1]], shape.kinds[attending[-1]]
    expected = {}

    for name, in_file in family.mtp_head.tensors.items():
        letters = family.axes.get(in_file.removesuffix(".weight"), ("D",))
        expected[PREFIX + name] = widths.axis_lengths(letters, sizes)

    for block in range(count_blocks(head)):
        for inside in family.block_tensors:
            if family.has_tensor(kinds, inside) and not inside.endswith(".bias"):
                block_shape = widths.tensor_shape(family, inside, sizes)
                expected[f"{PREFIX}layers.{block}.{inside}"] = block_shape

    return head if expected == {name: tuple(head[name].shape) for name in head} else {}
