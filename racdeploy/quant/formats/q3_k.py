"""Q3_K: 256 signed 3-bit codes, a 6-bit scale for each 16 of them, one half-precision scale.

Source: ``block_q3_K`` in ggml-common.h, ``dequantize_row_q3_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import GgmlCodec, Quant, ggml
from racdeploy.quant.grid import (
    Bytes,
    Grid,
    GridCodes,
    as_half,
    join_fields,
    pack_halves,
    pack_quarters,
    whole_codes,
)

_BLOCK = 256
_GROUP = 16
_STEP_CODES = (-32, 31)


def _pack(codes: GridCodes) -> Bytes:
    assert codes.step_code_OG is not None
    code_N8S = codes.code_OI.reshape(-1, 8, 32)
    # Byte i has the high bits of the weights i, i + 32, …
    high_NS = np.packbits(code_N8S >> np.uint8(2), axis=1, bitorder="little")[:, 0]
    low_N2S = pack_quarters((code_N8S & np.uint8(3)).reshape(-1, 2, 4, 32))

    stored_OG = (codes.step_code_OG - _STEP_CODES[0]).astype(np.uint8)
    stored_NG = stored_OG.reshape(-1, _BLOCK // _GROUP)
    step_low_N8 = pack_halves(stored_NG & np.uint8(15))
    step_high_N4 = pack_quarters((stored_NG >> np.uint8(4)).reshape(-1, 4, 4))
    fields_NP: list[Bytes | NDArray[np.float16]] = [
        high_NS,
        low_N2S.reshape(-1, 64),
        step_low_N8,
        step_high_N4,
        as_half(codes.scale_OX),
    ]
    return join_fields(codes, fields_NP)


QUANT = Quant(
    codec=GgmlCodec("q3_k", ggml),
    preserves_zero=True,
    grid=Grid(
        values=whole_codes(-4, 3),
        block_size=_BLOCK,
        group_size=_GROUP,
        pack=_pack,
        step_codes=_STEP_CODES,
    ),
    fallback="q4_0",
)
