"""The paired difference of two means, for figures that are not right or wrong."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from racdeploy.verify.stats.distributions import check_confidence, student_quantile
from racdeploy.verify.stats.verdicts import Interval


def difference_interval(first: ArrayLike, second: ArrayLike, confidence: float = 0.90) -> Interval:
    """Return Student's interval of mean(second - first), first_N and second_N by prompt, N > 1."""
    first_N = np.asarray(first, dtype=np.float64)
    second_N = np.asarray(second, dtype=np.float64)
    if first_N.shape != second_N.shape or first_N.ndim != 1 or first_N.size < 2:
        raise ValueError(
            f"{first_N.shape} and {second_N.shape} figures: not two or more, of the same prompts"
        )

    check_confidence(confidence)
    n = len(first_N)

    difference_N = second_N - first_N
    mean = float(difference_N.mean())
    deviation = float(difference_N.std(ddof=1))

    half = student_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half)
