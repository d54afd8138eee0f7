"""What packings of ONNX graphs leave out: the codes of zero in one array; scales stay plain."""

from __future__ import annotations

from racdeploy import quant as quants
from racdeploy.packing.layouts import LAYOUTS, Layout

_LEAST_SAVING = 0.03  # of the bytes of a tensor


# By the type of the array that a graph holds; codes are whole bytes.
BY_DTYPE = {
    "<f4": LAYOUTS[0],
    "<f2": LAYOUTS[1],
    "|u1": Layout("matmulnbits_8", 1, 1, 0, (8,), "u1", flip=128),
}
_BY_QUANT = {layout.name: layout for layout in BY_DTYPE.values()}


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
    layout, bits = _BY_QUANT.get(quant), quants.load(quant).BITS
    if layout is None:
        known = "f32, f16 and matmulnbits_8 are"
        return f"codes of {bits:g} bits a weight are no whole bytes; {known}"
    return refuse_mask(zeros_fraction, sum(layout.widths), bits)
