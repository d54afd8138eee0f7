"""The order of rows and columns in llama.cpp, where it differs from the checkpoint's.

Source: llama.cpp ``conversion/llama.py`` (``LlamaModel.permute``) and ``conversion/qwen.py``
(``_LinearAttentionVReorderBase``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.models.decoder import Transform
from racdeploy.models.shape import ModelShape

Order = NDArray[np.intp]


def find_gguf_row_order(transform: Transform | None, shape: ModelShape, rows: int) -> Order | None:
    """Return the order of a tensor's rows in GGUF, or None if it does not change."""
    if transform == "rotary":
        return find_rotary_order(rows, rows // shape.head_dim)
    return _order_value_heads(shape, rows) if transform in ("value_rows", "decay") else None


def find_gguf_column_order(
    transform: Transform | None, shape: ModelShape, columns: int
) -> Order | None:
    """Return the order of a matrix's columns in GGUF, or None if it does not change."""
    return _order_value_heads(shape, columns) if transform == "value_columns" else None


def find_rotary_order(rows: int, heads: int) -> Order:
    """Return the row order from half-split rotary pairs to llama.cpp's interleaved ones."""
    order_H2X = np.arange(rows).reshape(heads, 2, rows // heads // 2)
    return order_H2X.swapaxes(1, 2).reshape(-1)


def _order_value_heads(shape: ModelShape, rows: int) -> Order | None:
    """Return the order of value heads, the last rows, by their index among those of one key head.

    The checkpoint has all value heads of the first key head, then those of the second; ggml repeats
    keys as a whole, so the first value head of every key head comes first.
    """
    if not shape.config.get("linear_num_key_heads"):
        return None

    groups = shape.integer("linear_num_key_heads")
    heads = shape.integer("linear_num_value_heads")
    if heads == groups:
        return None

    value_rows = heads if rows == heads else shape.integer("linear_value_width")
    order_GHX = np.arange(rows - value_rows, rows).reshape(
        groups, heads // groups, value_rows // heads
    )
    order_X = order_GHX.swapaxes(0, 1).reshape(-1)
    return np.concatenate([np.arange(rows - value_rows), order_X])
