"""Two one-sided tests: the answers of both tests apart, and a level that simulation confirms."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from scipy.stats import t as student

from racdeploy.results.checks import VerdictName
from racdeploy.verification.stats.lengths import (
    length_deviation,
    length_ratio,
    smallest_detectable_ratio,
)
from racdeploy.verification.stats.paired import drop_interval
from racdeploy.verification.stats.verdicts import judge, judge_within

DRAWS = 20_000


def equivalence(n10: float, n01: float, n: float, margin: float) -> VerdictName:
    """Judge as the check of the engines does."""
    return judge_within(drop_interval(n10, n01, n), -margin, margin)


def equivalent_lengths(
    first: ArrayLike, second: ArrayLike, budget: float, limit: float
) -> VerdictName:
    """Judge as the check of the engines does."""
    return judge_within(length_ratio(first, second, budget), 1 / limit, limit)


def _length_power(n: int, deviation: float, limit: float) -> float:
    """Return the probability that a true ratio of 1 passes a limit, by normal approximation."""
    needed = student.ppf(0.95, n - 1)
    return float(norm.cdf(math.log(limit) * math.sqrt(n) / deviation - needed))


@given(st.integers(1, 300), st.data(), st.sampled_from([0.02, 0.05, 0.2]))
@settings(max_examples=150, deadline=None)
def test_equivalence_is_non_inferiority_both_ways(
    n: int, data: st.DataObject, margin: float
) -> None:
    """It passes if and only if neither arm is worse than the other by the margin."""
    n10 = data.draw(st.integers(0, n))
    n01 = data.draw(st.integers(0, n - n10))
    both = {
        judge(drop_interval(n10, n01, n), margin),
        judge(drop_interval(n01, n10, n), margin),
    } == {"pass"}
    verdict = equivalence(n10, n01, n, margin)
    assert (verdict == "pass") is both
    assert verdict == equivalence(n01, n10, n, margin)


@pytest.mark.parametrize(
    ("n10", "n01", "n", "verdict"),
    [(2, 2, 300, "pass"), (60, 5, 300, "fail"), (5, 60, 300, "fail"), (0, 0, 20, "inconclusive")],
)
def test_equivalence_has_three_answers(n10: int, n01: int, n: int, verdict: str) -> None:
    """A difference either way fails it, and too few prompts decide nothing."""
    assert equivalence(n10, n01, n, margin=0.05) == verdict


def _count_passing(n10s: NDArray[np.int64], n01: int, n: int, margin: float) -> int:
    """Count the tables that pass: those from where one arm is not worse to where the other is.

    Both ends of the interval rise with n10, as test_stats.py shows.
    """
    likely = range(int(n10s.min()), int(n10s.max()) + 1)

    def first_is_not_worse(n10: int) -> bool:
        return judge(drop_interval(n01, n10, n), margin) == "pass"

    def second_may_be_worse(n10: int) -> bool:
        return judge(drop_interval(n10, n01, n), margin) != "pass"

    start = bisect_left(likely, True, key=first_is_not_worse)
    stop = bisect_left(likely, True, key=second_may_be_worse)
    return int(np.isin(n10s, likely[start:stop]).sum())


@pytest.mark.parametrize(
    ("n", "rate", "margin"), [(200, 0.05, 0.05), (200, 0.10, 0.05), (433, 0.10, 0.05)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_arms_that_differ_by_the_margin_pass_at_most_five_percent(
    n: int, rate: float, margin: float, sign: int
) -> None:
    """20 000 draws have a standard error of 0.15 points: 5.5 % is three."""
    cells = np.random.default_rng(7).multinomial(
        n, [(rate + sign * margin) / 2, (rate - sign * margin) / 2, 1 - rate], size=DRAWS
    )
    passed = 0
    for n01 in np.unique(cells[:, 1]).tolist():
        passed += _count_passing(cells[cells[:, 1] == n01, 0], n01, n, margin)
    assert passed / DRAWS <= 0.055


def test_lengths_are_equivalent_within_a_ratio_both_ways() -> None:
    """A ratio of 1.02 passes 1.1 whichever arm comes first, and 1.3 fails it."""
    generator = np.random.default_rng(5)
    first = generator.gamma(6, 30, size=200)
    noise = generator.lognormal(0, 0.1, size=200)
    for factor, verdict in ((1.02, "pass"), (1.3, "fail"), (1.1, "inconclusive")):
        second = first * factor * noise / noise.mean()
        assert equivalent_lengths(first, second, 1e9, limit=1.1) == verdict
        assert equivalent_lengths(second, first, 1e9, limit=1.1) == verdict


@pytest.mark.parametrize(
    ("n", "limit", "ratio"), [(40, 1.2, 1.0), (80, 1.1, 1.0), (60, 1.2, 1.2), (120, 1.2, 1.1)]
)
def test_the_power_of_a_length_agrees_with_simulation(n: int, limit: float, ratio: float) -> None:
    """Within 2 points over 20 000 draws; the verdict is computed here as the textbook writes it."""
    generator = np.random.default_rng(3)
    dense_RN = generator.gamma(9, 20, size=(DRAWS, n))
    pruned_RN = dense_RN * ratio * generator.lognormal(-0.02, 0.2, size=(DRAWS, n))
    x_R1, y_R1 = (part.mean(axis=1, keepdims=True) for part in (dense_RN, pruned_RN))
    deviation_R = (pruned_RN / y_R1 - dense_RN / x_R1).std(axis=1, ddof=1)
    upper_R = np.log(y_R1 / x_R1)[:, 0] + student.ppf(0.95, n - 1) * deviation_R / math.sqrt(n)
    row = length_ratio(dense_RN[0], pruned_RN[0], 1e9)
    assert math.log(row.upper) == pytest.approx(upper_R[0])
    assert float(deviation_R[0]) == pytest.approx(length_deviation(dense_RN[0], pruned_RN[0], 1e9))
    expected = float((upper_R < math.log(limit)).mean())
    deviation = float(np.sqrt((deviation_R**2).mean()))
    assert _length_power(n, deviation, limit / ratio) == pytest.approx(expected, abs=0.02)


def test_the_smallest_detectable_ratio_is_the_inverse_of_the_power() -> None:
    """At that limit an unchanged model passes as often as was asked."""
    limit = smallest_detectable_ratio(60, 0.25)
    assert _length_power(60, 0.25, limit) == pytest.approx(0.8, abs=1e-9)
