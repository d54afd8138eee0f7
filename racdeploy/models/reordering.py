"""In which order llama.cpp wants rows and columns, where it is another than the checkpoint's.

Source: llama.cpp ``conversion/llama.py`` (``LlamaModel.permute``) and ``conversion/qwen.py``
(``_LinearAttentionVReorderBase``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.models.decoder import Transform
from racdeploy.models.shape import ModelShape

Order = NDArray[np.intp]


def order_rows(transform: Transform | None, shape: ModelShape, rows: int) -> Order | None:
    """Return which row of a tensor comes at each place, or None where all stay."""
    make = _ROWS.get(transform)
    return make(shape, rows) if make else None


def order_columns(transform: Transform | None, shape: ModelShape, columns: int) -> Order | None:
    """Return which column of a matrix comes at each place, or None where all stay."""
    return _order_value_heads(shape, columns) if transform == "value_columns" else None


def order_rotary(rows: int, heads: int) -> Order:
    """Return the row order that turns half-split rotary pairs into llama.cpp's interleaved ones."""
    order_H2X = np.arange(rows).reshape(heads, 2, rows // heads // 2)
    return order_H2X.swapaxes(1, 2).reshape(-1)


def _order_value_heads(shape: ModelShape, rows: int) -> Order | None:
    """Lay value heads, the last rows, by their place among those of one key head.

    The checkpoint has all of the first key head, then all of the second; ggml repeats keys as a
    whole, so that the first of every key head come first.
    """
    if not shape.config.get("linear_num_key_heads"):
        return None

    groups = shape.integer("linear_num_key_heads")
    heads = shape.integer("linear_num_value_heads")
    if heads == groups:
        return None

    own = heads if rows == heads else shape.integer("linear_value_width")
    order_GHX = np.arange(rows - own, rows).reshape(groups, heads // groups, own // heads)
    order_X = order_GHX.swapaxes(0, 1).reshape(-1)
    return np.concatenate([np.arange(rows - own), order_X])


_ROWS: Mapping[Any, Callable[[ModelShape, int], Order | None]] = {
    "rotary": lambda shape, rows: order_rotary(rows, rows // shape.head_dim),
    "value_rows": _order_value_heads,
    "decay": _order_value_heads,
}
