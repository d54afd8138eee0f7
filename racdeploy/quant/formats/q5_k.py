"""Q5_K: 256 unsigned 5-bit codes, a 6-bit scale and minimum for each 32, two half-precision scales.

Source: ``block_q5_K`` in ggml-common.h, ``dequantize_row_q5_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from racdeploy.quant import GgmlCodec, Quant, ggml
from racdeploy.quant.formats import q4_k
from racdeploy.quant.grid import Bytes, Grid, GridCodes, pack_halves, whole_codes

_BLOCK = 256
_GROUP = 32


def _pack(codes: GridCodes) -> Bytes:
    code_NGS = codes.code_OI.reshape(-1, _BLOCK // _GROUP, _GROUP)
    # Byte i has the high bits of weight i of each group.
    high_NS = np.packbits(code_NGS >> np.uint8(4), axis=1, bitorder="little")[:, 0]
    low_N4P = pack_halves((code_NGS & np.uint8(15)).reshape(-1, 4, 64))
    return q4_k.join_blocks(codes, high_NS, low_N4P.reshape(-1, 128))


QUANT = Quant(
    codec=GgmlCodec("q5_k", ggml),
    preserves_zero=False,
    grid=Grid(
        values=whole_codes(0, 31),
        block_size=_BLOCK,
        group_size=_GROUP,
        pack=_pack,
        step_codes=(0, 63),
        minimum_codes=(0, 63),
    ),
    fallback="q5_0",
    preset_fallback="q8_0",
)
