"""Q3_K: 256 signed 3-bit codes, a 6-bit scale for each 16 of them, one half-precision scale.

A block of weights that the format can hold exactly, as pruning chooses them, is packed exactly. All
others are ggml's, which may lose such weights where it knows an importance.
Source: ``block_q3_K`` in ggml-common.h, ``dequantize_row_q3_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml, multiples, numpy_ggml, read_ggml_type
from racdeploy.quant.exact_blocks import ExactBlocks, join_pairs

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK = read_ggml_type("q3_k")
CODES = (-4, 3)
GROUP_SIZE, STEP_CODES = 16, (-32, 31)
PRESERVES_ZERO = True

_, dequantize = ggml.make_codec(GGML_TYPE)

_LAYOUT = np.dtype(
    [("high", "u1", 32), ("low", "u1", 64), ("step_codes", "u1", 12), ("scale", "<f2")]
)
_SHIFTS = (0, 2, 4, 6)  # of two bits in a byte


def _fill(block_N: NDArray[np.void], blocks: multiples.Blocks) -> None:
    code_NGS = blocks.code_NGS - CODES[0]
    step_code_NG = blocks.step_code_NG - STEP_CODES[0]
    block_N["high"], block_N["low"] = _pack_codes(code_NGS.astype(np.uint8))
    block_N["step_codes"] = _pack_step_codes(step_code_NG.astype(np.uint8))


def _pack_codes(code_NGS: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the high bits of eight weights, 32 apart, a byte; and two low bits of four."""
    code_N8X = code_NGS.reshape(-1, 8, 32)
    high_N8X = code_N8X >> np.uint8(2)
    high_NP = np.packbits(high_N8X, axis=1, bitorder="little")[:, 0]

    low_N8X = code_N8X & np.uint8(3)
    low_N2P = join_pairs(low_N8X.reshape(-1, 2, 4, 32))
    return high_NP, low_N2P.reshape(-1, 64)


def _pack_step_codes(step_code_NG: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return four low bits of groups 8 apart, two a byte; then two high bits of groups 4 apart."""
    low_N8 = numpy_ggml.pair_nibbles(step_code_NG & np.uint8(15))
    high_NG = step_code_NG >> np.uint8(4)
    high_N4 = join_pairs(high_NG.reshape(-1, 4, 4))
    return np.concatenate([low_N8, high_N4], axis=1)


def _read_step_codes(block_OX: NDArray[np.void]) -> NDArray[np.float32]:
    low_OX8, high_OX4 = np.split(block_OX["step_codes"], [8], axis=2)
    low_OXG = np.concatenate([low_OX8 & 15, low_OX8 >> 4], axis=2)
    high_OXG = np.concatenate([high_OX4 >> shift & 3 for shift in _SHIFTS], axis=2)
    stored_OXG: NDArray[np.uint8] = low_OXG | high_OXG << 4
    return stored_OXG.astype(np.float32) + np.float32(STEP_CODES[0])


_BLOCKS = ExactBlocks(
    GGML_TYPE,
    _LAYOUT,
    (BLOCK // GROUP_SIZE, GROUP_SIZE),
    multiples.Finder(CODES, STEP_CODES),
    _fill,
    _read_step_codes,
)
quantize = _BLOCKS.quantize
steps, scales = _BLOCKS.steps, _BLOCKS.scales
