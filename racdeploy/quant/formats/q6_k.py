"""Q6_K: 256 signed 6-bit codes, an 8-bit scale for each 16 of them, one half-precision scale.

Source: ``block_q6_K`` in ggml-common.h, ``dequantize_row_q6_K`` in ggml-quants.c.
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
    code_N24S = codes.code_OI.reshape(-1, 2, 4, 32)  # halves of a block, of four runs of 32
    low_N2P = (code_N24S[:, :, :2] & 15) | (code_N24S[:, :, 2:] & 15) << 4
    high_N2S = pack_quarters(code_N24S >> np.uint8(4))
    fields_NP = [
        low_N2P.reshape(-1, 128),
        high_N2S.reshape(-1, 64),
        codes.step_code_OG.astype(np.int8).reshape(-1, _BLOCK // _GROUP),
        as_half(codes.scale_OX),
    ]
    return join_fields(codes, fields_NP)


QUANT = Quant(
    codec=GgmlCodec("q6_k", ggml),
    preserves_zero=True,
    grid=Grid(
        values=whole_codes(-32, 31),
        block_size=_BLOCK,
        group_size=_GROUP,
        pack=_pack,
        step_codes=(-128, 127),
    ),
    fallback="q8_0",
)
