"""Streams of bits, from which numpy takes pieces of many widths at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def find_places(width: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Return at which bit each piece begins, given the bits of each, and the bits of all."""
    ends = np.zeros(width.size + 1, dtype=np.int64)
    np.add.accumulate(width, out=ends[1:])
    return ends[:-1], int(ends[-1])


def read_windows(stream: Bytes, kind: np.dtype[Any], step: int) -> NDArray[Any]:
    """Return the number of ``kind``, at most eight bytes, at every ``step`` bytes; zeros follow."""
    padded = np.zeros(stream.size + 12, dtype=np.uint8)
    padded[: stream.size] = stream
    return np.ndarray(stream.size // step + 1, kind, padded, strides=(step,))
