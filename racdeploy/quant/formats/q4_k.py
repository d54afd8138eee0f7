"""Q4_K: 256 unsigned 4-bit codes, a 6-bit scale and minimum for each 32, two half-precision scales.

The minimum shifts zero: ggml's own choice of minima loses zeros, optimized rounding keeps them.
Source: ``block_q4_K`` in ggml-common.h, ``get_scale_min_k4`` in ggml-quants.c.
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
    pack_halves,
    whole_codes,
)

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE, quantize, dequantize = make_ggml_members("q4_k", ggml)
PRESERVES_ZERO = False
_GROUP = 32


def join_blocks(codes: GridCodes, *fields_NP: Bytes) -> Bytes:
    """Return packed_OP of blocks: their scales, 12 bytes of step and minimum codes, other fields.

    Four steps and four minima have a byte each. Its two high bits belong to the other four, whose
    low nibbles are in the last four bytes.
    """
    assert codes.step_code_OG is not None
    assert codes.minimum_code_OG is not None
    assert codes.minimum_scale_OX is not None
    numbers_OG = np.stack([codes.step_code_OG, codes.minimum_code_OG]).astype(np.uint8)
    first_2N4, last_2N4 = np.split(numbers_OG.reshape(2, -1, BLOCK_SIZE // _GROUP), 2, axis=2)
    shared_2N4 = first_2N4 | last_2N4 >> 4 << 6
    low_N4 = last_2N4[0] & 15 | last_2N4[1] << 4
    scales = as_half(codes.scale_OX), as_half(codes.minimum_scale_OX)
    return join_fields(codes, *scales, *shared_2N4, low_N4, *fields_NP)


def _pack(codes: GridCodes) -> Bytes:
    code_N4P = pack_halves(codes.code_OI.reshape(-1, 4, 64))  # two groups share bytes
    return join_blocks(codes, code_N4P.reshape(-1, 128))


GRID = Grid(whole_codes(0, 15), BLOCK_SIZE, _GROUP, _pack, (0, 63), (0, 63))
