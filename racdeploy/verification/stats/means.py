"""Difference and ratio of two means over the same prompts.

By the delta method, log(mean y / mean x) has the variance var(y / mean y - x / mean x) / n, which
includes the paired covariance. The term in brackets is a prompt's influence on the logarithm.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from racdeploy.verification.stats.distributions import Floats, student_quantile
from racdeploy.verification.stats.verdicts import ConfidenceInterval, RatioEstimate

_MAX_EXPONENT = 700.0  # e to this power is still a float64


def difference_interval(
    first: ArrayLike, second: ArrayLike, confidence: float
) -> ConfidenceInterval:
    """Return Student's interval of mean(second_N - first_N), for at least two prompts."""
    first_N = np.asarray(first, dtype=np.float64)
    second_N = np.asarray(second, dtype=np.float64)
    n = len(first_N)
    difference_N = second_N - first_N
    mean = float(difference_N.mean())
    deviation = float(difference_N.std(ddof=1))

    half = student_quantile(confidence, n - 1) * deviation / math.sqrt(n)
    return ConfidenceInterval(mean - half, mean + half)


def ratio_of_means(first_N: Floats, second_N: Floats) -> tuple[float, Floats]:
    """Return mean second / mean first, and each prompt's influence_N on its logarithm."""
    first, second = float(first_N.mean()), float(second_N.mean())
    if not first or not second:
        return (0.0 if first else math.inf), np.full(len(first_N), np.nan)
    return second / first, second_N / second - first_N / first


def estimate_ratio(ratio: float, influence_N: Floats, confidence: float) -> RatioEstimate:
    """Return a ratio with its interval: 0 to infinity for one prompt, or a mean of zero."""
    n = len(influence_N)
    if n == 1 or not np.isfinite(influence_N).all():
        return RatioEstimate(ratio, 0.0, math.inf)

    deviation = float(influence_N.std(ddof=1))
    half = student_quantile(confidence, n - 1) * (deviation / math.sqrt(n))
    factor = math.exp(half) if half < _MAX_EXPONENT else math.inf
    return RatioEstimate(ratio, ratio / factor, ratio * factor)
