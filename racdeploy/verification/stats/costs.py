"""Cost per right answer: the ratio of two means over the same prompts, and its interval.

Two models are compared by the difference of the logarithms of their costs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from racdeploy.verification.stats.distributions import Floats
from racdeploy.verification.stats.means import estimate_ratio, ratio_of_means
from racdeploy.verification.stats.verdicts import RatioEstimate


def cost_per_success(
    costs: ArrayLike, successes: ArrayLike, confidence: float = 0.95
) -> RatioEstimate:
    """Return the mean cost divided by the mean success; without a success it is infinite.

    Args:
        costs: costs_N of each prompt, at least 0.
        successes: successes_N of each prompt, 0 or 1.
    """
    return estimate_ratio(*_find_cost(costs, successes), confidence)


def compare_costs(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    confidence: float = 0.95,
) -> RatioEstimate:
    """Return the second model's cost per success divided by the first one's.

    Args:
        first, second: costs_N and successes_N of each model, over the same prompts.

    Raises:
        ValueError: the models have different numbers of prompts.
    """
    first_cost, first_N = _find_cost(*first)
    second_cost, second_N = _find_cost(*second)
    if len(first_N) != len(second_N):
        raise ValueError(f"{len(first_N)} and {len(second_N)} costs: not the same prompts")

    # Neither ever succeeds: they are even, and nothing more is known.
    if math.isinf(first_cost) and math.isinf(second_cost):
        return RatioEstimate(1.0, 0.0, math.inf)
    ratio = second_cost / first_cost if first_cost else math.inf
    return estimate_ratio(ratio, second_N - first_N, confidence)


def _find_cost(costs: ArrayLike, successes: ArrayLike) -> tuple[float, Floats]:
    """Return the cost of a success, and the influence of each prompt on its logarithm."""
    costs_N = np.asarray(costs, dtype=np.float64)
    right_N = np.asarray(successes, dtype=np.float64)
    return ratio_of_means(right_N, costs_N)
