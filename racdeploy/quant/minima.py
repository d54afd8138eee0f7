"""Find the blocks that a format with minima holds exactly, and what it stores of them.

A weight is (step code · code − units · minimum code) · scale: the scale for minima is ``units``
times that for steps, as pruning chooses them. So the scale is a common divisor of the block's
weights, as in :mod:`racdeploy.quant.multiples`. The step code of a group divides the differences of
its products, and the minimum code follows from the lowest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant.multiples import UNIT, Blocks, Candidates, is_half


@dataclass(frozen=True)
class Lines(Blocks):
    """Blocks of a format with minima, which are whole numbers of so many scales."""

    minimum_code_NG: NDArray[np.int64]


class LineFinder(Candidates):
    """Highest codes of each kind; a minimum code counts ``units`` scales.

    Where a group has several choices, that of a minimum of ``zero_code`` steps is taken, which has
    a code for zero, then the largest step code.
    """

    def __init__(
        self,
        codes: int,
        step_codes: int,
        minimum_codes: int,
        units: int,
        zero_code: int,
    ) -> None:
        super().__init__(max(codes * step_codes, minimum_codes * units))
        self._codes, self._step_codes = codes, step_codes
        self._minimum_codes, self._units, self._zero = minimum_codes, units, zero_code

    def find(self, weight_NGS: NDArray[np.float32]) -> Lines:
        """Return what is held exactly; blocks of zeros have no scale and are left out."""
        place_N = self._find_candidates(weight_NGS)
        place_N = place_N[self._reaches(weight_NGS[place_N])]
        weight_NGS = weight_NGS[place_N]

        shape = weight_NGS.shape[:2]
        step_code_NG = np.zeros(shape, np.int64)
        minimum_code_NG = np.zeros(shape, np.int64)
        scale_N = self._try_scales(weight_NGS, self._fit, step_code_NG, minimum_code_NG)

        held_N = np.flatnonzero(scale_N)
        scale_N, step_code_NG = scale_N[held_N], step_code_NG[held_N]
        minimum_code_NG = minimum_code_NG[held_N]

        over_NGS = np.rint(weight_NGS[held_N] / scale_N[:, None, None]).astype(np.int64)
        over_NGS += (minimum_code_NG * self._units)[:, :, None]
        code_NGS = over_NGS // np.where(step_code_NG == 0, 1, step_code_NG)[:, :, None]
        half_N = scale_N.astype(np.float16)
        return Lines(place_N[held_N], half_N, step_code_NG, code_NGS, minimum_code_NG)

    def _fit(
        self, weight_NGS: NDArray[np.float32], scale_N: NDArray[np.float64]
    ) -> tuple[NDArray[Any], ...]:
        """Return which blocks have codes for a scale, and those of steps and minima."""
        product_NGS = weight_NGS / scale_N[:, None, None]
        whole_NGS = np.rint(product_NGS)
        found = self._solve(whole_NGS.astype(np.int64))

        fits_N = found.fits_NG.all(axis=1) & is_half(scale_N * self._units)
        fits_N &= (whole_NGS == product_NGS).all(axis=(1, 2))
        return fits_N, found.step_code_NG, found.minimum_code_NG

    def _reaches(self, weight_NGS: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return of which blocks every group has few enough steps from end to end."""
        units_NGS = np.rint(weight_NGS / UNIT).astype(np.int64)
        lowest_NG = units_NGS.min(axis=2)
        divisor_NG = np.gcd.reduce(units_NGS - lowest_NG[:, :, None], axis=2)
        reach_NG = units_NGS.max(axis=2) - lowest_NG
        fits_N: NDArray[np.bool_] = (reach_NG <= self._codes * divisor_NG).all(axis=1)
        return fits_N

    def _solve(self, product_NGS: NDArray[np.int64]) -> _Solved:
        """Return a step code and a minimum code for every group that has some."""
        found = _Solved(product_NGS)
        lowest_NG = found.lowest_NG
        reach_NG = found.highest_NG - lowest_NG
        divisor_NG = np.gcd.reduce(product_NGS - lowest_NG[:, :, None], axis=2)

        # Codes on both sides of zero: all products are multiples of the step.
        around_NG = np.gcd(divisor_NG, lowest_NG)
        for times in range(1, self._codes + 1):
            step_NG = around_NG // times
            whole_NG = step_NG * times == around_NG
            minimum_NG = step_NG * self._zero
            self._take(found, step_NG, minimum_NG, whole_NG)

        if found.fits_NG.all():
            return found

        for times in range(1, self._codes + 1):
            step_NG = divisor_NG // times
            whole_NG = (step_NG * times == divisor_NG) & (divisor_NG > 0)
            for code in range(self._codes + 1):
                inside_NG = whole_NG & (reach_NG <= step_NG * (self._codes - code))
                minimum_NG = step_NG * code - lowest_NG
                self._take(found, step_NG, minimum_NG, inside_NG)

        self._take_alike(found, divisor_NG == 0)
        return found

    def _take_alike(self, found: _Solved, alike_NG: NDArray[np.bool_]) -> None:
        """Try every step for groups whose weights are all the same number."""
        if not (alike_NG & ~found.fits_NG).any():
            return

        for step in range(self._step_codes + 1):
            step_NG = np.full_like(found.lowest_NG, step)
            for code in range(self._codes + 1):
                minimum_NG = step_NG * code - found.lowest_NG
                self._take(found, step_NG, minimum_NG, alike_NG)

    def _take(
        self,
        found: _Solved,
        step_NG: NDArray[np.int64],
        minimum_NG: NDArray[np.int64],
        tried_NG: NDArray[np.bool_],
    ) -> None:
        """Note what the format has, of those that are tried and have nothing yet."""
        number_NG = minimum_NG // self._units
        fits_NG = tried_NG & ~found.fits_NG
        fits_NG &= (step_NG >= 0) & (step_NG <= self._step_codes)
        fits_NG &= (number_NG >= 0) & (number_NG <= self._minimum_codes)
        fits_NG &= number_NG * self._units == minimum_NG
        fits_NG &= found.lowest_NG + minimum_NG >= 0
        fits_NG &= found.highest_NG + minimum_NG <= step_NG * self._codes

        found.fits_NG[fits_NG] = True
        found.step_code_NG[fits_NG] = step_NG[fits_NG]
        found.minimum_code_NG[fits_NG] = number_NG[fits_NG]


class _Solved:
    """Which groups have a step code and a minimum code, and these; and the ends of each."""

    def __init__(self, product_NGS: NDArray[np.int64]) -> None:
        self.lowest_NG, self.highest_NG = product_NGS.min(axis=2), product_NGS.max(axis=2)
        shape = self.lowest_NG.shape
        self.fits_NG = np.zeros(shape, np.bool_)
        self.step_code_NG, self.minimum_code_NG = np.zeros((2, *shape), np.int64)
