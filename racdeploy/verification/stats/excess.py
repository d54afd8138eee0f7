"""Upper bound of a difference of means over the same texts, by resampling texts.

Tokens of a text depend on each other, so whole texts are drawn. A few texts may hold most of the
divergence; the studentized bootstrap still covers the mean, where plain percentiles fall short.
Source: Davison and Hinkley, Bootstrap Methods and their Application, 1997, 2.4, 3.8 and 5.2.1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from racdeploy.verification.stats.distributions import Floats

_RESAMPLES = 4000  # the 5th percentile of so many has an error of a few hundredths of a deviation
_SEED = 0


def bound_mean_difference(
    first_sums: ArrayLike, second_sums: ArrayLike, tokens: ArrayLike, confidence: float = 0.95
) -> float:
    """Return the one-sided upper bound of mean second - mean first, both per token.

    Args:
        first_sums, second_sums: sums_N of two files over each of N texts.
        tokens: tokens_N of each text.

    Returns:
        Infinity for a single text, which shows no spread.
    """
    tokens_N = np.asarray(tokens, dtype=np.float64)
    difference_N = np.asarray(second_sums, dtype=np.float64) - np.asarray(first_sums)
    n = len(tokens_N)
    if n == 1:
        return math.inf

    (mean,), (deviation,) = _estimate_means(difference_N[None], tokens_N[None])
    student_R = _resample_student(difference_N, tokens_N, float(mean))
    if not student_R.size:
        return float(mean)
    lowest = np.quantile(student_R, 1 - confidence)
    return float(mean - lowest * deviation)


def _resample_student(sums_N: Floats, tokens_N: Floats, mean: float) -> Floats:
    """Return the deviations of resampled means from the mean, in their own standard errors."""
    n = len(tokens_N)
    drawn_RN = np.random.default_rng(_SEED).integers(n, size=(_RESAMPLES, n))
    mean_R, error_R = _estimate_means(sums_N[drawn_RN], tokens_N[drawn_RN])
    varies_R = error_R > 0  # one text, drawn again and again, does not
    return np.asarray((mean_R - mean)[varies_R] / error_R[varies_R])


def _estimate_means(sums_RN: Floats, tokens_RN: Floats) -> tuple[Floats, Floats]:
    """Return mean_R per token, and its standard deviation over samples of N texts."""
    mean_R = sums_RN.sum(1) / tokens_RN.sum(1)
    # By the delta method: the influence of a text on a ratio of sums.
    influence_RN = (sums_RN - mean_R[:, None] * tokens_RN) / tokens_RN.mean(1, keepdims=True)
    return mean_R, influence_RN.std(1, ddof=1) / math.sqrt(sums_RN.shape[1])
