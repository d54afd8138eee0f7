"""Grids of number formats: which weights a format can store, and the packing of their codes.

A weight is ``values[code] · step code · scale − minimum code · minimum scale``. Weights of a group
share step code and minimum code, groups of a quant block share both scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class GridCodes:
    """Codes of weights, with the numbers that make their steps and minima.

    Args:
        code_OI: index into the grid's values.
        scale_OX: of each quant block, exact in the format.
        step_code_OG: of each group; None where a group is a whole block.
        minimum_code_OG, minimum_scale_OX: None without minima.
    """

    code_OI: NDArray[Any]  # uint8
    scale_OX: NDArray[Any]  # float32
    step_code_OG: NDArray[Any] | None = None  # int16
    minimum_code_OG: NDArray[Any] | None = None  # int16
    minimum_scale_OX: NDArray[Any] | None = None  # float32


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Grid of a number format.

    Args:
        values: value of each code in steps, ascending where the codes are ordered by value.
        block_size, group_size: weights of a quant block, and of a group.
        pack: packs codes into the format's bytes, packed_OP.
        step_codes: smallest and largest step code; None where a group is a whole block, whose
            step is its scale.
        minimum_codes: smallest and largest minimum code; None without minima. Without step codes
            it is a zero point: the minimum is that many steps. A free minimum in half precision
            cannot be said.
        scale: numbers that a scale can be.
    """

    values: tuple[float, ...]
    block_size: int
    group_size: int
    pack: Callable[[GridCodes], Bytes]
    step_codes: tuple[int, int] | None = None
    minimum_codes: tuple[int, int] | None = None
    scale: Literal["half", "power_of_two"] = "half"

    @property
    def has_zero(self) -> bool:
        """True if a weight can be exactly zero in every group."""
        return 0 in self.values or self.minimum_codes is not None

    def decode(self, codes: GridCodes) -> Floats:
        """Return weight_OI in float32, in the order of operations of ggml's dequantizers."""
        groups = self.block_size // self.group_size
        step_OG = np.repeat(codes.scale_OX, groups, axis=1)
        if codes.step_code_OG is not None:
            step_OG = step_OG * codes.step_code_OG

        value_OI = np.array(self.values, np.float32)[codes.code_OI]
        weight_OGS = value_OI.reshape(*step_OG.shape, self.group_size)
        weight_OGS *= step_OG[..., None]
        if codes.minimum_scale_OX is not None and codes.minimum_code_OG is not None:
            minimum_OG = np.repeat(codes.minimum_scale_OX, groups, axis=1)
            minimum_OG = minimum_OG * codes.minimum_code_OG
            weight_OGS -= minimum_OG[..., None]
        weight_OI: Floats = weight_OGS.reshape(value_OI.shape)
        return weight_OI


def whole_codes(lowest: int, highest: int) -> tuple[float, ...]:
    """Return the values of a uniform grid."""
    return tuple(map(float, range(lowest, highest + 1)))


def join_fields(codes: GridCodes, fields_NP: Sequence[NDArray[Any]]) -> Bytes:
    """Return packed_OP of blocks whose fields lie one after the other, in the given order."""
    parts = []
    for field_NX in fields_NP:
        bytes_NX = np.ascontiguousarray(field_NX).view(np.uint8)
        parts.append(bytes_NX.reshape(len(field_NX), -1))
    return np.concatenate(parts, axis=1).reshape(len(codes.code_OI), -1)


def pack_halves(code_NS: Bytes) -> Bytes:
    """Return bytes of two four-bit numbers: the first half of a run is low, the second high."""
    low_NX, high_NX = np.split(code_NS, 2, axis=-1)
    return low_NX | high_NX << np.uint8(4)


def pack_quarters(code_N4X: Bytes) -> Bytes:
    """Return bytes of four two-bit numbers, the first of axis −2 in the lowest bits."""
    shift_41 = np.array([0, 2, 4, 6], np.uint8)[:, None]
    joined_NX: Bytes = np.bitwise_or.reduce(code_N4X << shift_41, axis=-2)
    return joined_NX


def as_half(scale_OX: Floats) -> NDArray[np.float16]:
    """Return scales as one half-precision number per block."""
    return scale_OX.reshape(-1, 1).astype("<f2")
