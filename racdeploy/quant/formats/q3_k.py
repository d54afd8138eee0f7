"""Q3_K: 256 signed 3-bit codes, a 6-bit scale for each 16 of them, one half-precision scale.

A block of weights that the format can hold exactly, as pruning chooses them, is packed exactly. All
others are ggml's, which may lose such weights where it knows an importance.
Source: ``block_q3_K`` in ggml-common.h, ``dequantize_row_q3_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml, multiples, numpy_ggml, read_ggml_type

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
_FINDER = multiples.Finder(CODES, STEP_CODES)


def quantize(
    weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed rows: of blocks that the format can hold their very weights, else ggml's."""
    O, I = weight_OI.shape
    block_OX = np.zeros((O, I // BLOCK), _LAYOUT)  # X: blocks of a row
    exact_OX = np.zeros(block_OX.shape, np.bool_)

    # Blocks that the format can hold keep their weights.
    weight_NGS = weight_OI.reshape(-1, BLOCK // GROUP_SIZE, GROUP_SIZE)
    found = _FINDER.find(weight_NGS)
    np.put(exact_OX, found.place_N, True)
    block_OX[exact_OX] = _pack(found)

    # ggml reads whole rows, for the importance belongs to the inputs.
    rest_O = ~exact_OX.all(axis=1)

    if rest_O.any():
        rest_OP = ggml.quantize(GGML_TYPE, weight_OI[rest_O], importance_I)
        rest_OX = rest_OP.view(_LAYOUT)

        exact_OX, known_OX = exact_OX[rest_O], block_OX[rest_O]
        block_OX[rest_O] = np.where(exact_OX, known_OX, rest_OX)

    return block_OX.view(np.uint8)


def steps(packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return step_OG, the scale of every group of 16."""
    step_code_OXG = _unpack_step_codes(_view_blocks(packed_OP)["step_codes"])
    scale_OX1 = scales(packed_OP)[:, :, None]
    step_OXG = step_code_OXG * scale_OX1
    return step_OXG.reshape(len(packed_OP), -1)


def scales(packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the half-precision scale of every block."""
    scale_OX: NDArray[np.float16] = _view_blocks(packed_OP)["scale"]
    return scale_OX.astype(np.float32)


def _view_blocks(packed_OP: NDArray[np.uint8]) -> NDArray[np.void]:
    return np.ascontiguousarray(packed_OP).view(_LAYOUT)


def _pack(blocks: multiples.Blocks) -> NDArray[np.void]:
    code_NGS = blocks.code_NGS - CODES[0]
    step_code_NG = blocks.step_code_NG - STEP_CODES[0]

    block_N = np.empty(len(code_NGS), _LAYOUT)
    block_N["high"], block_N["low"] = _pack_codes(code_NGS.astype(np.uint8))
    block_N["step_codes"] = _pack_step_codes(step_code_NG.astype(np.uint8))
    block_N["scale"] = blocks.scale_N
    return block_N


def _pack_codes(code_NGS: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the high bits of eight weights, 32 apart, a byte; and two low bits of four."""
    code_N8X = code_NGS.reshape(-1, 8, 32)
    high_N8X = code_N8X >> np.uint8(2)
    high_NP = np.packbits(high_N8X, axis=1, bitorder="little")[:, 0]

    low_N8X = code_N8X & np.uint8(3)
    low_N2P = _join_pairs(low_N8X.reshape(-1, 2, 4, 32))
    return high_NP, low_N2P.reshape(-1, 64)


def _pack_step_codes(step_code_NG: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return four low bits of groups 8 apart, two a byte; then two high bits of groups 4 apart."""
    low_N8 = numpy_ggml.pair_nibbles(step_code_NG & np.uint8(15))
    high_NG = step_code_NG >> np.uint8(4)
    high_N4 = _join_pairs(high_NG.reshape(-1, 4, 4))
    return np.concatenate([low_N8, high_N4], axis=1)


def _unpack_step_codes(packed_OXP: NDArray[np.uint8]) -> NDArray[np.float32]:
    low_OX8, high_OX4 = np.split(packed_OXP, [8], axis=2)
    low_OXG = np.concatenate([low_OX8 & 15, low_OX8 >> 4], axis=2)
    high_OXG = np.concatenate([high_OX4 >> shift & 3 for shift in _SHIFTS], axis=2)
    stored_OXG: NDArray[np.uint8] = low_OXG | high_OXG << 4
    return stored_OXG.astype(np.float32) + np.float32(STEP_CODES[0])


def _join_pairs(pair_N4X: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return bytes of four times two bits each, the first one lowest."""
    shift_41 = np.array(_SHIFTS, np.uint8)[:, None]
    joined_NX: NDArray[np.uint8] = np.bitwise_or.reduce(pair_N4X << shift_41, axis=-2)
    return joined_NX
