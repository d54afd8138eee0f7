"""MatMulNBits with 4 bits, a zero point per 32 weights, and scales searched as in K-quants.

Several ranges are tried for every block. Each gives codes, for which the best scale is solved by
least squares; the one with the least magnitude-weighted error wins. The zero point is a code, so
zeros stay zeros.
Source: ``make_qkx2_quants`` in ggml-quants.c; the minimum of a block is a multiple of its scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import Quant
from racdeploy.quant.grid import Bytes, Floats, Grid, GridCodes, whole_codes
from racdeploy.quant.matmulnbits import BLOCK_SIZE, MatMulNBitsBlocks, MatMulNBitsCodec, invert

_MAX_CODE = np.float32(15)
# A block's range is divided into 14 to 16 steps; with 15 its ends have the codes 0 and 15.
_STEP_OFFSETS = 0.1 * np.arange(-10, 11, dtype=np.float32)
_SLAB_BLOCKS = 65_536  # searched at a time, to bound memory


def _make_blocks(weight_OI: Floats) -> MatMulNBitsBlocks:
    """Return the blocks of float32 weight_OI."""
    O, I = weight_OI.shape
    weight_GS = weight_OI.reshape(-1, BLOCK_SIZE)

    codes, scales, zeros = [], [], []
    for start in range(0, len(weight_GS), _SLAB_BLOCKS):
        code_GS, scale_G, zero_G = _search(weight_GS[start : start + _SLAB_BLOCKS])
        codes.append(code_GS)
        scales.append(scale_G)
        zeros.append(zero_G)

    return MatMulNBitsBlocks(
        4,
        np.concatenate(codes).reshape(O, I),
        np.concatenate(scales).reshape(O, -1),
        np.concatenate(zeros).reshape(O, -1),
    )


def _search(
    weight_GS: Floats,
) -> tuple[Bytes, NDArray[np.float16], Bytes]:
    """Return code_GS, scale_G and zero_G with the least weighted error of each block."""
    G = len(weight_GS)
    best_G = np.full(G, np.inf, dtype=np.float32)
    scale_G = np.zeros(G, dtype=np.float16)
    zero_G = np.zeros(G, dtype=np.float32)

    # The range always includes zero, which must have its own code.
    low_G = np.minimum(weight_GS.min(axis=1), 0)
    width_G = np.maximum(weight_GS.max(axis=1), 0) - low_G
    square_G1 = np.square(weight_GS).mean(axis=1, keepdims=True)
    importance_GS = np.abs(weight_GS) + np.sqrt(square_G1)

    for offset in _STEP_OFFSETS:
        inverse_G = np.zeros_like(width_G)
        np.divide(_MAX_CODE + offset, width_G, out=inverse_G, where=width_G > 0)
        tried_zero_G = np.clip(np.rint(-low_G * inverse_G), 0, _MAX_CODE)
        level_GS = _clip(np.rint(weight_GS * inverse_G[:, None]), tried_zero_G)

        # Solve for the scale on these codes, then round again: that scale has other nearest codes.
        product_G = np.einsum("gs,gs,gs->g", weight_GS, level_GS, importance_GS)
        square_G = np.einsum("gs,gs,gs->g", level_GS, level_GS, importance_GS)
        fitted_G = np.divide(product_G, square_G, out=np.zeros_like(product_G), where=square_G > 0)
        tried_scale_G = fitted_G.astype(np.float16)
        level_GS = _round(weight_GS, tried_scale_G, tried_zero_G)

        error_GS = weight_GS - level_GS * tried_scale_G.astype(np.float32)[:, None]
        error_G = np.einsum("gs,gs,gs->g", error_GS, error_GS, importance_GS)

        better_G = error_G < best_G
        np.copyto(best_G, error_G, where=better_G)
        np.copyto(scale_G, tried_scale_G, where=better_G)
        np.copyto(zero_G, tried_zero_G, where=better_G)

    code_GS = _round(weight_GS, scale_G, zero_G) + zero_G[:, None]
    return code_GS.astype(np.uint8), scale_G, zero_G.astype(np.uint8)


def _round(weight_GS: Floats, scale_G: NDArray[np.float16], zero_G: Floats) -> Floats:
    """Return the nearest levels, integer multiples of the scale, that have a code."""
    inverse_G = invert(scale_G.astype(np.float32))
    return _clip(np.rint(weight_GS * inverse_G[:, None]), zero_G)


def _clip(level_GS: Floats, zero_G: Floats) -> Floats:
    """Clip levels to codes 0 to 15; a code is a level plus the zero point."""
    return np.asarray(np.clip(level_GS, -zero_G[:, None], _MAX_CODE - zero_G[:, None]))


def _pack_grid(codes: GridCodes) -> Bytes:
    assert codes.minimum_code_OG is not None
    zero_OG = codes.minimum_code_OG.astype(np.uint8)
    return MatMulNBitsBlocks(4, codes.code_OI, codes.scale_OX.astype(np.float16), zero_OG).pack()


QUANT = Quant(
    codec=MatMulNBitsCodec(code_bits=4, make_blocks=_make_blocks, has_zero_points=True),
    preserves_zero=True,
    grid=Grid(
        values=whole_codes(0, 15),
        block_size=BLOCK_SIZE,
        group_size=BLOCK_SIZE,
        pack=_pack_grid,
        minimum_codes=(0, 15),  # a minimum is a whole number of steps: the zero point
    ),
    js_dtype="q4",
)
