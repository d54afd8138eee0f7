"""Seconds for each right answer: the interval against resampling, and against another model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from racdeploy.verification.stats.costs import compare_costs, cost_per_success

RANDOM = np.random.default_rng(3)
RIGHT_N = RANDOM.random(600) < 0.8
COSTS_N = RANDOM.gamma(4, 0.5, 600) * np.where(RIGHT_N, 1, 2)


def test_the_interval_is_that_of_resampling() -> None:
    """Both ends within 1 % of scipy's bootstrap."""
    found = cost_per_success(COSTS_N, RIGHT_N, 0.95)

    def ratio(costs_N, right_N, axis):  # type: ignore[no-untyped-def]
        return costs_N.mean(axis) / right_N.mean(axis)

    drawn = bootstrap(
        (COSTS_N, RIGHT_N.astype(float)), ratio, paired=True, method="percentile", rng=0
    ).confidence_interval

    assert found.ratio == pytest.approx(COSTS_N.sum() / RIGHT_N.sum())
    assert (found.lower, found.upper) == pytest.approx((drawn.low, drawn.high), rel=0.01)


def test_shared_luck_makes_a_comparison_narrower() -> None:
    """A model that takes 10 % more on the same prompts is told from one of other prompts' luck."""
    dearer_N = 1.1 * COSTS_N
    paired = compare_costs((COSTS_N, RIGHT_N), (dearer_N, RIGHT_N))
    order = RANDOM.permutation(len(COSTS_N))
    shuffled = compare_costs((COSTS_N, RIGHT_N), (dearer_N[order], RIGHT_N[order]))

    assert paired.ratio == pytest.approx(1.1)
    assert paired.lower == pytest.approx(1.1)
    assert shuffled.lower < 1.05 < 1.1 < shuffled.upper


def test_without_a_right_answer_the_cost_is_infinite() -> None:
    """Its interval says nothing, and two such models are even."""
    none_N = np.zeros(len(COSTS_N), bool)
    assert cost_per_success(COSTS_N, none_N).ratio == math.inf
    found = compare_costs((COSTS_N, RIGHT_N), (COSTS_N, none_N))
    assert found.ratio == math.inf
    assert found.lower == 0.0
    assert compare_costs((COSTS_N, none_N), (COSTS_N, none_N)).ratio == 1.0
