"""Number formats: one file per ggml type, numpy in and packed bytes out.

A format file holds the members of :class:`Quant`. Packed bytes are exactly what a GGUF file stores, and
``PRESERVES_ZERO`` is a promise that the contract test holds against ggml's C code: where it is True, a weight
that is zero is zero after the round trip, so pruning survives.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from racdeploy import plugins

__all__ = ["Quant", "fits", "load"]


class Quant(Protocol):
    """A number format, as a module.

    ``GGML_TYPE`` is ggml's type id, ``BITS`` the bits per weight with scales, ``BLOCK`` how many weights of a
    row share their scales. ``quantize`` takes finite float32 weight_OI with ``I`` a multiple of ``BLOCK`` and
    returns packed_OP, ``I * BITS / 8`` bytes a row; ``dequantize`` returns float32 weight_OI.
    """

    GGML_TYPE: int
    BITS: float
    BLOCK: int
    PRESERVES_ZERO: bool

    def quantize(self, weight_OI: NDArray[np.float32]) -> NDArray[np.uint8]: ...

    def dequantize(self, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]: ...


def load(name: str) -> Quant:
    """Import the number format of that name.

    Raises:
        UnknownPluginError: there is no such format.
        MissingExtraError: it needs an optional dependency.
    """
    return cast(Quant, plugins.load("quant", name))


def fits(quant: Quant, row_length: int) -> str:
    """Return why rows of that many weights cannot be stored in a format, or an empty string."""
    if row_length % quant.BLOCK == 0:
        return ""
    return f"rows of {row_length} weights do not divide into quant blocks of {quant.BLOCK}"
