"""Change of a tensor from the checkpoint's form to that of a GGUF file: order, values and factors.

A model may multiply activations by factors, which a GGUF file has in its weights.
Source: llama.cpp ``conversion/llama.py`` (``LlamaModel.permute``), ``conversion/qwen.py``
(``_LinearAttentionVReorderBase``) and ``conversion/falcon_h1.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from racdeploy.models.decoder import Transform
from racdeploy.models.shape import ModelShape

Floats = NDArray[np.float32]
Order = NDArray[np.intp]


def _add_one(weight_OI: Floats) -> Floats:
    return weight_OI + np.float32(1)


def _negate_exponential(weight_OI: Floats) -> Floats:
    changed_OI: Floats = -np.exp(weight_OI)
    return changed_OI


@dataclass(frozen=True)
class Conversion:
    """Change of one tensor, the same for each of its parts; a vector is one row.

    Args:
        order_O: index in the checkpoint of each row of the file; None: the same order.
        order_I: the same for columns.
        change: function of all values; None: they stay.
        factors: of the rows, applied one after the other; one number, (1, 1), or each its own,
            (O, 1).
    """

    order_O: Order | None = None
    order_I: Order | None = None
    change: Callable[[Floats], Floats] | None = None
    factors: Sequence[Floats] = ()

    def find_rows(self, chunk: slice) -> slice | Order:
        """Return the indices in the checkpoint of some rows of the file."""
        return chunk if self.order_O is None else self.order_O[chunk]

    def reorder_columns(self, values_I: Floats | None) -> Floats | None:
        """Return values of the checkpoint's columns in the order of the file."""
        if values_I is None or self.order_I is None:
            return values_I
        return values_I[self.order_I]

    def convert(self, weight_OI: Floats, rows: slice | Order) -> Floats:
        """Return rows as they are in the file.

        Args:
            weight_OI: rows of the checkpoint, in the order of the file.
            rows: their indices in the checkpoint.
        """
        if self.order_I is not None:
            weight_OI = weight_OI[:, self.order_I]
        if self.change:
            weight_OI = self.change(weight_OI)

        for factor_X1 in self.factors:
            is_one_number = len(factor_X1) == 1
            weight_OI = weight_OI * (factor_X1 if is_one_number else factor_X1[rows])
        return weight_OI


def find_conversion(
    transform: Transform | None, shape: ModelShape, name: str, part_shape: Sequence[int]
) -> Conversion:
    """Return the change of a tensor on export.

    Args:
        transform: the family's name for it.
        name: of the tensor in the file.
        part_shape: of the tensor, or of one of the parts that it is made of, outputs first.
    """
    rows, columns = part_shape[0], part_shape[-1]
    order_O: Order | None = None
    order_I: Order | None = None
    change: Callable[[Floats], Floats] | None = None

    match transform:
        case "rotary":
            order_O = find_rotary_order(rows, rows // shape.head_dim)
        case "value_rows":
            order_O = find_value_head_order(shape, rows)
        case "value_columns":
            order_I = find_value_head_order(shape, columns)
        case "decay":
            order_O = find_value_head_order(shape, rows)
            change = _negate_exponential
        case "plus_one":
            change = _add_one

    if len(part_shape) == 1:  # a vector is written as one row
        order_I = order_O
        order_O = None
    return Conversion(order_O, order_I, change, _list_row_factors(shape, name))


def find_rotary_order(rows: int, heads: int) -> Order:
    """Return the row order from half-split rotary pairs to llama.cpp's interleaved ones."""
    order_H2X = np.arange(rows).reshape(heads, 2, rows // heads // 2)
    return order_H2X.swapaxes(1, 2).reshape(-1)


def find_value_head_order(shape: ModelShape, rows: int) -> Order | None:
    """Return the order of value heads, the last rows, by their index among those of one key head.

    None: it does not change. The checkpoint has all value heads of the first key head, then those
    of the second; ggml repeats keys as a whole, so the first value head of every key head comes
    first.
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


def _list_row_factors(shape: ModelShape, name: str) -> list[Floats]:
    """Return the factors of the rows of a tensor in a GGUF file, applied one after the other.

    Each is one number for all rows, (1, 1), or one for each, (O, 1).
    """
    stored = re.sub(r"^blk\.\d+\.", "", name).removesuffix(".weight")
    factors = []
    for setting in shape.family.scaling.rows.get(stored, ()):
        value_X = np.atleast_1d(np.float32(shape.setting(setting)))
        if len(value_X) > 1:  # one for each of the matrices in a tensor
            letters = shape.family.axes[stored][0].split("+")
            value_X = np.repeat(value_X, [shape.sizes[0][letter] for letter in letters])
        factors.append(value_X[:, None])
    return factors
