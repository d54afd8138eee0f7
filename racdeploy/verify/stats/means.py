"""Two means over the same prompts: their difference, and their ratio.

By the delta method, log(mean y / mean x) has the variance var(y / mean y - x / mean x) / n, paired
covariance included.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from racdeploy.verify.stats.distributions import student_quantile
from racdeploy.verify.stats.verdicts import Interval, RatioEstimate

Floats = NDArray[np.float64]
_LARGEST_EXPONENT = 700.0  # e to this is still a float64


def difference_interval(first: ArrayLike, second: ArrayLike, confidence: float) -> Interval:
    """Return Student's interval of mean(second - first), first_N and second_N by prompt, N > 1."""
    first_N = np.asarray(first, dtype=np.float64)
    second_N = np.asarray(second, dtype=np.float64)
    if first_N.shape != second_N.shape or first_N.ndim != 1 or first_N.size < 2:
        raise ValueError(
            f"{first_N.shape} and {second_N.shape} figures: not two or more, of the same prompts"
        )

    n = len(first_N)

    difference_N = second_N - first_N
    mean = float(difference_N.mean())
    deviation = float(difference_N.std(ddof=1))

    half = student_quantile(confidence, n - 1) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half)


def ratio_of_means(first_N: Floats, second_N: Floats) -> tuple[float, Floats]:
    """Return mean second / mean first, and what each prompt moves its logarithm by."""
    first, second = float(first_N.mean()), float(second_N.mean())
    if not first or not second:
        return (0.0 if first else math.inf), np.full(len(first_N), np.nan)
    return second / first, second_N / second - first_N / first


def estimate_ratio(ratio: float, moved_N: Floats, confidence: float) -> RatioEstimate:
    """Return a ratio with its interval: up to infinity for one prompt, or a mean of zero."""
    n = len(moved_N)
    if n == 1 or not np.isfinite(moved_N).all():
        return RatioEstimate(ratio, 0.0, math.inf)

    deviation = float(moved_N.std(ddof=1))
    half = student_quantile(confidence, n - 1) * (deviation / math.sqrt(n))
    factor = math.exp(half) if half < _LARGEST_EXPONENT else math.inf
    return RatioEstimate(ratio, ratio / factor, ratio * factor)
