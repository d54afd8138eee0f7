"""Bitmask inside an ONNX graph: a mask and the other codes, joined by nodes that onnxruntime folds when it loads.

Any program with onnxruntime reads the file; the price is passing memory while it loads, so it is for small models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing._codes import codes_of, join, refusal, split

__all__ = ["FORMATS", "REQUIRES_ZEROS", "fits", "pack", "unpack"]

FORMATS = ("onnx",)
REQUIRES_ZEROS = True


def fits(quant: Any, zeros_fraction: float) -> str:
    """Return why a tensor of that number format and share of zeros is better stored plain, or an empty string."""
    return refusal(quant, zeros_fraction)


def pack(quant: Any, packed_OP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the length of a row, the mask, the codes that are not zero, and the bytes behind the codes of each row."""
    codes = codes_of(quant)
    assert codes
    I = round(packed_OP.shape[1] * 8 / quant.BITS)
    code_OP, rest_OP = np.split(packed_OP, [I * codes.dtype.itemsize], axis=1)
    mask, kept = split(codes, np.ascontiguousarray(code_OP).reshape(-1).view(codes.dtype))
    header = np.array([I], dtype="<u8").view(np.uint8)
    return np.concatenate([header, mask, kept.view(np.uint8), rest_OP.reshape(-1)])


def unpack(quant: Any, stored: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """Return the packed rows."""
    codes = codes_of(quant)
    assert codes
    I = int(stored[:8].copy().view("<u8")[0])
    mask, rest = np.split(stored[8:], [-(-rows * I // 8)])
    kept_bytes = int(np.unpackbits(mask).sum()) * codes.dtype.itemsize
    kept = np.ascontiguousarray(rest[:kept_bytes]).view(codes.dtype)
    code_OP = join(codes, mask, kept, rows * I).view(np.uint8).reshape(rows, -1)
    return np.concatenate([code_OP, rest[kept_bytes:].reshape(rows, -1)], axis=1)
