"""Pack blocks that a format can hold exactly without loss, and all others with ggml.

ggml's own scale search may change weights that lie on a format's grid, above all with an importance
matrix. Pruning chooses such weights, and they must reach the file unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml
from racdeploy.quant.exact_scales import ExactBlockFinder


class ExactBlockCodec:
    """Quantizer of a K-quant format that stores weights on its grid exactly.

    Args:
        layout: numpy dtype of a packed block, with a field ``scale``.
        group_shape: groups of a block, weights of a group.
        finder: finds the blocks that the format holds exactly.
        fill: packs the finder's codes into blocks of ``layout``.
        read_step_codes: returns the step code of every group of packed blocks.
    """

    def __init__(
        self,
        ggml_type: int,
        layout: np.dtype[np.void],
        group_shape: tuple[int, int],
        finder: ExactBlockFinder,
        fill: Callable[[NDArray[np.void], Any], None],
        read_step_codes: Callable[[NDArray[np.void]], NDArray[Any]],
    ) -> None:
        self._type, self._layout, self._group_shape = ggml_type, layout, group_shape
        self._finder, self._fill, self._read_step_codes = finder, fill, read_step_codes

    def quantize(
        self, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Return packed_OP; blocks on the format's grid dequantize to the same weights."""
        O, I = weight_OI.shape
        groups, size = self._group_shape
        block_OX = np.zeros((O, I // (groups * size)), self._layout)  # X: blocks of a row
        exact_OX = np.zeros(block_OX.shape, np.bool_)

        exact = self._finder.find(weight_OI.reshape(-1, groups, size))
        np.put(exact_OX, exact.index_N, True)
        block_N = np.empty(len(exact.scale_N), self._layout)
        block_N["scale"] = exact.scale_N
        self._fill(block_N, exact)
        block_OX[exact_OX] = block_N

        # ggml gets whole rows, exact blocks included: an importance has one number per input.
        rest_O = ~exact_OX.all(axis=1)

        if rest_O.any():
            rest_OP = ggml.quantize(self._type, weight_OI[rest_O], importance_I)
            rest_OX = rest_OP.view(self._layout)

            exact_OX = exact_OX[rest_O]
            kept_OX = block_OX[rest_O]
            block_OX[rest_O] = np.where(exact_OX, kept_OX, rest_OX)

        return block_OX.view(np.uint8)

    def scales(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the half-precision scale of every block."""
        scale_OX: NDArray[np.float16] = self._view(packed_OP)["scale"]
        return scale_OX.astype(np.float32)

    def steps(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return step_OG, the step of every group: its step code times the block's scale."""
        step_code_OXG = self._read_step_codes(self._view(packed_OP))
        step_OXG: NDArray[np.float32] = step_code_OXG * self.scales(packed_OP)[:, :, None]
        return step_OXG.reshape(len(packed_OP), -1)

    def _view(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.void]:
        return np.ascontiguousarray(packed_OP).view(self._layout)


def pack_two_bits(pair_N4X: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return bytes of four two-bit numbers each, the first one in the lowest bits."""
    shift_41 = np.array([0, 2, 4, 6], np.uint8)[:, None]
    joined_NX: NDArray[np.uint8] = np.bitwise_or.reduce(pair_N4X << shift_41, axis=-2)
    return joined_NX
