"""What the packings of ONNX graphs leave out: the codes of zero in one array of a linear, whose scales stay plain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.layouts import LAYOUTS, Layout

Bytes = NDArray[np.uint8]
_LEAST_SAVING = 0.03


@dataclass(frozen=True)
class Codes:
    """Codes of one number format.

    Args:
        dtype: unsigned, as wide as a code.
        zero: the code that is left out.
        layout: how the chunks of the container hold them.
    """

    dtype: np.dtype[Any]
    zero: int
    layout: Layout


def _split(body_BP: Bytes) -> Bytes:
    return (body_BP ^ np.uint8(0x80)).reshape(-1)  # a code of 128 is zero


def _join(codes: Bytes) -> tuple[Bytes]:
    return (codes ^ np.uint8(0x80),)


_BY_BITS = {
    32.0: Codes(np.dtype("<u4"), 0, LAYOUTS[0]),
    16.0: Codes(np.dtype("<u2"), 0, LAYOUTS[1]),
    8.5: Codes(np.dtype("u1"), 128, Layout("matmulnbits_8", 1, 1, 0, (8,), _split, _join, (1,))),
}


BY_DTYPE = {"<f4": _BY_BITS[32.0], "<f2": _BY_BITS[16.0], "|u1": _BY_BITS[8.5]}
"""By the type of the array that an ONNX graph holds."""


def codes_of(quant: Any) -> Codes | None:
    """Return the codes of a number format of ONNX, or None where a mask of one bit a weight is not offered."""
    return _BY_BITS.get(quant.BITS) if "onnx" in quant.FORMATS else None


def refusal(quant: Any, zeros_fraction: float) -> str:
    """Return why a tensor is better stored plain, or an empty string."""
    codes = codes_of(quant)
    if codes is None:
        return f"codes of {quant.BITS:g} bits a weight are no whole bytes; f32, f16 and matmulnbits_8 are"
    if zeros_fraction * 8 * codes.dtype.itemsize - 1 >= _LEAST_SAVING * quant.BITS:
        return ""
    return f"{zeros_fraction:.1%} zeros do not pay for a mask of one bit a weight"


def split(codes: Codes, flat: NDArray[Any]) -> tuple[Bytes, NDArray[Any]]:
    """Return the mask, low bits first, and the codes that are not zero; any bits but those of zero are kept."""
    keep = flat.view(codes.dtype) != codes.zero
    return np.packbits(keep, bitorder="little"), flat[keep]


def join(codes: Codes, mask: Bytes, kept: NDArray[Any], count: int) -> NDArray[Any]:
    """Return the codes again."""
    flat = np.full(count, codes.zero, dtype=codes.dtype).view(kept.dtype)
    flat[np.unpackbits(mask, count=count, bitorder="little").view(np.bool_)] = kept
    return flat


def split_rows(codes: Codes, quant: Any, packed_OP: Bytes) -> tuple[Bytes, NDArray[Any], Bytes]:
    """Return the length of a row in eight bytes, the codes of all rows, and the bytes behind the codes of each row."""
    I = round(packed_OP.shape[1] * 8 / quant.BITS)
    code_OP, rest_OP = np.split(packed_OP, [I * codes.dtype.itemsize], axis=1)
    flat = np.ascontiguousarray(code_OP).reshape(-1).view(codes.dtype)
    return np.array([I], dtype="<u8").view(np.uint8), flat, rest_OP.reshape(-1)


def join_rows(flat: NDArray[Any], rest: Bytes, rows: int) -> Bytes:
    """Return the packed rows again."""
    return np.concatenate([flat.view(np.uint8).reshape(rows, -1), rest.reshape(rows, -1)], axis=1)
