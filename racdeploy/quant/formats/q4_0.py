"""Q4_0: 32 signed 4-bit codes and a half-precision scale; code 8 is zero."""

from __future__ import annotations

from racdeploy.quant import make_ggml_members, numpy_ggml
from racdeploy.quant.grid import (
    Bytes,
    Grid,
    GridCodes,
    as_half,
    join_fields,
    pack_halves,
    whole_codes,
)

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("q4_0", numpy_ggml)
PRESERVES_ZERO = True


def pack(codes: GridCodes) -> Bytes:
    """Return packed rows of 4-bit codes with a scale per block."""
    code_NS = codes.code_OI.reshape(-1, BLOCK_SIZE)
    return join_fields(codes, as_half(codes.scale_OX), pack_halves(code_NS))


GRID = Grid(whole_codes(-8, 7), BLOCK_SIZE, BLOCK_SIZE, pack)
