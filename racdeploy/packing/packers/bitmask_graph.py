"""Bitmask inside an ONNX graph: a mask and the other codes, joined by nodes that onnxruntime folds when it loads.

Any program with onnxruntime reads the file; the price is passing memory while it loads, so it is for small models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.codes import codes_of, join, join_rows, refusal, split, split_rows

FORMATS = ("onnx",)
REQUIRES_ZEROS = True


def fits(quant: Any, zeros_fraction: float) -> str:
    """Return why a tensor of that number format and share of zeros is better stored plain, or an empty string."""
    return refusal(quant, zeros_fraction)


def pack(quant: Any, packed_OP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the length of a row, the mask, the codes that are not zero, and the bytes behind the codes of each row."""
    codes = codes_of(quant)
    assert codes
    length, flat, rest = split_rows(codes, quant, packed_OP)
    mask, kept = split(codes, flat)
    return np.concatenate([length, mask, kept.view(np.uint8), rest])


def unpack(quant: Any, stored: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """Return the packed rows."""
    codes = codes_of(quant)
    assert codes
    I = int(stored[:8].copy().view("<u8")[0])
    mask, rest = np.split(stored[8:], [-(-rows * I // 8)])
    kept_bytes = int(np.unpackbits(mask).sum()) * codes.dtype.itemsize
    kept = np.ascontiguousarray(rest[:kept_bytes]).view(codes.dtype)
    return join_rows(join(codes, mask, kept, rows * I), rest[kept_bytes:], rows)
