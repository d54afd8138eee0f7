"""Quantiles and binomial probabilities by bracketing and exact sums: numpy alone is needed.

Sources: C. J. Clopper and E. S. Pearson, Biometrika 26 (1934) 404-413; Abramowitz and Stegun,
Handbook of Mathematical Functions, 26.7, for Student's quantile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ROUNDING_TOLERANCE = 1e-9
"""Tolerance for sums of shares that would be whole numbers without rounding."""
_TAIL_SIGMAS = 8.5  # a binomial's mass outside is below 1e-15
_SKEW_COUNTS = 25  # extra counts for small, skewed binomials, whose tails are not normal
_GRID_POINTS = 129
_GRIDS = 8  # each divides the interval by 128: 56 bits together
_TINY = 1e-300  # avoids the logarithm of 0


def bisect(is_below: Callable[[float], bool], low: float, high: float, steps: int = 60) -> float:
    """Return the point at which ``is_below`` turns false; 60 steps reach float precision near 1."""
    for _ in range(steps):
        middle = (low + high) / 2
        if is_below(middle):
            low = middle
        else:
            high = middle

    return high


def last_accepted(
    is_accepted_P: Callable[[Floats], NDArray[np.bool_]], low: float, high: float
) -> float:
    """Return the point at which acceptance ends, to float precision near 1.

    Many points at a time: numpy takes as long for one number as for all of them.

    Args:
        is_accepted_P: of each point; once false, false for all greater ones.
        low: a point that is accepted.
    """
    for _ in range(_GRIDS):
        points_P = np.linspace(low, high, _GRID_POINTS)
        accepted = int(np.count_nonzero(is_accepted_P(points_P[1:-1])))
        low, high = float(points_P[accepted]), float(points_P[accepted + 1])

    return high


def normal_quantile(confidence: float) -> float:
    """Return the normal quantile of a two-sided interval, as 1.645 for 0.90."""
    return -NormalDist().inv_cdf((1 - confidence) / 2)


def student_quantile(confidence: float, freedom: int) -> float:
    """Return Student's quantile of a two-sided interval with ``freedom`` degrees of freedom.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4, solved for the angle by bisection.
    """
    odd = freedom % 2
    steps = np.arange(1, freedom // 2)
    factors = (2 * steps - 1 + odd) / (2 * steps + odd)

    def is_below(angle: float) -> bool:
        cosine = math.cos(angle)
        powers = np.cumprod(factors * cosine**2)
        series = 1 + powers.sum() if freedom > 1 else 0.0

        inside = math.sin(angle) * series
        if odd:
            inside = 2 / math.pi * (angle + cosine * inside)

        return bool(inside < confidence)

    return math.sqrt(freedom) * math.tan(bisect(is_below, 0.0, math.pi / 2))


def likely_counts(n: int, rate: float) -> NDArray[np.int64]:
    """Return the counts_L that hold all but a negligible part of a binomial's mass."""
    deviation = math.sqrt(n * rate * (1 - rate))
    reach = _TAIL_SIGMAS * deviation + _SKEW_COUNTS

    first = max(0, math.floor(n * rate - reach))
    last = min(n, math.ceil(n * rate + reach))
    return np.arange(first, last + 1)


def binomial_pmf(counts_L: NDArray[np.int64], n: int, rate: float) -> Floats:
    """Return P(X = count) for X ~ Binomial(n, rate)."""
    # In logarithms: the binomial coefficient of a thousand prompts overflows a float.
    log_rate = math.log(max(rate, _TINY))
    log_rest = math.log(max(1 - rate, _TINY))

    rest_L = n - counts_L
    log_factorials = _log_factorials(n.bit_length())
    log_choose_L = log_factorials[n] - log_factorials[counts_L] - log_factorials[rest_L]

    return np.asarray(np.exp(log_choose_L + counts_L * log_rate + rest_L * log_rest))


def binomial_cdf(counts_L: NDArray[np.int64], n: int, rate: float) -> Floats:
    """Return P(X <= count) for X ~ Binomial(n, rate)."""
    counts_from_zero = np.arange(int(counts_L.max()) + 1)
    masses = binomial_pmf(counts_from_zero, n, rate)
    return np.asarray(np.cumsum(masses)[counts_L])


@cache
def clopper_pearson_upper(count: float, n: float, tail: float) -> float:
    """Return Clopper and Pearson's upper bound of a share; counts are rounded to the safe side.

    Args:
        tail: probability above the bound, as 0.05.
    """
    whole_count = math.ceil(count - ROUNDING_TOLERANCE)
    whole_n = math.floor(n + ROUNDING_TOLERANCE)
    if whole_count >= whole_n:
        return 1.0

    def is_below(share: float) -> bool:
        return float(binomial_cdf(np.array([whole_count]), whole_n, share)[0]) >= tail

    return bisect(is_below, whole_count / whole_n, 1.0)


def clopper_pearson_lower(count: float, n: float, tail: float) -> float:
    """Return Clopper and Pearson's lower bound of a share; see :func:`clopper_pearson_upper`."""
    whole_count = math.floor(count + ROUNDING_TOLERANCE)
    whole_n = math.ceil(n - ROUNDING_TOLERANCE)
    return 1 - clopper_pearson_upper(whole_n - whole_count, whole_n, tail)


@cache
def _log_factorials(bits: int) -> Floats:
    """Return log(k!) for all k below 2 ** bits: one cached table serves many n."""
    logs = np.log(np.arange(1, 1 << bits))
    return np.concatenate(([0.0], np.cumsum(logs)))
