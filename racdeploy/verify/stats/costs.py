"""What a right answer costs: the ratio of two means over the same prompts, and its interval.

By the delta method, log(mean cost / mean right) has the variance
var(cost / mean cost - right / mean right) / n. Two models over the same prompts are compared by the
difference of their logarithms.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from racdeploy.verify.stats.distributions import check_confidence, student_quantile
from racdeploy.verify.stats.verdicts import RatioEstimate

Floats = NDArray[np.float64]


def cost_per_success(
    costs: ArrayLike, successes: ArrayLike, confidence: float = 0.95
) -> RatioEstimate:
    """Return the mean cost over the mean success, costs_N at least 0 and successes_N 0 or 1.

    Without a success it is infinite, and its interval reaches from 0 to infinity.
    """
    costs_N, right_N = _check(costs, successes)
    return _estimate(*_log_ratio(costs_N, right_N), len(costs_N), confidence)


def compare_costs(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    confidence: float = 0.95,
) -> RatioEstimate:
    """Return the second model's cost per success over the first one's, over the same prompts.

    Each is given as costs_N and successes_N.
    """
    first_log, first_N = _log_ratio(*_check(*first))
    second_log, second_N = _log_ratio(*_check(*second))
    if len(first_N) != len(second_N):
        raise ValueError(f"{len(first_N)} and {len(second_N)} costs: not the same prompts")

    if math.isinf(first_log) and math.isinf(second_log):
        return RatioEstimate(1.0, 0.0, math.inf, len(first_N))
    return _estimate(second_log - first_log, second_N - first_N, len(first_N), confidence)


def _log_ratio(costs_N: Floats, right_N: Floats) -> tuple[float, Floats]:
    """Return the logarithm of the ratio, and what each prompt moves it by."""
    cost, right = float(costs_N.mean()), float(right_N.mean())
    if not right or not cost:
        return (math.inf if not right else -math.inf), np.full(len(costs_N), np.nan)
    return math.log(cost / right), costs_N / cost - right_N / right


def _estimate(log_ratio: float, moved_N: Floats, n: int, confidence: float) -> RatioEstimate:
    check_confidence(confidence)
    ratio = math.exp(log_ratio) if log_ratio < 700 else math.inf
    if n == 1 or not np.isfinite(moved_N).all():
        return RatioEstimate(ratio, 0.0, math.inf, n)

    deviation = float(moved_N.std(ddof=1))
    half = student_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    factor = math.exp(half) if half < 700 else math.inf
    return RatioEstimate(ratio, ratio / factor, ratio * factor, n)


def _check(costs: ArrayLike, successes: ArrayLike) -> tuple[Floats, Floats]:
    costs_N = np.asarray(costs, dtype=np.float64)
    right_N = np.asarray(successes, dtype=np.float64)
    if costs_N.ndim != 1 or costs_N.shape != right_N.shape or not costs_N.size:
        raise ValueError(f"{costs_N.shape} costs and {right_N.shape} successes: not of one model")
    if not np.isfinite(costs_N).all() or (costs_N < 0).any():
        raise ValueError("a cost is negative or not finite")
    return costs_N, right_N
