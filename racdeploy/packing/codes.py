"""What packings of ONNX graphs leave out: the codes of zero in one array; scales stay plain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from racdeploy import quant as quants
from racdeploy.packing.layouts import LAYOUTS, Layout

_LEAST_SAVING = 0.03  # of the bytes of a tensor


@dataclass(frozen=True)
class Codes:
    """Codes of one number format; ``zero`` is the one that is left out."""

    dtype: np.dtype[Any]  # unsigned, as wide as a code
    zero: int
    layout: Layout


_MATMULNBITS_8 = Layout("matmulnbits_8", 1, 1, 0, (8,), "u1", (1,), flip=128)
BY_QUANT = {
    "f32": Codes(np.dtype("<u4"), 0, LAYOUTS[0]),
    "f16": Codes(np.dtype("<u2"), 0, LAYOUTS[1]),
    "matmulnbits_8": Codes(np.dtype("u1"), 128, _MATMULNBITS_8),
}
"""Number formats of ONNX whose codes are whole bytes."""
BY_DTYPE = {"<f4": BY_QUANT["f32"], "<f2": BY_QUANT["f16"], "|u1": BY_QUANT["matmulnbits_8"]}
"""By the type of the array that a graph holds."""


def refuse_mask(zeros_fraction: float, code_bits: float, bits: float) -> str:
    """Return why a mask does not pay, or an empty string.

    A zero saves the ``code_bits`` of its code; a weight has ``bits``, scales included.
    """
    saved_bits = zeros_fraction * code_bits - 1
    if saved_bits >= _LEAST_SAVING * bits:
        return ""
    return f"{zeros_fraction:.1%} zeros do not pay for a mask of one bit a weight"


def refusal(quant: str, zeros_fraction: float) -> str:
    """Return why a tensor of a quant is better stored plain, or an empty string."""
    codes, bits = BY_QUANT.get(quant), quants.load(quant).BITS
    if codes is None:
        known = "f32, f16 and matmulnbits_8 are"
        return f"codes of {bits:g} bits a weight are no whole bytes; {known}"
    return refuse_mask(zeros_fraction, 8 * codes.dtype.itemsize, bits)
