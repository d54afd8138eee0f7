"""Streams of bits, from which numpy takes pieces of many widths at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def find_places(width: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Return at which bit each piece begins, given the bits of each, and the bits of all."""
    ends = np.empty(width.size + 1, dtype=np.int64)
    ends[0] = 0
    np.add.accumulate(width, out=ends[1:])
    return ends[:-1], int(ends[-1])


def read_windows(stream: NDArray[np.uint8], kind: np.dtype[Any], step: int) -> NDArray[Any]:
    """Return the numbers of ``kind``, at most eight bytes, from every ``step`` bytes on.

    The numbers overlap where ``step`` is less than their size; zeros follow the stream.
    """
    padded = np.zeros(stream.size + 12, dtype=np.uint8)
    padded[: stream.size] = stream
    count = stream.size // step + 1
    return np.ndarray(count, kind, padded, 0, (step,))
