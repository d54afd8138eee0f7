"""Q6_K: 256 signed 6-bit codes, an 8-bit scale for each 16 of them, one half-precision scale.

Source: ``block_q6_K`` in ggml-common.h, ``dequantize_row_q6_K`` in ggml-quants.c.
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
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("q6_k", ggml)
_GROUP = 16
PRESERVES_ZERO = True


def _pack(codes: GridCodes) -> Bytes:
    assert codes.step_code_OG is not None
    code_N24S = codes.code_OI.reshape(-1, 2, 4, 32)  # halves of a block, of four runs of 32
    low_N2P = (code_N24S[:, :, :2] & 15) | (code_N24S[:, :, 2:] & 15) << 4
    high_N2S = pack_quarters(code_N24S >> np.uint8(4))
    return join_fields(
        codes,
        low_N2P.reshape(-1, 128),
        high_N2S.reshape(-1, 64),
        codes.step_code_OG.astype(np.int8).reshape(-1, BLOCK_SIZE // _GROUP),
        as_half(codes.scale_OX),
    )


GRID = Grid(whole_codes(-32, 31), BLOCK_SIZE, _GROUP, _pack, (-128, 127))
