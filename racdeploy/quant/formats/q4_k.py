"""Q4_K: 256 unsigned 4-bit codes, a 6-bit scale and minimum for each 32, two half-precision scales.

The minimum shifts zero: ggml's own choice of minima loses zeros, that of pruning keeps them. Blocks
of weights on the grid are packed exactly.
Source: ``block_q4_K`` in ggml-common.h, ``get_scale_min_k4`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml, numpy_ggml, read_ggml_type
from racdeploy.quant.asymmetric import AsymmetricBlocks, AsymmetricFinder
from racdeploy.quant.exact_blocks import ExactBlockCodec

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("q4_k")
CODE_RANGE = (0, 15)
GROUP_SIZE, STEP_CODE_RANGE = 32, (0, 63)
MINIMUM_CODE_RANGE, MINIMUM_SCALE_RATIO, ZERO_CODE = (0, 63), 8, 8
PRESERVES_ZERO = False

_, dequantize = ggml.make_codec(GGML_TYPE)

_LAYOUT = np.dtype(
    [("scale", "<f2"), ("minimum_scale", "<f2"), ("numbers", "u1", 12), ("codes", "u1", 128)]
)


def _read_step_codes(block_OX: NDArray[np.void]) -> NDArray[np.uint8]:
    first_OX4, _, rest_OX4 = np.split(block_OX["numbers"], 3, axis=2)
    later_OX4 = rest_OX4 & 15 | first_OX4 >> 6 << 4
    return np.concatenate([first_OX4 & 63, later_OX4], axis=2)


def _fill(block_N: NDArray[np.void], lines: AsymmetricBlocks) -> None:
    code_NGS = lines.code_NGS.astype(np.uint8)
    block_N["minimum_scale"] = lines.scale_N * np.float16(MINIMUM_SCALE_RATIO)
    block_N["numbers"] = _pack_numbers(
        lines.step_code_NG.astype(np.uint8), lines.minimum_code_NG.astype(np.uint8)
    )
    pair_N4P = numpy_ggml.pack_nibbles(code_NGS.reshape(-1, 4, 64))  # two groups share bytes
    block_N["codes"] = pair_N4P.reshape(-1, 128)


def _pack_numbers(step_NG: NDArray[np.uint8], minimum_NG: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return 12 bytes of 6-bit numbers, as ``get_scale_min_k4`` reads them.

    Four steps and four minima have a byte each. Its two high bits belong to the other four, whose
    low nibbles are in the last four bytes.
    """
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


_BLOCKS = ExactBlockCodec(
    GGML_TYPE,
    _LAYOUT,
    (BLOCK_SIZE // GROUP_SIZE, GROUP_SIZE),
    AsymmetricFinder(
        CODE_RANGE[1], STEP_CODE_RANGE[1], MINIMUM_CODE_RANGE[1], MINIMUM_SCALE_RATIO, ZERO_CODE
    ),
    _fill,
    _read_step_codes,
)
quantize = _BLOCKS.quantize
steps, scales = _BLOCKS.steps, _BLOCKS.scales
