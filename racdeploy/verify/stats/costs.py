"""What a right answer costs: the ratio of two means over the same prompts, and its interval.

Two models over the same prompts are compared by the difference of the logarithms of their costs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from racdeploy.verify.stats.means import Floats, estimate_ratio, ratio_of_means
from racdeploy.verify.stats.verdicts import RatioEstimate


def cost_per_success(
    costs: ArrayLike, successes: ArrayLike, confidence: float = 0.95
) -> RatioEstimate:
    """Return the mean cost over the mean success, costs_N at least 0 and successes_N 0 or 1.

    Without a success it is infinite, and its interval reaches from 0 to infinity.
    """
    return estimate_ratio(*_find_cost(costs, successes), confidence)


def compare_costs(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    confidence: float = 0.95,
) -> RatioEstimate:
    """Return the second model's cost per success over the first one's, over the same prompts.

    Each is given as costs_N and successes_N.
    """
    first_cost, first_N = _find_cost(*first)
    second_cost, second_N = _find_cost(*second)
    if len(first_N) != len(second_N):
        raise ValueError(f"{len(first_N)} and {len(second_N)} costs: not the same prompts")

    if math.isinf(first_cost) and math.isinf(second_cost):
        return RatioEstimate(1.0, 0.0, math.inf)
    ratio = second_cost / first_cost if first_cost else math.inf
    return estimate_ratio(ratio, second_N - first_N, confidence)


def _find_cost(costs: ArrayLike, successes: ArrayLike) -> tuple[float, Floats]:
    """Return the cost of a success, and what each prompt moves its logarithm by."""
    costs_N = np.asarray(costs, dtype=np.float64)
    right_N = np.asarray(successes, dtype=np.float64)
    if costs_N.ndim != 1 or costs_N.shape != right_N.shape or not costs_N.size:
        raise ValueError(f"{costs_N.shape} costs and {right_N.shape} successes: not of one model")
    if not np.isfinite(costs_N).all() or (costs_N < 0).any():
        raise ValueError("a cost is negative or not finite")
    return ratio_of_means(right_N, costs_N)
