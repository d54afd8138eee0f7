"""Q2_K: 256 unsigned 2-bit codes, a 4-bit scale and minimum for each 16, two half-precision scales.

The minimum shifts zero: ggml's own choice of minima loses zeros, optimized rounding keeps them.
Source: ``block_q2_K`` in ggml-common.h, ``dequantize_row_q2_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from racdeploy.quant import ggml, make_ggml_members
from racdeploy.quant.grid import (
    Bytes,
    Grid,
    GridCodes,
    as_half,
    join_fields,
    pack_quarters,
    whole_codes,
)

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("q2_k", ggml)
PRESERVES_ZERO = False
_GROUP = 16


def _pack(codes: GridCodes) -> Bytes:
    assert codes.step_code_OG is not None
    assert codes.minimum_code_OG is not None
    assert codes.minimum_scale_OX is not None
    number_OG = codes.step_code_OG | codes.minimum_code_OG << 4
    code_N2P = pack_quarters(codes.code_OI.reshape(-1, 2, 4, 32))
    return join_fields(
        codes,
        number_OG.astype(np.uint8).reshape(-1, BLOCK_SIZE // _GROUP),
        code_N2P.reshape(-1, 64),
        as_half(codes.scale_OX),
        as_half(codes.minimum_scale_OX),
    )


GRID = Grid(whole_codes(0, 3), BLOCK_SIZE, _GROUP, _pack, (0, 15), (0, 15))
