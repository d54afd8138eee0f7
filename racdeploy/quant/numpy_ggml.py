"""Quantizers of gguf-py, bit-exact with ggml's C code, and scale search for simple formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from racdeploy.quant import scale_search
from racdeploy.tensors.ggml_types import GGML_TYPES


def quantize(
    ggml_type: int, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed_OP of float32 weights, rows of whole blocks; the importance is ignored."""
    return quants.quantize(weight_OI, GGMLQuantizationType(ggml_type))


def dequantize(ggml_type: int, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weight_OI of packed rows."""
    weight_OI: NDArray[np.float32] = quants.dequantize(packed_OP, GGMLQuantizationType(ggml_type))
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI


def pack_nibbles(code_GS: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack four-bit codes two per byte, as ggml does: a block's first half is low."""
    low, high = np.split(code_GS, 2, axis=-1)
    return low | high << np.uint8(4)


@dataclass(frozen=True)
class ScaleBlockCodec:
    """Quantizer of a format whose blocks are a half-precision scale and packed codes.

    ``pack`` packs code_OGS; ``codes``, ``scale_range`` and ``trials`` are those of
    :func:`racdeploy.quant.scale_search.search_scales`.
    """

    name: str
    codes: tuple[int, int]
    pack: Callable[[NDArray[np.int8]], NDArray[np.uint8]]
    scale_range: tuple[float, float]
    trials: int

    def quantize(
        self, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Return packed rows: ggml's, bit for bit, or with scales chosen for an importance."""
        ggml_type, block, _ = GGML_TYPES[self.name]
        if importance_I is None:
            return quantize(ggml_type, weight_OI)

        step_OG, code_OGS = scale_search.search_scales(
            weight_OI, importance_I, block, self.codes, self.scale_range, self.trials
        )

        scale_OG2 = step_OG.astype("<f2")[:, :, None].view(np.uint8)
        packed_OGP = np.concatenate([scale_OG2, self.pack(code_OGS)], axis=-1)
        return packed_OGP.reshape(len(weight_OI), -1)

    def dequantize(self, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
        """Return float32 weight_OI of packed rows."""
        return dequantize(GGML_TYPES[self.name].type_id, packed_OP, I)

    def steps(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return step_OG, the scale of every block."""
        packed_OGP = packed_OP.reshape(len(packed_OP), -1, GGML_TYPES[self.name].block_bytes)
        scale_OG2 = np.ascontiguousarray(packed_OGP[:, :, :2])
        return scale_OG2.view(np.float16)[:, :, 0].astype(np.float32)
