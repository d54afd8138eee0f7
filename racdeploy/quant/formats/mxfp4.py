"""MXFP4: 32 four-bit floats (E2M1) with a shared power-of-two scale; codes 0 and 8 are zero.

Source: OCP Microscaling Formats specification 1.0; ``quantize_row_mxfp4_ref`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from racdeploy.quant import GgmlCodec, Quant, numpy_ggml
from racdeploy.quant.grid import Bytes, Grid, GridCodes, join_fields, pack_halves

_BLOCK = 32


def _pack_grid(codes: GridCodes) -> Bytes:
    _, above_OX = np.frexp(codes.scale_OX)  # a scale is 2**(above − 1)
    exponent_N1 = (above_OX.reshape(-1, 1) + 127).astype(np.uint8)
    code_NX = pack_halves(codes.code_OI.reshape(-1, _BLOCK))
    return join_fields(codes, [exponent_N1, code_NX])


QUANT = Quant(
    codec=GgmlCodec("mxfp4", numpy_ggml, uses_importance=False),
    preserves_zero=True,
    grid=Grid(
        values=(0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12),  # in halves
        block_size=_BLOCK,
        group_size=_BLOCK,
        pack=_pack_grid,
        scale="power_of_two",
    ),
    is_profiled=False,  # of experts alone
)
