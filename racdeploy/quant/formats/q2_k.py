"""Q2_K: 256 unsigned 2-bit codes, a 4-bit scale and minimum for each 16, two half-precision scales.

The minimum moves zero: ggml's own choices lose zeros, those made while pruning keep them. A block
of weights that the format can hold exactly is packed exactly.
Source: ``block_q2_K`` in ggml-common.h, ``dequantize_row_q2_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml, read_ggml_type
from racdeploy.quant.exact_blocks import ExactBlocks, join_pairs
from racdeploy.quant.minima import LineFinder, Lines

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK = read_ggml_type("q2_k")
CODES = (0, 3)
GROUP_SIZE, STEP_CODES = 16, (0, 15)
MINIMA, MINIMUM_UNITS, ZERO_CODE = (0, 15), 2, 2
PRESERVES_ZERO = False

_, dequantize = ggml.make_codec(GGML_TYPE)

_LAYOUT = np.dtype(
    [("numbers", "u1", 16), ("codes", "u1", 64), ("scale", "<f2"), ("minimum_scale", "<f2")]
)


def _read_step_codes(block_OX: NDArray[np.void]) -> NDArray[np.uint8]:
    return np.asarray(block_OX["numbers"] & 15)


def _fill(block_N: NDArray[np.void], lines: Lines) -> None:
    code_NGS = lines.code_NGS.astype(np.uint8)
    block_N["minimum_scale"] = lines.scale_N * np.float16(MINIMUM_UNITS)
    block_N["numbers"] = lines.step_code_NG | lines.minimum_code_NG << 4
    block_N["codes"] = join_pairs(code_NGS.reshape(-1, 2, 4, 32)).reshape(-1, 64)


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
