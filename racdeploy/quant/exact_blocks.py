"""Pack the blocks that a format holds exactly as they are; all others are ggml's.

ggml itself may lose weights that lie on a format's grid, most of all where it knows an importance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant import ggml
from racdeploy.quant.multiples import Candidates


class ExactBlocks:
    """A format of ggml; ``fill`` puts into blocks of its ``layout`` what ``finder`` finds."""

    def __init__(
        self,
        ggml_type: int,
        layout: np.dtype[np.void],
        group_shape: tuple[int, int],  # groups of a block, weights of a group
        finder: Candidates,
        fill: Callable[[NDArray[np.void], Any], None],  # gets what the finder returns, too
        read_step_codes: Callable[[NDArray[np.void]], NDArray[Any]],
    ) -> None:
        self._type, self._layout, self._group_shape = ggml_type, layout, group_shape
        self._finder, self._fill, self._read_step_codes = finder, fill, read_step_codes

    def quantize(
        self, weight_OI: NDArray[np.float32], importance_I: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """Return packed rows: of blocks that the format can hold their very weights."""
        O, I = weight_OI.shape
        groups, size = self._group_shape
        block_OX = np.zeros((O, I // (groups * size)), self._layout)  # X: blocks of a row
        exact_OX = np.zeros(block_OX.shape, np.bool_)

        # Blocks that the format can hold keep their weights.
        found = self._finder.find(weight_OI.reshape(-1, groups, size))
        np.put(exact_OX, found.place_N, True)
        block_N = np.empty(len(found.scale_N), self._layout)
        block_N["scale"] = found.scale_N
        self._fill(block_N, found)
        block_OX[exact_OX] = block_N

        # ggml reads whole rows, for the importance belongs to the inputs.
        rest_O = ~exact_OX.all(axis=1)

        if rest_O.any():
            rest_OP = ggml.quantize(self._type, weight_OI[rest_O], importance_I)
            rest_OX = rest_OP.view(self._layout)

            exact_OX = exact_OX[rest_O]
            known_OX = block_OX[rest_O]
            block_OX[rest_O] = np.where(exact_OX, known_OX, rest_OX)

        return block_OX.view(np.uint8)

    def scales(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the half-precision scale of every block."""
        scale_OX: NDArray[np.float16] = self._view(packed_OP)["scale"]
        return scale_OX.astype(np.float32)

    def steps(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return step_OG, the scale of every group."""
        step_code_OXG = self._read_step_codes(self._view(packed_OP))
        step_OXG: NDArray[np.float32] = step_code_OXG * self.scales(packed_OP)[:, :, None]
        return step_OXG.reshape(len(packed_OP), -1)

    def _view(self, packed_OP: NDArray[np.uint8]) -> NDArray[np.void]:
        return np.ascontiguousarray(packed_OP).view(self._layout)


def join_pairs(pair_N4X: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return bytes of four times two bits each, the first one lowest."""
    shift_41 = np.array([0, 2, 4, 6], np.uint8)[:, None]
    joined_NX: NDArray[np.uint8] = np.bitwise_or.reduce(pair_N4X << shift_41, axis=-2)
    return joined_NX
