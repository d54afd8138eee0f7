"""Q4_K: 256 unsigned 4-bit codes, a 6-bit scale and minimum for each 32, two half-precision scales.

The minimum shifts zero: ggml's own choice of minima loses zeros, optimized rounding keeps them.
Source: ``block_q4_K`` in ggml-common.h, ``get_scale_min_k4`` in ggml-quants.c.
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
    pack_halves,
    whole_codes,
)

_BLOCK = 256
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
    numbers_2N8 = numbers_OG.reshape(2, -1, _BLOCK // _GROUP)
    first_2N4, last_2N4 = np.split(numbers_2N8, 2, axis=2)

    high_bits_2N4 = last_2N4 >> 4
    shared_steps_N4, shared_minima_N4 = first_2N4 | high_bits_2N4 << 6
    low_steps_N4, low_minima_N4 = last_2N4 & 15
    low_N4 = low_steps_N4 | low_minima_N4 << 4

    fields = [
        as_half(codes.scale_OX),
        as_half(codes.minimum_scale_OX),
        shared_steps_N4,
        shared_minima_N4,
        low_N4,
        *fields_NP,
    ]
    return join_fields(codes, fields)


def _pack(codes: GridCodes) -> Bytes:
    code_N4P = pack_halves(codes.code_OI.reshape(-1, 4, 64))  # two groups share bytes
    return join_blocks(codes, code_N4P.reshape(-1, 128))


QUANT = Quant(
    codec=GgmlCodec("q4_k", ggml),
    preserves_zero=False,
    grid=Grid(
        values=whole_codes(0, 15),
        block_size=_BLOCK,
        group_size=_GROUP,
        pack=_pack,
        step_codes=(0, 63),
        minimum_codes=(0, 63),
    ),
    fallback="q4_0",
    preset_fallback="q5_0",
)
