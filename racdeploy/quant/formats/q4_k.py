"""Q4_K: 256 unsigned 4-bit codes, a 6-bit scale and minimum for each 32, two half-precision scales.

The minimum moves zero: ggml's own choices lose zeros, those made while pruning keep them. A block
of weights that the format can hold exactly is packed exactly.
Source: ``block_q4_K`` in ggml-common.h, ``get_scale_min_k4`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml, numpy_ggml, read_ggml_type
from racdeploy.quant.exact_blocks import ExactBlocks
from racdeploy.quant.minima import LineFinder, Lines

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK = read_ggml_type("q4_k")
CODES = (0, 15)
GROUP_SIZE, STEP_CODES = 32, (0, 63)
MINIMA, MINIMUM_UNITS, ZERO_CODE = (0, 63), 8, 8
PRESERVES_ZERO = False

_, dequantize = ggml.make_codec(GGML_TYPE)

_LAYOUT = np.dtype(
    [("scale", "<f2"), ("minimum_scale", "<f2"), ("numbers", "u1", 12), ("codes", "u1", 128)]
)


def _read_step_codes(block_OX: NDArray[np.void]) -> NDArray[np.uint8]:
    first_OX4, _, rest_OX4 = np.split(block_OX["numbers"], 3, axis=2)
    later_OX4 = rest_OX4 & 15 | first_OX4 >> 6 << 4
    return np.concatenate([first_OX4 & 63, later_OX4], axis=2)


def _fill(block_N: NDArray[np.void], lines: Lines) -> None:
    code_NGS = lines.code_NGS.astype(np.uint8)
    block_N["minimum_scale"] = lines.scale_N * np.float16(MINIMUM_UNITS)
    block_N["numbers"] = _pack_numbers(
        lines.step_code_NG.astype(np.uint8), lines.minimum_code_NG.astype(np.uint8)
    )
    pair_N4P = numpy_ggml.pair_nibbles(code_NGS.reshape(-1, 4, 64))  # of two groups a byte
    block_N["codes"] = pair_N4P.reshape(-1, 128)


def _pack_numbers(step_NG: NDArray[np.uint8], minimum_NG: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the first four steps, then minima, with two high bits of the last four; their rest."""
    first_s_N4, last_s_N4 = np.split(step_NG, 2, axis=1)
    first_m_N4, last_m_N4 = np.split(minimum_NG, 2, axis=1)
    return np.concatenate(
        [
            first_s_N4 | last_s_N4 >> 4 << 6,
            first_m_N4 | last_m_N4 >> 4 << 6,
            last_s_N4 & 15 | last_m_N4 << 4,
        ],
        axis=1,
    )


_BLOCKS = ExactBlocks(
    GGML_TYPE,
    _LAYOUT,
    (BLOCK // GROUP_SIZE, GROUP_SIZE),
    LineFinder(CODES[1], STEP_CODES[1], MINIMA[1], MINIMUM_UNITS, ZERO_CODE),
    _fill,
    _read_step_codes,
)
quantize = _BLOCKS.quantize
steps, scales = _BLOCKS.steps, _BLOCKS.scales
