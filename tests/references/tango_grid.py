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


def interval(
    n10: int, n01: int, n: int, confidence: float, points: int = 2001
) -> tuple[float, float]:
    """Return the ends of the accepted drops, each within one step of a grid refined once."""
    quantile = float(norm.ppf((1 + confidence) / 2))
    coarse = np.linspace(-1, 1, points)
    accepted = [d for d in coarse if abs(score(n10, n01, n, d)) <= quantile]
    accepted = accepted or [(n10 - n01) / n]
    step = 2 / (points - 1)
    ends = []
    for end in (min(accepted), max(accepted)):
        fine = np.linspace(max(-1, end - step), min(1, end + step), 201)
        inside = [d for d in fine if abs(score(n10, n01, n, d)) <= quantile] or [end]
        ends.append(float(min(inside) if end == min(accepted) else max(inside)))
    return ends[0], ends[1]
