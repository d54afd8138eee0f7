"""Quantizers of gguf-py, bit-exact with ggml's C code, and scale search for simple formats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants

from racdeploy.quant import scale_search
from racdeploy.quant.grid import Bytes, Floats, Grid, GridCodes
from racdeploy.tensors.ggml_types import GGML_TYPES


def quantize(ggml_type: int, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
    """Return packed_OP of float32 weights, rows of whole blocks; the importance is ignored."""
    return quants.quantize(weight_OI, GGMLQuantizationType(ggml_type))


def dequantize(ggml_type: int, packed_OP: Bytes, I: int) -> Floats:
    """Return float32 weight_OI of packed rows."""
    weight_OI: Floats = quants.dequantize(packed_OP, GGMLQuantizationType(ggml_type))
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI


@dataclass(frozen=True)
class ScaleBlockCodec:
    """Quantizer of a format whose blocks are a half-precision scale and packed codes.

    ``scale_range`` and ``trials`` are those of
    :func:`racdeploy.quant.scale_search.search_scales`.
    """

    name: str
    grid: Grid
    scale_range: tuple[float, float]
    trials: int

    def quantize(self, weight_OI: Floats, importance_I: Floats | None = None) -> Bytes:
        """Return packed rows: ggml's, bit for bit, or with scales chosen for an importance."""
        ggml_type, block, _ = GGML_TYPES[self.name]
        if importance_I is None:
            return quantize(ggml_type, weight_OI)

        lowest, highest = int(self.grid.values[0]), int(self.grid.values[-1])
        step_OG, code_OGS = scale_search.search_scales(
            weight_OI, importance_I, block, (lowest, highest), self.scale_range, self.trials
        )
        code_OI = (code_OGS.reshape(weight_OI.shape).astype(np.int16) - lowest).astype(np.uint8)
        return self.grid.pack(GridCodes(code_OI, step_OG.astype(np.float32)))

    def dequantize(self, packed_OP: Bytes, I: int) -> Floats:
        """Return float32 weight_OI of packed rows."""
        return dequantize(GGML_TYPES[self.name].type_id, packed_OP, I)
