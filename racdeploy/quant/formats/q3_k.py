"""Q3_K: 256 signed 3-bit codes, a 6-bit scale for each 16 of them, one half-precision scale.

Blocks of weights on the grid, as pruning chooses them, are packed exactly. All others are packed by
ggml, which may change weights on the grid if it has an importance.
Source: ``block_q3_K`` in ggml-common.h, ``dequantize_row_q3_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import exact_scales, ggml, numpy_ggml, read_ggml_type
from racdeploy.quant.exact_blocks import ExactBlockCodec, pack_two_bits

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("q3_k")
CODE_RANGE = (-4, 3)
GROUP_SIZE, STEP_CODE_RANGE = 16, (-32, 31)
PRESERVES_ZERO = True

_, dequantize = ggml.make_codec(GGML_TYPE)

_LAYOUT = np.dtype(
    [("high", "u1", 32), ("low", "u1", 64), ("step_codes", "u1", 12), ("scale", "<f2")]
)
_SHIFTS = (0, 2, 4, 6)  # of the four two-bit numbers in a byte


def _fill(block_N: NDArray[np.void], blocks: exact_scales.ExactBlocks) -> None:
    code_NGS = blocks.code_NGS - CODE_RANGE[0]
    step_code_NG = blocks.step_code_NG - STEP_CODE_RANGE[0]
    block_N["high"], block_N["low"] = _pack_codes(code_NGS.astype(np.uint8))
    block_N["step_codes"] = _pack_step_codes(step_code_NG.astype(np.uint8))


def _pack_codes(code_NGS: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return high_NP, one bit of eight weights 32 apart per byte, and low_NP, two bits of four."""
    code_N8X = code_NGS.reshape(-1, 8, 32)
    high_N8X = code_N8X >> np.uint8(2)
    high_NP = np.packbits(high_N8X, axis=1, bitorder="little")[:, 0]

    low_N8X = code_N8X & np.uint8(3)
    low_N2P = pack_two_bits(low_N8X.reshape(-1, 2, 4, 32))
    return high_NP, low_N2P.reshape(-1, 64)


def _pack_step_codes(step_code_NG: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return 8 bytes of low nibbles of groups 8 apart, then 4 of high bits of groups 4 apart."""
    low_N8 = numpy_ggml.pack_nibbles(step_code_NG & np.uint8(15))
    high_NG = step_code_NG >> np.uint8(4)
    high_N4 = pack_two_bits(high_NG.reshape(-1, 4, 4))
    return np.concatenate([low_N8, high_N4], axis=1)


def _read_step_codes(block_OX: NDArray[np.void]) -> NDArray[np.float32]:
    low_OX8, high_OX4 = np.split(block_OX["step_codes"], [8], axis=2)
    low_OXG = np.concatenate([low_OX8 & 15, low_OX8 >> 4], axis=2)
    high_OXG = np.concatenate([high_OX4 >> shift & 3 for shift in _SHIFTS], axis=2)
    stored_OXG: NDArray[np.uint8] = low_OXG | high_OXG << 4
    return stored_OXG.astype(np.float32) + np.float32(STEP_CODE_RANGE[0])


_BLOCKS = ExactBlockCodec(
    GGML_TYPE,
    _LAYOUT,
    (BLOCK_SIZE // GROUP_SIZE, GROUP_SIZE),
    exact_scales.SymmetricFinder(CODE_RANGE, STEP_CODE_RANGE),
    _fill,
    _read_step_codes,
)
quantize = _BLOCKS.quantize
steps, scales = _BLOCKS.steps, _BLOCKS.scales
