"""Q5_K: 256 unsigned 5-bit codes, a 6-bit scale and minimum for each 32, two half-precision scales.

Source: ``block_q5_K`` in ggml-common.h, ``dequantize_row_q5_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from racdeploy.quant import ggml, make_ggml_members
from racdeploy.quant.formats import q4_k
from racdeploy.quant.grid import Bytes, Grid, GridCodes, pack_halves, whole_codes

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("q5_k", ggml)
PRESERVES_ZERO = False
_GROUP = 32


def _pack(codes: GridCodes) -> Bytes:
    code_NGS = codes.code_OI.reshape(-1, BLOCK_SIZE // _GROUP, _GROUP)
    # Byte i has the high bits of weight i of each group.
    high_NS = np.packbits(code_NGS >> np.uint8(4), axis=1, bitorder="little")[:, 0]
    low_N4P = pack_halves((code_NGS & np.uint8(15)).reshape(-1, 4, 64))
    return q4_k.join_blocks(codes, high_NS, low_N4P.reshape(-1, 128))


GRID = Grid(whole_codes(0, 31), BLOCK_SIZE, _GROUP, _pack, (0, 63), (0, 63))
