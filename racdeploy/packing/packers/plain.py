"""Plain: every weight is stored, zeros included, as every engine reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMATS = ("gguf", "onnx")
REQUIRES_ZEROS = False


def fits(quant: Any, zeros_fraction: float) -> str:
    """Return an empty string: any tensor can be stored plain."""
    return ""


def pack(quant: Any, packed_OP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the packed rows one after another."""
    return np.ascontiguousarray(packed_OP).reshape(-1)


def unpack(quant: Any, stored: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """Return the packed rows."""
    return stored.reshape(rows, -1)
