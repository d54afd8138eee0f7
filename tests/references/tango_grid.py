"""A slow oracle of Tango's interval: profile the likelihood numerically, invert the score on a fine
grid.

Shares no formula with the code under test. The nuisance parameter comes from a bounded scalar
search of the log-likelihood instead of the root of a quadratic, and the ends from a grid instead of
a bisection.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import norm


@cache  # the grids of two confidences share their points
def score(n10: int, n01: int, n: int, drop: float) -> float:
    """Return the score statistic for a true drop, with p01 maximised numerically."""
    low, high = max(0.0, -drop), (1 - drop) / 2

    def surprise(p01: float) -> float:
        rest = max(0.0, 1 - 2 * p01 - drop)
        return -float(xlogy(n10, p01 + drop) + xlogy(n01, p01) + xlogy(n - n10 - n01, rest))

    inside = minimize_scalar(
        surprise, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    ).x
    p01 = min((low, high, float(inside)), key=surprise)
    variance = n * (2 * p01 + drop - drop**2)
    difference = n10 - n01 - n * drop
    if variance <= 1e-300:
        return 0.0 if difference == 0 else math.copysign(math.inf, difference)
    return difference / math.sqrt(variance)


def interval(n10: int, n01: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the ends of the accepted drops, by ever finer grids, within a step of 1e-5."""
    quantile = float(norm.ppf((1 + confidence) / 2))

    def list_accepted(low: float, high: float, points: int) -> list[float]:
        grid = np.linspace(max(-1, low), min(1, high), points)
        return [float(drop) for drop in grid if abs(score(n10, n01, n, drop)) <= quantile]

    coarse = list_accepted(-1, 1, 201) or [(n10 - n01) / n]
    ends = []
    for choose in (min, max):
        end = choose(coarse)
        for step in (1e-2, 1e-3, 1e-4):
            end = choose(list_accepted(end - step, end + step, 21) or [end])
        ends.append(end)
    return ends[0], ends[1]
