"""Bitmask for an operator of racdeploy's own: a second ONNX graph whose linears are multiplied as they are packed.

The plain graph stays what every other program reads. The second one is smaller in the file and in memory, and faster
where racdeploy's operator is built and the processor has the instructions for it; see docs/accel.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.sparse_matrix import SparseMatrix, join, kind_of, split

FORMATS = ("onnx",)
REQUIRES_ZEROS = True
_LEAST_SAVING = 0.03


def fits(quant: Any, zeros_fraction: float) -> str:
    """Return why a tensor of that number format and share of zeros is better stored plain, or an empty string."""
    kind = kind_of(quant)
    if kind is None:
        return "the operator knows f16, matmulnbits_8 and matmulnbits_4"
    if zeros_fraction * kind.bits - 1 >= _LEAST_SAVING * quant.BITS:
        return ""
    return f"{zeros_fraction:.1%} zeros do not pay for a mask of one bit a weight"


def pack(quant: Any, packed_OP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the length of a row, the heads, the offsets, and the values of the rows."""
    kind = kind_of(quant)
    assert kind
    matrix = split(kind, packed_OP)
    I = np.array([round(packed_OP.shape[1] * 8 / quant.BITS)], dtype="<i8")
    parts = I, matrix.heads_OP, matrix.offsets.astype("<i8"), matrix.values
    return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])


def unpack(quant: Any, stored: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """Return the packed rows.

    Raises:
        ValueError: the parts do not fit each other.
    """
    kind = kind_of(quant)
    assert kind
    I = int(stored[:8].copy().view("<i8")[0])
    head_bytes = rows * -(-I // 256) * kind.head_bytes
    heads, offsets, values = np.split(stored[8:], [head_bytes, head_bytes + 8 * (rows + 1)])
    return join(kind, SparseMatrix(heads.reshape(rows, -1), values, offsets.copy().view("<i8")), I)
