"""Q2_K: 256 unsigned 2-bit codes, a 4-bit scale and minimum for each 16, two half-precision scales.

The minimum shifts zero: ggml's own choice of minima loses zeros, that of pruning keeps them. Blocks
of weights on the grid are packed exactly.
Source: ``block_q2_K`` in ggml-common.h, ``dequantize_row_q2_K`` in ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml, read_ggml_type
from racdeploy.quant.asymmetric import AsymmetricBlocks, AsymmetricFinder
from racdeploy.quant.exact_blocks import ExactBlockCodec, pack_two_bits

FORMATS = ("gguf",)
GGML_TYPE, BITS, BLOCK_SIZE = read_ggml_type("q2_k")
CODE_RANGE = (0, 3)
GROUP_SIZE, STEP_CODE_RANGE = 16, (0, 15)
MINIMUM_CODE_RANGE, MINIMUM_SCALE_RATIO, ZERO_CODE = (0, 15), 2, 2
PRESERVES_ZERO = False

_, dequantize = ggml.make_codec(GGML_TYPE)

_LAYOUT = np.dtype(
    [("numbers", "u1", 16), ("codes", "u1", 64), ("scale", "<f2"), ("minimum_scale", "<f2")]
)


def _read_step_codes(block_OX: NDArray[np.void]) -> NDArray[np.uint8]:
    return np.asarray(block_OX["numbers"] & 15)


def _fill(block_N: NDArray[np.void], lines: AsymmetricBlocks) -> None:
    code_NGS = lines.code_NGS.astype(np.uint8)
    block_N["minimum_scale"] = lines.scale_N * np.float16(MINIMUM_SCALE_RATIO)
    block_N["numbers"] = lines.step_code_NG | lines.minimum_code_NG << 4
    block_N["codes"] = pack_two_bits(code_NGS.reshape(-1, 2, 4, 32)).reshape(-1, 64)


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
