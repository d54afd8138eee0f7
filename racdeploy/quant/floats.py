"""Unquantized formats: weights as little-endian floats of a numpy dtype."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def quantize(
    dtype: str, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed_OP; weights too large for the dtype become infinite."""
    with np.errstate(over="ignore"):
        stored_OI = np.ascontiguousarray(weight_OI).astype(dtype, copy=False)
    return stored_OI.view(np.uint8)


def dequantize(dtype: str, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weight_OI, without a copy if the bytes are contiguous float32."""
    stored_OI = np.ascontiguousarray(packed_OP).view(dtype)
    assert stored_OI.shape[1] == I, "packed rows do not match the row length"
    return stored_OI.astype(np.float32, copy=False)
