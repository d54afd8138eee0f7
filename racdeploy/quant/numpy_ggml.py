"""gguf-py's numpy version of ggml's number formats: bit for bit what the C code writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from racdeploy.quant import search
from racdeploy.tensors.ggml_types import GGML_TYPES


def quantize(
    ggml_type: int, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Return packed_OP of float32 weights, rows of whole blocks, whatever the importance."""
    return quants.quantize(weight_OI, GGMLQuantizationType(ggml_type))


def dequantize(ggml_type: int, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
    """Return float32 weight_OI of packed rows."""
    weight_OI: NDArray[np.float32] = quants.dequantize(packed_OP, GGMLQuantizationType(ggml_type))
    assert weight_OI.shape[1] == I, "packed rows do not match the row length"
    return weight_OI


def pair_nibbles(code_GS: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return four-bit codes two a byte, as ggml pairs them: a block's first half is low."""
    low, high = np.split(code_GS, 2, axis=-1)
    return low | high << np.uint8(4)


@dataclass(frozen=True)
class ScaledCodes:
    """A format whose blocks are a scale in half precision and then what ``pack`` makes of code_OGS.

    ``codes``, ``spans`` and ``trials`` are those of :func:`racdeploy.quant.search.choose_codes`.
    """

    name: str
    codes: tuple[int, int]
    pack: Callable[[NDArray[np.int8]], NDArray[np.uint8]]
    spans: tuple[float, float]
    trials: int

    def quantize(
        self, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Return packed rows: ggml's, bit for bit, or with scales that suit an importance."""
        ggml_type, block, _ = GGML_TYPES[self.name]
        if importance_I is None:
            return quantize(ggml_type, weight_OI)

        step_OG, code_OGS = search.choose_codes(
            weight_OI, importance_I, block, self.codes, self.spans, self.trials
        )

        scale_OG2 = step_OG.astype("<f2")[:, :, None].view(np.uint8)
        packed_OGP = np.concatenate([scale_OG2, self.pack(code_OGS)], axis=-1)
        return packed_OGP.reshape(len(weight_OI), -1)

    def dequantize(self, packed_OP: NDArray[np.uint8], I: int) -> NDArray[np.float32]:
        """Return float32 weight_OI of packed rows."""
        return dequantize(GGML_TYPES[self.name].number, packed_OP, I)

    def steps(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return step_OG, the scales that the blocks begin with."""
        packed_OGP = packed_OP.reshape(len(packed_OP), -1, GGML_TYPES[self.name].block_bytes)
        scale_OG2 = np.ascontiguousarray(packed_OGP[:, :, :2])
        return scale_OG2.view(np.float16)[:, :, 0].astype(np.float32)
