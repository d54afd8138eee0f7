"""Q5_0: 32 signed 5-bit codes and a half-precision scale; code 16 is zero."""

from __future__ import annotations

import numpy as np

from racdeploy.quant import GgmlCodec, Quant, numpy_ggml
from racdeploy.quant.grid import (
    Bytes,
    Grid,
    GridCodes,
    as_half,
    join_fields,
    pack_halves,
    whole_codes,
)

_BLOCK = 32


def _pack(codes: GridCodes) -> Bytes:
    code_NS = codes.code_OI.reshape(-1, _BLOCK)
    high_N4 = np.packbits(code_NS >> np.uint8(4), axis=1, bitorder="little")
    low_NX = pack_halves(code_NS & np.uint8(15))
    return join_fields(codes, [as_half(codes.scale_OX), high_N4, low_NX])


QUANT = Quant(
    codec=GgmlCodec("q5_0", numpy_ggml),
    preserves_zero=True,
    grid=Grid(
        values=whole_codes(-16, 15),
        block_size=_BLOCK,
        group_size=_BLOCK,
        pack=_pack,
    ),
)
