"""Find blocks that a format with two-level scales can store exactly, and their codes.

A weight is code · step code · scale: an integer, the product, times the scale of its quant block in
half precision. So the scale is a common divisor of the block's weights, and the step code of a
group divides all its products. The codes are derived from the weights alone. If several scales or
step codes give the same weights, the largest scale and the smallest step code are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Attempt = Callable[[NDArray[np.float32], NDArray[np.float64]], tuple[NDArray[Any], ...]]
"""Tries a scale for each block; returns fits_N, then arrays of codes by group."""
SMALLEST_HALF = 2.0**-24  # the smallest half-precision number: all others are its multiples


@dataclass(frozen=True)
class ExactBlocks:
    """Codes of the blocks that are stored exactly, with the indices of these blocks."""

    index_N: NDArray[np.intp]
    scale_N: NDArray[np.float16]
    step_code_NG: NDArray[np.int64]
    code_NGS: NDArray[np.int64]


class ExactBlockFinder:
    """Search for blocks whose weights are integers of at most ``max_product`` times a scale."""

    def __init__(self, max_product: int) -> None:
        self._max_product = max_product
        self._max_weight = max_product * float(np.finfo(np.float16).max)

    def find(self, weight_NGS: NDArray[np.float32]) -> ExactBlocks:
        """Return the exactly stored blocks; blocks of zeros have no scale and are left out."""
        raise NotImplementedError

    def _find_candidates(self, weight_NGS: NDArray[np.float32]) -> NDArray[np.intp]:
        """Return the indices of blocks whose largest weight is in reach of their common divisor."""
        N, G, S = weight_NGS.shape

        # The largest weight must be in reach of the largest scale.
        size_NX = np.abs(weight_NGS).reshape(N, G * S)  # X: weights of a block
        largest_index_N = size_NX.argmax(axis=1)

        largest_N = size_NX[np.arange(N), largest_index_N]
        possible_N = (largest_N > 0) & (largest_N <= self._max_weight)
        index_N = np.flatnonzero(possible_N)

        # The group of the largest weight alone excludes nearly all other blocks.
        group_N = largest_index_N[index_N] // S
        near_N1S = weight_NGS[index_N, group_N, None]
        index_N = index_N[self._has_divisor(near_N1S)]

        whole_NGS = weight_NGS[index_N]
        return index_N[self._has_divisor(whole_NGS)]

    def _try_scales(
        self, weight_NGS: NDArray[np.float32], attempt: Attempt, *codes_NG: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Return the scale of each candidate, 0 where none fits.

        Args:
            codes_NG: arrays that are filled with what ``attempt`` returns for the scale.
        """
        divisor_N = find_common_divisor(weight_NGS)
        largest_N = np.abs(weight_NGS).max(axis=(1, 2))
        shares_N = self._max_product * divisor_N / largest_N
        scale_N = np.zeros_like(divisor_N)

        # The scale is an integer fraction of the greatest divisor, nearly always the whole of it.
        for share in range(1, self._max_product + 1):
            for signed in (share, -share):
                open_N = np.flatnonzero((scale_N == 0) & (shares_N >= share))
                if not open_N.size:
                    break

                tried_N = divisor_N[open_N] / signed
                fits_N, *tried_NG = attempt(weight_NGS[open_N], tried_N)
                fits_N = fits_N & is_exact_in_half(tried_N)

                fitting_N = open_N[fits_N]
                scale_N[fitting_N] = tried_N[fits_N]
                for codes, tried in zip(codes_NG, tried_NG, strict=True):
                    codes[fitting_N] = tried[fits_N]

        return scale_N

    def _has_divisor(self, weight_NGS: NDArray[np.float32]) -> NDArray[np.bool_]:
        largest_N = np.abs(weight_NGS).max(axis=(1, 2))
        reach_N = self._max_product * find_common_divisor(weight_NGS)
        fits_N: NDArray[np.bool_] = largest_N <= reach_N
        return fits_N


class SymmetricFinder(ExactBlockFinder):
    """Finds blocks of symmetric groups, given the ranges of codes and step codes."""

    def __init__(self, codes: tuple[int, int], step_codes: tuple[int, int]) -> None:
        super().__init__(max(map(abs, codes)) * max(map(abs, step_codes)))

        lowest, highest = step_codes
        ordered = sorted(range(lowest, highest + 1), key=abs)
        self._step_codes = np.array(ordered)

        # For each product a bit per step code that divides it into a code; the last entry, of no
        # product, has no bits.
        self._bits_V = np.zeros(2 * self._max_product + 2, np.uint64)
        lowest, highest = codes

        for bit, step_code in enumerate(ordered):
            for code in range(lowest, highest + 1):
                product = step_code * code
                self._bits_V[product + self._max_product] |= np.uint64(1 << bit)

    def find(self, weight_NGS: NDArray[np.float32]) -> ExactBlocks:
        """Return the exactly stored blocks; blocks of zeros have no scale and are left out."""
        index_N = self._find_candidates(weight_NGS)
        weight_NGS = weight_NGS[index_N]
        bits_NG = np.zeros(weight_NGS.shape[:2], np.uint64)
        scale_N = self._try_scales(weight_NGS, self._reach, bits_NG)

        exact_N = np.flatnonzero(scale_N)
        scale_N = scale_N[exact_N]
        step_code_NG = self._step_codes[_find_lowest_bit(bits_NG[exact_N])]
        step_NG = step_code_NG * scale_N[:, None]
        divisor_NG = np.where(step_NG == 0, 1, step_NG)

        code_NGS = weight_NGS[exact_N] / divisor_NG[:, :, None]
        half_N = scale_N.astype(np.float16)
        return ExactBlocks(index_N[exact_N], half_N, step_code_NG, code_NGS.astype(np.int64))

    def _reach(
        self, weight_NGS: NDArray[np.float32], scale_N: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        """Return fits_N and bits_NG, a bit for each step code that fits all weights of a group.

        A block fits if every group has such a step code.
        """
        # A float32 weight has 24 bits, so in float64 only an exact quotient is an integer.
        product_NGS = weight_NGS / scale_N[:, None, None]

        whole_NGS = np.rint(product_NGS)
        inside_NGS = (whole_NGS == product_NGS) & (np.abs(whole_NGS) <= self._max_product)

        # A number that is no product points to the last entry, without bits.
        known_NGS = np.where(inside_NGS, whole_NGS, self._max_product + 1)
        index_NGS = known_NGS.astype(np.intp) + self._max_product

        # All weights of a group must share a step code.
        bits_NG: NDArray[np.uint64] = np.bitwise_and.reduce(self._bits_V[index_NGS], axis=2)
        fits_N: NDArray[np.bool_] = (bits_NG != 0).all(axis=1)
        return fits_N, bits_NG


def find_common_divisor(weight_NGS: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the greatest common divisor of each block of multiples of ``SMALLEST_HALF``."""
    units_NGS = np.rint(weight_NGS / SMALLEST_HALF).astype(np.int64)
    divisor_N = np.gcd.reduce(units_NGS, axis=(1, 2))
    return np.asarray(divisor_N * SMALLEST_HALF)


def is_exact_in_half(value_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return a mask of the numbers that half precision represents exactly."""
    with np.errstate(over="ignore"):
        half_N = value_N.astype(np.float16)
    return np.asarray(half_N == value_N)


def _find_lowest_bit(bits: NDArray[np.uint64]) -> NDArray[np.int32]:
    alone = bits & (~bits + np.uint64(1))
    _, exponent = np.frexp(alone.astype(np.float64))
    return np.asarray(exponent - 1)
