"""The change of a tensor on its way into a GGUF file, without llama.cpp, which sees it whole."""

from __future__ import annotations

import numpy as np

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.conversion import Conversion, find_conversion, find_rotary_order
from racdeploy.models.sources import resolve_model

ORDER_O = np.array([2, 0, 1])
ORDER_I = np.array([1, 0])


def test_rows_are_taken_and_converted_in_the_order_of_the_file() -> None:
    """Factors belong to rows of the checkpoint, whichever rows of the file are asked for."""
    factors = [np.float32([[2]]), np.float32([[1], [10], [100]])]
    conversion = Conversion(ORDER_O, ORDER_I, factors=factors)
    weight_OI = np.arange(6, dtype=np.float32).reshape(3, 2)

    rows = conversion.find_rows(slice(0, 2))
    converted_OI = conversion.convert(weight_OI[rows], rows)
    assert converted_OI.tolist() == [[5 * 200, 4 * 200], [1 * 2, 0]]


def test_importances_follow_their_columns() -> None:
    """Those of a tensor whose columns stay are returned as they are."""
    importance_I = np.float32([1, 2])
    reordered_I = Conversion(order_I=ORDER_I).reorder_columns(importance_I)
    assert reordered_I is not None
    assert reordered_I.tolist() == [2, 1]
    assert Conversion(ORDER_O).reorder_columns(importance_I) is importance_I


def test_a_vector_is_reordered_as_one_row() -> None:
    """A bias of queries has the order of the rows of its matrix."""
    shape = Checkpoint(resolve_model("tiny-reasoner").folder).shape
    size = 2 * shape.head_dim
    bias = find_conversion("rotary", shape, "blk.0.attn_q.bias", (size,))
    matrix = find_conversion("rotary", shape, "blk.0.attn_q.weight", (size, 8))

    assert bias.order_O is None
    assert bias.order_I is not None
    assert matrix.order_O is not None
    assert find_rotary_order(size, 2).tolist() == bias.order_I.tolist() == matrix.order_O.tolist()
