"""Q8_0: 32 signed 8-bit codes and a half-precision scale."""

from __future__ import annotations

import numpy as np

from racdeploy.quant import make_ggml_members, numpy_ggml
from racdeploy.quant.grid import Bytes, Grid, GridCodes, as_half, join_fields, whole_codes

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("q8_0", numpy_ggml)
PRESERVES_ZERO = True
IGNORES_IMPORTANCE = True


def _pack(codes: GridCodes) -> Bytes:
    stored_NS = (codes.code_OI.reshape(-1, BLOCK_SIZE) + np.uint8(129)).view(np.int8)  # 0 is −127
    return join_fields(codes, as_half(codes.scale_OX), stored_NS)


GRID = Grid(whole_codes(-127, 127), BLOCK_SIZE, BLOCK_SIZE, _pack)
