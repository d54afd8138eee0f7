"""MXFP4: 32 four-bit floats (E2M1) with a shared power-of-two scale; codes 0 and 8 are zero.

Source: OCP Microscaling Formats specification 1.0; ``quantize_row_mxfp4_ref`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from racdeploy.quant import make_ggml_members, numpy_ggml
from racdeploy.quant.grid import Bytes, Grid, GridCodes, join_fields, pack_halves

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("mxfp4", numpy_ggml)
PRESERVES_ZERO = True
IGNORES_IMPORTANCE = True


def _pack_grid(codes: GridCodes) -> Bytes:
    _, above_OX = np.frexp(codes.scale_OX)  # a scale is 2**(above − 1)
    exponent_N1 = (above_OX.reshape(-1, 1) + 127).astype(np.uint8)
    code_NX = pack_halves(codes.code_OI.reshape(-1, BLOCK_SIZE))
    return join_fields(codes, exponent_N1, code_NX)


GRID = Grid(
    (0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12),  # in halves
    BLOCK_SIZE,
    BLOCK_SIZE,
    _pack_grid,
    scale="power_of_two",
)
