"""Check that a mask over the codes of a tensor saves bytes."""

from __future__ import annotations

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
