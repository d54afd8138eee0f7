"""Find blocks that an asymmetric format can store exactly, and their codes.

A weight is (step code · code − units · minimum code) · scale: pruning makes the scale of minima
``units`` times that of steps. So the scale is a common divisor of the block's weights, as in
:mod:`racdeploy.quant.exact_scales`. The step code of a group divides the differences of its
products, weight / scale, and the lowest product gives the minimum code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.quant.exact_scales import (
    SMALLEST_HALF,
    ExactBlockFinder,
    ExactBlocks,
    is_exact_in_half,
)


@dataclass(frozen=True)
class AsymmetricBlocks(ExactBlocks):
    """Exactly stored blocks of an asymmetric format, with their minimum codes."""

    minimum_code_NG: NDArray[np.int64]


class AsymmetricFinder(ExactBlockFinder):
    """Finds blocks of asymmetric groups.

    Of several solutions for a group, one with a minimum of ``zero_code`` steps wins, since it has a
    code for zero; then the largest step code.

    Args:
        codes, step_codes, minimum_codes: the highest ones; the lowest are 0.
        units: scales that a minimum code is worth.
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
        self._minimum_codes, self._units, self._zero_code = minimum_codes, units, zero_code

    def find(self, weight_NGS: NDArray[np.float32]) -> AsymmetricBlocks:
        """Return the exactly stored blocks; blocks of zeros have no scale and are left out."""
        index_N = self._find_candidates(weight_NGS)
        index_N = index_N[self._reaches(weight_NGS[index_N])]
        weight_NGS = weight_NGS[index_N]

        shape = weight_NGS.shape[:2]
        step_code_NG = np.zeros(shape, np.int64)
        minimum_code_NG = np.zeros(shape, np.int64)
        scale_N = self._try_scales(weight_NGS, self._fit, step_code_NG, minimum_code_NG)

        exact_N = np.flatnonzero(scale_N)
        scale_N, step_code_NG = scale_N[exact_N], step_code_NG[exact_N]
        minimum_code_NG = minimum_code_NG[exact_N]

        # Products above the minimum are code · step code.
        above_NGS = np.rint(weight_NGS[exact_N] / scale_N[:, None, None]).astype(np.int64)
        above_NGS += (minimum_code_NG * self._units)[:, :, None]
        code_NGS = above_NGS // np.where(step_code_NG == 0, 1, step_code_NG)[:, :, None]
        half_N = scale_N.astype(np.float16)
        return AsymmetricBlocks(index_N[exact_N], half_N, step_code_NG, code_NGS, minimum_code_NG)

    def _fit(
        self, weight_NGS: NDArray[np.float32], scale_N: NDArray[np.float64]
    ) -> tuple[NDArray[Any], ...]:
        """Return fits_N, True for blocks with codes for the scale, and step and minimum codes."""
        product_NGS = weight_NGS / scale_N[:, None, None]
        whole_NGS = np.rint(product_NGS)
        solution = self._solve(whole_NGS.astype(np.int64))

        # The scale of minima is stored by itself, so it must be exact in half precision, too.
        fits_N = solution.fits_NG.all(axis=1) & is_exact_in_half(scale_N * self._units)
        fits_N &= (whole_NGS == product_NGS).all(axis=(1, 2))
        return fits_N, solution.step_code_NG, solution.minimum_code_NG

    def _reaches(self, weight_NGS: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return fits_N, True for blocks whose groups all span at most the highest code's steps."""
        units_NGS = np.rint(weight_NGS / SMALLEST_HALF).astype(np.int64)
        lowest_NG = units_NGS.min(axis=2)
        # No step is larger than the greatest common divisor of the differences.
        divisor_NG = np.gcd.reduce(units_NGS - lowest_NG[:, :, None], axis=2)
        reach_NG = units_NGS.max(axis=2) - lowest_NG
        fits_N: NDArray[np.bool_] = (reach_NG <= self._codes * divisor_NG).all(axis=1)
        return fits_N

    def _solve(self, product_NGS: NDArray[np.int64]) -> _Solution:
        """Return step and minimum codes of every group that has a solution for these products."""
        solution = _Solution(product_NGS)
        lowest_NG = solution.lowest_NG
        span_NG = solution.highest_NG - lowest_NG
        divisor_NG = np.gcd.reduce(product_NGS - lowest_NG[:, :, None], axis=2)

        # First a minimum of zero_code steps: all products are multiples of the step.
        multiple_NG = np.gcd(divisor_NG, lowest_NG)
        for times in range(1, self._codes + 1):
            step_NG = multiple_NG // times
            whole_NG = step_NG * times == multiple_NG
            minimum_NG = step_NG * self._zero_code
            self._take(solution, step_NG, minimum_NG, whole_NG)

        if solution.fits_NG.all():
            return solution

        # Else any code may be that of the lowest weight, and the minimum follows from it.

        for times in range(1, self._codes + 1):
            step_NG = divisor_NG // times
            whole_NG = (step_NG * times == divisor_NG) & (divisor_NG > 0)
            for code in range(self._codes + 1):
                inside_NG = whole_NG & (span_NG <= step_NG * (self._codes - code))
                minimum_NG = step_NG * code - lowest_NG
                self._take(solution, step_NG, minimum_NG, inside_NG)

        self._take_constant(solution, divisor_NG == 0)
        return solution

    def _take_constant(self, solution: _Solution, constant_NG: NDArray[np.bool_]) -> None:
        """Try every step for groups of equal weights, whose differences have no divisor."""
        if not (constant_NG & ~solution.fits_NG).any():
            return

        for step in range(self._step_codes + 1):
            step_NG = np.full_like(solution.lowest_NG, step)
            for code in range(self._codes + 1):
                minimum_NG = step_NG * code - solution.lowest_NG
                self._take(solution, step_NG, minimum_NG, constant_NG)

    def _take(
        self,
        solution: _Solution,
        step_NG: NDArray[np.int64],
        minimum_NG: NDArray[np.int64],
        tried_NG: NDArray[np.bool_],
    ) -> None:
        """Record steps and minima that the format has, for tried groups without a solution yet."""
        minimum_code_NG = minimum_NG // self._units
        fits_NG = tried_NG & ~solution.fits_NG
        fits_NG &= (step_NG >= 0) & (step_NG <= self._step_codes)
        fits_NG &= (minimum_code_NG >= 0) & (minimum_code_NG <= self._minimum_codes)
        fits_NG &= minimum_code_NG * self._units == minimum_NG
        fits_NG &= solution.lowest_NG + minimum_NG >= 0
        fits_NG &= solution.highest_NG + minimum_NG <= step_NG * self._codes

        solution.fits_NG[fits_NG] = True
        solution.step_code_NG[fits_NG] = step_NG[fits_NG]
        solution.minimum_code_NG[fits_NG] = minimum_code_NG[fits_NG]


class _Solution:
    """Step and minimum codes of groups where fits_NG, and the range of their products."""

    def __init__(self, product_NGS: NDArray[np.int64]) -> None:
        self.lowest_NG, self.highest_NG = product_NGS.min(axis=2), product_NGS.max(axis=2)
        shape = self.lowest_NG.shape
        self.fits_NG = np.zeros(shape, np.bool_)
        self.step_code_NG, self.minimum_code_NG = np.zeros((2, *shape), np.int64)
