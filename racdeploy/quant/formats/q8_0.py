"""Q8_0: 32 signed 8-bit codes and a half-precision scale."""

from __future__ import annotations

import numpy as np

from racdeploy.quant import GgmlCodec, Quant, numpy_ggml
from racdeploy.quant.grid import Bytes, Grid, GridCodes, as_half, join_fields, whole_codes

_BLOCK = 32


def _pack(codes: GridCodes) -> Bytes:
    stored_NS = (codes.code_OI.reshape(-1, _BLOCK) + np.uint8(129)).view(np.int8)  # 0 is −127
    return join_fields(codes, [as_half(codes.scale_OX), stored_NS])


QUANT = Quant(
    codec=GgmlCodec("q8_0", numpy_ggml, uses_importance=False),
    preserves_zero=True,
    grid=Grid(
        values=whole_codes(-127, 127),
        block_size=_BLOCK,
        group_size=_BLOCK,
        pack=_pack,
    ),
)
