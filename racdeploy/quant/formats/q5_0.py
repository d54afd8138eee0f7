"""Q5_0: 32 signed 5-bit codes and a half-precision scale; code 16 is zero."""

from __future__ import annotations

import numpy as np

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
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("q5_0", numpy_ggml)
PRESERVES_ZERO = True


def _pack(codes: GridCodes) -> Bytes:
    code_NS = codes.code_OI.reshape(-1, BLOCK_SIZE)
    high_N4 = np.packbits(code_NS >> np.uint8(4), axis=1, bitorder="little")
    low_NX = pack_halves(code_NS & np.uint8(15))
    return join_fields(codes, as_half(codes.scale_OX), high_N4, low_NX)


GRID = Grid(whole_codes(-16, 15), BLOCK_SIZE, BLOCK_SIZE, _pack)
