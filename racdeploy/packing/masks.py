"""A mask over the codes of a tensor: one bit a weight, the first weight in the lowest bit.

A bit is set where a code is kept. Container and graph have the same mask; what lies beside it
differs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint8]

_MIN_SAVING = 0.03  # of the bytes of a tensor


def reason_against_mask(zeros_fraction: float, code_bits: float, bits: float) -> str:
    """Return why a mask does not save enough bytes, or an empty string.

    Args:
        zeros_fraction: 0 to 1; each zero saves the bits of its code.
        code_bits: bits of a code.
        bits: bits of a weight, with its share of the scales.
    """
    saved_bits = zeros_fraction * code_bits - 1
    if saved_bits >= _MIN_SAVING * bits:
        return ""
    return f"{zeros_fraction:.1%} zeros do not pay for a mask of one bit a weight"


def pack_mask(keep: NDArray[np.bool_]) -> Mask:
    """Return the bytes of a mask; bits behind the last weight are zero."""
    return np.packbits(keep, bitorder="little")


def unpack_mask(mask: Mask, weights: int) -> NDArray[np.bool_]:
    """Return for each weight if its code is kept; bits behind the last weight are not read."""
    return np.unpackbits(mask, count=weights, bitorder="little").view(np.bool_)


def count_mask_bytes(weights: int) -> int:
    """Return the bytes of a mask."""
    return -(-weights // 8)
