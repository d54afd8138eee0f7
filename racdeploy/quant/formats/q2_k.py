"""Q2_K: 256 unsigned 2-bit codes, a 4-bit scale and minimum for each 16, two half-precision scales.

The minimum shifts zero: ggml's own choice of minima loses zeros, optimized rounding keeps them.
Source: ``block_q2_K`` in ggml-common.h, ``dequantize_row_q2_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from racdeploy.quant import GgmlCodec, Quant, ggml
from racdeploy.quant.grid import (
    Bytes,
    Grid,
    GridCodes,
    as_half,
    join_fields,
    pack_quarters,
    whole_codes,
)

_BLOCK = 256
_GROUP = 16


def _pack(codes: GridCodes) -> Bytes:
    assert codes.step_code_OG is not None
    assert codes.minimum_code_OG is not None
    assert codes.minimum_scale_OX is not None
    number_OG = codes.step_code_OG | codes.minimum_code_OG << 4
    code_N2P = pack_quarters(codes.code_OI.reshape(-1, 2, 4, 32))
    fields_NP = [
        number_OG.astype(np.uint8).reshape(-1, _BLOCK // _GROUP),
        code_N2P.reshape(-1, 64),
        as_half(codes.scale_OX),
        as_half(codes.minimum_scale_OX),
    ]
    return join_fields(codes, fields_NP)


QUANT = Quant(
    codec=GgmlCodec("q2_k", ggml),
    preserves_zero=False,
    grid=Grid(
        values=whole_codes(0, 3),
        block_size=_BLOCK,
        group_size=_GROUP,
        pack=_pack,
        step_codes=(0, 15),
        minimum_codes=(0, 15),
    ),
    fallback="q4_0",
)
