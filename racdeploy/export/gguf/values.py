"""Read the values of a planned tensor in llama.cpp's order, a slab of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.models.checkpoint import Checkpoint, widen


def iterate_slabs(
    checkpoint: Checkpoint, tensor: PlannedTensor, slab_weights: int
) -> Iterator[NDArray[np.float32]]:
    """Yield a tensor's values in file order, in slabs of rows of about that many weights."""
    _, row_length = tensor.rows
    step = max(1, slab_weights // row_length)
    for raw in _read_arrays(checkpoint, tensor):
        raw_OI, order_O = raw.reshape(-1, row_length), None
        if tensor.transform == "rotary":
            order_O = order_rotary(len(raw), len(raw) // checkpoint.head_size)
            if raw.ndim == 1:  # a bias is one row
                raw_OI, order_O = raw_OI[:, order_O], None

        for start in range(0, len(raw_OI), step):
            rows = slice(start, start + step)
            weight_OI = widen(raw_OI[rows] if order_O is None else raw_OI[order_O[rows]])
            if tensor.transform == "plus_one":
                weight_OI = weight_OI + np.float32(1)
            yield weight_OI


def order_rotary(rows: int, heads: int) -> NDArray[np.intp]:
    """Return the row order that turns half-split rotary pairs into llama.cpp's interleaved ones.

    Source: llama.cpp ``conversion/llama.py``, ``LlamaModel.permute``.
    """
    order_H2X = np.arange(rows).reshape(heads, 2, rows // heads // 2)
    return order_H2X.swapaxes(1, 2).reshape(-1)


def _read_arrays(checkpoint: Checkpoint, tensor: PlannedTensor) -> Iterator[NDArray[Any]]:
    """Yield the arrays that a tensor is made of, one in memory at a time."""
    if tensor.computed is not None:
        yield tensor.computed
    for part in tensor.parts:
        yield checkpoint.read_raw(part)
