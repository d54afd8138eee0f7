"""Damage a GGUF file in place, as a faulty exporter would have written it; every change keeps the
file's size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFReader

__all__ = ["change_text", "move_rows", "set_number", "swap_halves", "zero_block", "zero_rows"]


def set_number(file: Path, key: str, value: float) -> None:
    """Replace a number in the metadata."""
    field = GGUFReader(file, "r+").get_field(key)
    assert field is not None, key
    (index,) = field.data
    field.parts[index][0] = value


def change_text(file: Path, key: str, old: str, new: str) -> None:
    """Replace a part of a text in the metadata by one of equal length."""
    assert len(old.encode()) == len(new.encode()), "the file keeps its size"
    field = GGUFReader(file, "r+").get_field(key)
    assert field is not None, key
    (index,) = field.data
    text = bytes(field.parts[index])
    assert old.encode() in text, f"{key} holds {text.decode()!r}"
    field.parts[index][:] = np.frombuffer(text.replace(old.encode(), new.encode()), dtype=np.uint8)


def zero_rows(file: Path, name: str, rows: list[int]) -> None:
    """Set rows of a Q8_0 matrix to zero."""
    _tensor(file, name)[rows] = 0


def zero_block(file: Path, block: int) -> None:
    """Set every matrix of a block to zero."""
    for tensor in GGUFReader(file, "r+").tensors:
        if tensor.name.startswith(f"blk.{block}.") and len(tensor.shape) == 2:
            tensor.data[:] = 0


def move_rows(file: Path, ending: str, order: list[int]) -> None:
    """Put the rows of every head in another order, in all matrices of that name; ``order`` is of
    one head.
    """
    size = len(order)
    for tensor in GGUFReader(file, "r+").tensors:
        if tensor.name.endswith(ending):
            heads = len(tensor.data) // size
            places = [head * size + place for head in range(heads) for place in order]
            tensor.data[:] = np.array(tensor.data)[places]


def swap_halves(head_size: int) -> list[int]:
    """Return the order that interleaves both halves of a head: right for Llama's files, wrong for
    Qwen's.
    """
    half = head_size // 2
    return [place for pair in range(half) for place in (pair, pair + half)]


def _tensor(file: Path, name: str) -> np.ndarray:
    return next(tensor.data for tensor in GGUFReader(file, "r+").tensors if tensor.name == name)
