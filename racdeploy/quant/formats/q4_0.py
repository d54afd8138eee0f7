"""Q4_0: 32 signed 4-bit codes and a half-precision scale; code 8 is zero."""

from __future__ import annotations

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


def pack(codes: GridCodes) -> Bytes:
    """Return packed rows of 4-bit codes with a scale per block."""
    code_NS = codes.code_OI.reshape(-1, _BLOCK)
    return join_fields(codes, [as_half(codes.scale_OX), pack_halves(code_NS)])


QUANT = Quant(
    codec=GgmlCodec("q4_0", numpy_ggml),
    preserves_zero=True,
    grid=Grid(
        values=whole_codes(-8, 7),
        block_size=_BLOCK,
        group_size=_BLOCK,
        pack=pack,
    ),
)
