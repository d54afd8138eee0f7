"""Find the blocks that a format of two scales holds exactly, and what it stores of them.

A weight is code · step code · scale: a whole number, the product, times the scale of its quant
block in half precision. So the scale is a common divisor of the block's weights, and the step code
of a group divides all its products. No code has to be known before. Where several scales or step
codes would do, the weights are the same: the largest scale and the smallest step code are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Attempt = Callable[[NDArray[np.float32], NDArray[np.float64]], tuple[NDArray[Any], ...]]
"""Takes blocks and a scale for each; returns which have codes for it, and numbers by group."""
UNIT = 2.0**-24  # all half-precision numbers are whole multiples of the smallest


@dataclass(frozen=True)
class Blocks:
    """Blocks that are held exactly; place_N is where they are among those that were given."""

    place_N: NDArray[np.intp]
    scale_N: NDArray[np.float16]
    step_code_NG: NDArray[np.int64]
    code_NGS: NDArray[np.int64]


class Candidates:
    """Finds the blocks whose weights may be whole numbers, of ``most`` at most, of one scale."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most * float(np.finfo(np.float16).max)

    def find(self, weight_NGS: NDArray[np.float32]) -> Blocks:
        """Return what is held exactly; blocks of zeros have no scale and are left out."""
        raise NotImplementedError

    def _find_candidates(self, weight_NGS: NDArray[np.float32]) -> NDArray[np.intp]:
        """Return the blocks whose largest weight is few enough times a common divisor."""
        N, G, S = weight_NGS.shape

        # The largest weight must be in reach of the largest scale.
        size_NX = np.abs(weight_NGS).reshape(N, G * S)  # X: weights of a block
        most_N = size_NX.argmax(axis=1)

        largest_N = size_NX[np.arange(N), most_N]
        possible_N = (largest_N > 0) & (largest_N <= self._limit)
        place_N = np.flatnonzero(possible_N)

        # The group of the largest weight alone excludes nearly all other blocks.
        group_N = most_N[place_N] // S
        near_N1S = weight_NGS[place_N, group_N, None]
        place_N = place_N[self._has_divisor(near_N1S)]

        whole_NGS = weight_NGS[place_N]
        return place_N[self._has_divisor(whole_NGS)]

    def _try_scales(
        self, weight_NGS: NDArray[np.float32], attempt: Attempt, *found_NG: NDArray[Any]
    ) -> NDArray[np.float64]:
        """Return the scale of each candidate, 0 where there is none; fill in what it goes with."""
        divisor_N = find_divisor(weight_NGS)
        largest_N = np.abs(weight_NGS).max(axis=(1, 2))
        shares_N = self._most * divisor_N / largest_N
        scale_N = np.zeros_like(divisor_N)

        # The scale is a share of the greatest divisor, nearly always all of it.
        for share in range(1, self._most + 1):
            for signed in (share, -share):
                open_N = np.flatnonzero((scale_N == 0) & (shares_N >= share))
                if not open_N.size:
                    break

                tried_N = divisor_N[open_N] / signed
                fits_N, *tried_NG = attempt(weight_NGS[open_N], tried_N)
                fits_N = fits_N & is_half(tried_N)

                held_N = open_N[fits_N]
                scale_N[held_N] = tried_N[fits_N]
                for found, tried in zip(found_NG, tried_NG, strict=True):
                    found[held_N] = tried[fits_N]

        return scale_N

    def _has_divisor(self, weight_NGS: NDArray[np.float32]) -> NDArray[np.bool_]:
        largest_N = np.abs(weight_NGS).max(axis=(1, 2))
        most_N = self._most * find_divisor(weight_NGS)
        fits_N: NDArray[np.bool_] = largest_N <= most_N
        return fits_N


class Finder(Candidates):
    """Codes and step codes, each from the lowest to the highest, and what their products are."""

    def __init__(self, codes: tuple[int, int], step_codes: tuple[int, int]) -> None:
        super().__init__(max(map(abs, codes)) * max(map(abs, step_codes)))

        lowest, highest = step_codes
        ordered = sorted(range(lowest, highest + 1), key=abs)
        self._step_codes = np.array(ordered)

        # For each product the step codes that reach it, one a bit; after the last one, for none.
        self._bits_V = np.zeros(2 * self._most + 2, np.uint64)
        lowest, highest = codes

        for bit, step_code in enumerate(ordered):
            for code in range(lowest, highest + 1):
                product = step_code * code
                self._bits_V[product + self._most] |= np.uint64(1 << bit)

    def find(self, weight_NGS: NDArray[np.float32]) -> Blocks:
        """Return what is held exactly; blocks of zeros have no scale and are left out."""
        place_N = self._find_candidates(weight_NGS)
        weight_NGS = weight_NGS[place_N]
        bits_NG = np.zeros(weight_NGS.shape[:2], np.uint64)
        scale_N = self._try_scales(weight_NGS, self._reach, bits_NG)

        held_N = np.flatnonzero(scale_N)
        scale_N = scale_N[held_N]
        step_code_NG = self._step_codes[_find_lowest_bit(bits_NG[held_N])]
        step_NG = step_code_NG * scale_N[:, None]
        divisor_NG = np.where(step_NG == 0, 1, step_NG)

        code_NGS = weight_NGS[held_N] / divisor_NG[:, :, None]
        half_N = scale_N.astype(np.float16)
        return Blocks(place_N[held_N], half_N, step_code_NG, code_NGS.astype(np.int64))

    def _reach(
        self, weight_NGS: NDArray[np.float32], scale_N: NDArray[np.float64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        """Return by bits the step codes of which all weights of a group are multiples.

        Blocks fit in which every group has such a code.
        """
        # In float64 only a whole product looks whole: the weight itself has 24 digits at most.
        product_NGS = weight_NGS / scale_N[:, None, None]

        whole_NGS = np.rint(product_NGS)
        inside_NGS = (whole_NGS == product_NGS) & (np.abs(whole_NGS) <= self._most)

        # What is no product has no bits.
        known_NGS = np.where(inside_NGS, whole_NGS, self._most + 1)
        place_NGS = known_NGS.astype(np.intp) + self._most

        # All weights of the group must be reached by the same step code.
        bits_NG: NDArray[np.uint64] = np.bitwise_and.reduce(self._bits_V[place_NGS], axis=2)
        fits_N: NDArray[np.bool_] = (bits_NG != 0).all(axis=1)
        return fits_N, bits_NG


def find_divisor(weight_NGS: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return each block's greatest common divisor, if its weights are whole units."""
    units_NGS = np.rint(weight_NGS / UNIT).astype(np.int64)
    divisor_N = np.gcd.reduce(units_NGS, axis=(1, 2))
    return np.asarray(divisor_N * UNIT)


def is_half(value_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which numbers half precision has."""
    with np.errstate(over="ignore"):
        half_N = value_N.astype(np.float16)
    return np.asarray(half_N == value_N)


def _find_lowest_bit(bits: NDArray[np.uint64]) -> NDArray[np.int32]:
    alone = bits & (~bits + np.uint64(1))
    _, exponent = np.frexp(alone.astype(np.float64))
    return np.asarray(exponent - 1)
