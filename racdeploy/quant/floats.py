"""Unquantized formats of ggml: weights as little-endian floats."""

from __future__ import annotations

import numpy as np

from racdeploy.quant.grid import Bytes, Floats

_DTYPES = ("<f4", "<f2")  # by ggml's type id


def quantize(ggml_type: int, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
    """Return packed_OP; weights too large for the type become infinite."""
    with np.errstate(over="ignore"):
        stored_OI = np.ascontiguousarray(weight_OI).astype(_DTYPES[ggml_type], copy=False)
    return stored_OI.view(np.uint8)


def dequantize(ggml_type: int, packed_OP: Bytes, I: int) -> Floats:
    """Return float32 weight_OI, without a copy if the bytes are contiguous float32."""
    stored_OI = np.ascontiguousarray(packed_OP).view(_DTYPES[ggml_type])
    assert stored_OI.shape[1] == I, "packed rows do not match the row length"
    return stored_OI.astype(np.float32, copy=False)
