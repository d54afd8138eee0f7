"""Paired statistics: published tables, slow oracles, simulated error rates and invariants."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from scipy.stats import binom, binomtest, multinomial, norm
from scipy.stats import t as student

from racdeploy.verification.stats.distributions import normal_quantile, student_quantile
from racdeploy.verification.stats.lengths import length_ratio, restrict_lengths
from racdeploy.verification.stats.paired import (
    drop_interval,
    power,
    smallest_detectable_drop,
    tango_interval,
    wilson_interval,
)
from racdeploy.verification.stats.verdicts import ConfidenceInterval, judge
from tests.references import tango_grid
from tests.references.sample_size import required_n

PUBLISHED = [
    # (n10, n01, n, confidence, lower, upper, printed decimals)
    (9, 3, 32, 0.95, -0.027, 0.390, 3),  # Tango 1998, crossover trial
    (0, 1, 44, 0.90, -0.096, 0.037, 3),  # Tango 1998, contact lens disinfection
    (16, 8, 86, 0.95, -0.020, 0.207, 3),  # Agresti and Min 2005
    (3, 1, 14, 0.95, -0.1670, 0.4327, 4),  # Tang et al. 2010
    (1, 7, 21, 0.95, -0.517, -0.026, 3),  # Fagerland et al. 2014, after Bentur 2009
    (6, 16, 161, 0.95, -0.1240, -0.0054, 4),  # Fagerland et al. 2017, after Cavo 2012
]


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, int, int]:
    n = draw(st.integers(1, 400))
    n10 = draw(st.integers(0, n))
    return n10, draw(st.integers(0, n - n10)), n


@pytest.mark.parametrize(("n10", "n01", "n", "confidence", "lower", "upper", "decimals"), PUBLISHED)
def test_tango_gives_the_published_intervals(
    n10: int, n01: int, n: int, confidence: float, lower: float, upper: float, decimals: int
) -> None:
    """Every printed digit of the examples in the literature."""
    interval = tango_interval(n10, n01, n, confidence)
    assert (round(interval.lower, decimals), round(interval.upper, decimals)) == (lower, upper)


@pytest.mark.parametrize(
    ("n10", "n01", "n"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (0, 1, 1),
        (0, 0, 30),
        (30, 0, 30),
        (5, 5, 10),
        (7, 0, 30),
        (0, 9, 40),
        (12, 5, 100),
    ],
)
@pytest.mark.parametrize("confidence", [0.90, 0.99])
def test_tango_matches_the_grid_oracle(n10: int, n01: int, n: int, confidence: float) -> None:
    """Within one step of the oracle's finest grid, which is 1e-5."""
    expected = tango_grid.interval(n10, n01, n, confidence)
    assert tango_interval(n10, n01, n, confidence) == pytest.approx(expected, abs=1.1e-5)


def test_the_oracle_would_notice_a_wald_variance() -> None:
    """A spoiled interval, the textbook Wald one, is far outside the tolerance."""
    n10, n01, n = 7, 0, 30
    drop = (n10 - n01) / n
    wald = drop + 1.6449 * math.sqrt(((n10 + n01) / n - drop**2) / n)
    assert abs(wald - tango_grid.interval(n10, n01, n, 0.90)[1]) > 1e-2


def test_without_discordant_prompts_the_interval_has_a_closed_form() -> None:
    """For n10 = n01 = 0 the end solves n d / (1 - d) = z², as a Wilson interval does."""
    z = 1.6448536269514722
    end = z**2 / (200 + z**2)
    assert tango_interval(0, 0, 200, 0.90) == pytest.approx((-end, end), abs=1e-12)


@given(tables(), st.sampled_from([0.5, 0.9, 0.95, 0.999]))
@settings(max_examples=150, deadline=None)
def test_tango_holds_the_estimate_and_stays_in_range(
    table: tuple[int, int, int], confidence: float
) -> None:
    """-1 ≤ lower ≤ d ≤ upper ≤ 1, for any table."""
    n10, n01, n = table
    lower, upper = tango_interval(n10, n01, n, confidence)
    assert -1 <= lower <= (n10 - n01) / n <= upper <= 1
    assert upper > lower


@given(tables())
@settings(max_examples=100, deadline=None)
def test_tango_is_symmetric_under_swapping_the_arms(table: tuple[int, int, int]) -> None:
    """A drop of one arm is a gain of the other, to the last bit."""
    n10, n01, n = table
    lower, upper = tango_interval(n10, n01, n)
    assert tango_interval(n01, n10, n) == ConfidenceInterval(-upper, -lower)


@given(tables(), st.integers(2, 5))
@settings(max_examples=100, deadline=None)
def test_tango_narrows_with_more_prompts_of_the_same_kind(
    table: tuple[int, int, int], factor: int
) -> None:
    """The same proportions over more prompts give a narrower interval."""
    n10, n01, n = table
    few, many = tango_interval(n10, n01, n), tango_interval(factor * n10, factor * n01, factor * n)
    assert many.upper - many.lower < few.upper - few.lower


@pytest.mark.parametrize(
    ("n10", "n01", "n", "verdict"),
    [
        (0, 0, 200, "pass"),
        (40, 5, 200, "fail"),
        (0, 0, 20, "inconclusive"),
        (0, 0, 1, "inconclusive"),
    ],
)
def test_non_inferiority_has_three_answers(n10: int, n01: int, n: int, verdict: str) -> None:
    """Too few prompts are inconclusive even when both models agree on all of them."""
    assert judge(drop_interval(n10, n01, n), 0.05) == verdict


def test_a_limit_on_the_end_of_the_interval_is_inconclusive() -> None:
    """Only an interval strictly on one side decides."""
    assert judge(ConfidenceInterval(0.0, 0.05), 0.05) == "inconclusive"
    assert judge(ConfidenceInterval(0.05, 0.1), 0.05) == "inconclusive"


@given(tables())
@settings(max_examples=200, deadline=None)
def test_one_more_prompt_that_is_lost_moves_both_ends_up(table: tuple[int, int, int]) -> None:
    """The verdict only worsens with n10: the simulations below look for where it changes."""
    n10, n01, n = table
    if n10 + n01 < n:
        few, many = drop_interval(n10, n01, n), drop_interval(n10 + 1, n01, n)
        assert few.lower < many.lower
        assert few.upper < many.upper or few.upper == many.upper == 1


VERDICTS = ("pass", "inconclusive", "fail")
Interval = Callable[[float, float, float, float], ConfidenceInterval]
drop_of, tango_of = cache(drop_interval), cache(tango_interval)


def verdicts_of(
    n10s: ArrayLike, n01: int, n: int, margin: float, interval: Interval = drop_of
) -> list[str]:
    """Judge the tables of one n01 by the places where the verdict changes."""
    lowest, highest = int(np.min(n10s)), int(np.max(n10s))

    def severity(n10: int) -> int:
        return VERDICTS.index(judge(interval(n10, n01, n, 0.90), margin))

    changes = [bisect_left(range(highest + 1), worse, lowest, key=severity) for worse in (1, 2)]
    return [VERDICTS[place] for place in np.searchsorted(changes, n10s, side="right")]


def simulate(
    n: int, rate: float, margin: float, drop: float, wanted: str = "pass", draws: int = 20_000
) -> float:
    """Return the share of simulated verifications that end with a verdict."""
    generator = np.random.default_rng(20_251)
    cells = generator.multinomial(n, [(rate + drop) / 2, (rate - drop) / 2, 1 - rate], size=draws)
    ended = 0
    for n01 in np.unique(cells[:, 1]).tolist():
        ended += verdicts_of(cells[cells[:, 1] == n01, 0], n01, n, margin).count(wanted)
    return ended / draws


@pytest.mark.parametrize(
    ("n", "margin", "rate"),
    [(50, 0.02, 0.04), (100, 0.05, 0.08), (200, 0.05, 0.15), (500, 0.10, 0.20)],
)
def test_a_model_at_the_margin_passes_at_most_five_percent(
    n: int, margin: float, rate: float
) -> None:
    """Type-I error by simulation; 20 000 draws have a standard error of 0.15 points: 5.5 % is
    three.
    """
    assert simulate(n, rate, margin, drop=margin) <= 0.055


@pytest.mark.parametrize(
    ("n", "margin", "rate"),
    [(53, 0.05, 0.10), (62, 0.02, 0.06), (125, 0.01, 0.03), (128, 0.02, 0.04), (200, 0.02, 0.03)],
)
def test_a_model_at_the_margin_fails_at_most_five_percent(
    n: int, margin: float, rate: float
) -> None:
    """Nor is a model that is just good enough failed more often; the worst cases of a search are
    among these.
    """
    assert simulate(n, rate, margin, drop=margin, wanted="fail") <= 0.055


def exact_rate(n: int, rate: float, margin: float, score_alone: bool = False) -> float:
    """Return how often a model at the margin fails: scipy's trinomial masses of all tables that
    are not negligible.
    """
    p10, p01 = (rate + margin) / 2, (rate - margin) / 2
    total = 0.0
    for n01 in range(int(binom.ppf(1 - 1e-9, n, p01)) + 1):
        likely = range(int(binom.ppf(1e-9, n, p10)), int(binom.ppf(1 - 1e-9, n, p10)) + 1)
        n10s = [n10 for n10 in likely if n10 + n01 <= n]
        tables = [(n10, n01, n - n10 - n01) for n10 in n10s]
        masses = multinomial.pmf(tables, n, [p10, p01, 1 - p10 - p01])
        verdicts = verdicts_of(n10s, n01, n, margin, tango_of if score_alone else drop_of)
        total += float(np.dot(masses, [verdict == "fail" for verdict in verdicts]))
    return total


@pytest.mark.parametrize("n", [50, 62, 125])
@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05])
@pytest.mark.parametrize("rate_per_margin", [1.02, 1.5, 3.0])
def test_the_exact_rate_of_wrong_failures_stays_near_five_percent(
    n: int, margin: float, rate_per_margin: float
) -> None:
    """The same without noise. All tables of 1,960 such cells gave 5.4 % at most."""
    assert exact_rate(n, rate_per_margin * margin, margin) <= 0.055


def test_without_the_correction_a_model_at_the_margin_would_fail_too_often() -> None:
    """The spoiled version: Tango's interval alone."""
    assert exact_rate(125, 0.03, 0.01, score_alone=True) > 0.075


def test_the_correction_takes_half_a_flip_off() -> None:
    """At the corrected end, the score with half a prompt less than was seen is the quantile of the
    normal.
    """
    n10, n01, n = 30, 4, 100
    lower, upper = drop_interval(n10, n01, n, 0.90)
    assert upper == tango_interval(n10, n01, n, 0.90).upper
    assert lower < tango_interval(n10, n01, n, 0.90).lower
    difference = n10 - n01 - n * lower
    corrected = tango_grid.score(n10, n01, n, lower) * (difference - 0.5) / difference
    assert corrected == pytest.approx(1.6448536, abs=1e-5)


@given(tables())
@settings(max_examples=100, deadline=None)
def test_verdicts_are_symmetric_under_swapping_the_arms(table: tuple[int, int, int]) -> None:
    """With the corrections too."""
    n10, n01, n = table
    interval = drop_interval(n10, n01, n)
    assert drop_interval(n01, n10, n) == ConfidenceInterval(-interval.upper, -interval.lower)
    assert interval.lower <= (n10 - n01) / n <= interval.upper


@pytest.mark.parametrize("n", [50, 64, 100, 200, 433, 1000])
@pytest.mark.parametrize("margin", [0.01, 0.02, 0.05, 0.10])
@pytest.mark.parametrize("rate_per_margin", [1.2, 2.0, 3.0])
def test_the_exact_type_one_error_stays_near_five_percent(
    n: int, margin: float, rate_per_margin: float
) -> None:
    """The same without noise: power at a drop of exactly the margin, from 50 prompts on."""
    assert power(n, rate_per_margin * margin, margin, drop=margin) <= 0.055


@pytest.mark.parametrize(
    ("n", "margin"), [(54, 0.05), (133, 0.02), (200, 0.03), (271, 0.01), (1000, 0.01)]
)
@pytest.mark.parametrize("rate_per_margin", [1.0, 1.02, 1.1])
def test_a_model_that_only_loses_passes_at_most_five_percent(
    n: int, margin: float, rate_per_margin: float
) -> None:
    """Discordant rate at the margin: n10 is binomial there, where the score test alone passes up
    to 6.8 %.
    """
    assert power(n, rate_per_margin * margin, margin, drop=margin) <= 0.055


def test_without_the_exact_interval_the_level_would_be_exceeded() -> None:
    """The spoiled version: of 133 prompts at a margin of 2 points, no loss at all passes Tango's
    interval.
    """
    n, margin = 133, 0.02
    assert tango_interval(0, 0, n, 0.90).upper < margin
    assert (1 - margin) ** n > 0.065  # how often a model at the margin loses none
    assert judge(drop_interval(0, 0, n), margin) == "inconclusive"


@pytest.mark.parametrize(("count", "n"), [(0, 44), (1, 44), (3, 200), (40, 200), (200, 200)])
def test_where_one_arm_never_wins_the_interval_holds_the_exact_one(count: int, n: int) -> None:
    """Clopper and Pearson's interval, as scipy computes it, is inside; and it is the wider end
    that is taken.
    """
    exact = binomtest(count, n).proportion_ci(0.90, method="exact")
    score = tango_interval(count, 0, n, 0.90)
    interval = drop_interval(count, 0, n, 0.90)
    assert interval.upper == pytest.approx(max(exact.high, score.upper), abs=1e-9)
    assert interval.lower <= min(exact.low, score.lower) + 1e-9
    assert drop_interval(0, count, n, 0.90) == pytest.approx((-interval.upper, -interval.lower))


def test_where_both_arms_win_the_interval_is_tangos() -> None:
    """The exact interval has nothing to say there."""
    assert drop_interval(9, 3, 32, 0.95) == tango_interval(9, 3, 32, 0.95)


@pytest.mark.parametrize(
    ("n", "rate", "margin", "drop"),
    [
        (60, 0.10, 0.10, 0.0),
        (200, 0.10, 0.05, 0.0),
        (300, 0.15, 0.05, 0.01),
        (800, 0.05, 0.02, 0.0),
    ],
)
def test_power_agrees_with_simulation(n: int, rate: float, margin: float, drop: float) -> None:
    """Within 2 points; the simulation's standard error is at most 0.35 points."""
    assert power(n, rate, margin, drop=drop) == pytest.approx(
        simulate(n, rate, margin, drop), abs=0.02
    )


def test_power_without_disagreement_is_all_or_nothing() -> None:
    """Only one table can occur, so the answer is the verdict on it."""
    assert power(200, 0.0, 0.05) == pytest.approx(1.0)
    assert power(20, 0.0, 0.05) == 0.0


@pytest.mark.parametrize(
    ("margin", "target", "textbook"),
    [(0.05, 0.8, 248), (0.05, 0.9, 343), (0.02, 0.8, 1546), (0.01, 0.8, 6183)],
)
def test_required_n_is_near_the_textbook_formula(
    margin: float, target: float, textbook: int
) -> None:
    """(z_level + z_power)² rate / margin² ignores discreteness and the score variance: allow 8 %
    more.
    """
    n = required_n(0.10, margin, target_power=target)
    assert textbook <= n <= 1.08 * textbook
    assert power(n, 0.10, margin) >= target > power(n - 1, 0.10, margin)


def test_the_smallest_detectable_drop_is_the_inverse_of_required_n() -> None:
    """The prompts that a margin needs detect that margin and no smaller one."""
    n = required_n(0.10, 0.05)
    assert smallest_detectable_drop(n, 0.10) == pytest.approx(0.05, abs=0.002)
    assert smallest_detectable_drop(1, 0.10) > 0.7


def test_thirty_prompts_never_gate_two_points() -> None:
    """The size of AIME: a lossless model passes as rarely as a bad one would."""
    assert power(30, 0.10, 0.02) < 0.06


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 20), (1, 29), (15, 148), (148, 148)]
)
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_matches_scipy(successes: int, n: int, confidence: float) -> None:
    """Both evaluate one closed form; they differ by rounding."""
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )


def test_wilson_gives_newcombes_published_interval() -> None:
    """Newcombe 1998, 15 of 148."""
    assert tuple(round(end, 4) for end in wilson_interval(15, 148)) == (0.0624, 0.1605)


@pytest.mark.parametrize("probability", [0.75, 0.9, 0.95, 0.975, 0.9995])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31, 200, 1000, 1001, 50_000])
def test_students_quantile_matches_scipy(probability: float, freedom: int) -> None:
    """Exact sums up to 1000; above, the dropped term is (5z⁵ + 16z³ + 3z) / 96f², below 3e-5 at f
    = 1001.
    """
    expected = float(student.ppf(probability, freedom))
    tolerance = 1e-9 if freedom <= 1000 else 3e-5
    assert student_quantile(2 * probability - 1, freedom) == pytest.approx(expected, rel=tolerance)


def test_the_largest_confidence_has_quantiles() -> None:
    """Half of what is above it is less than a float can tell from 1."""
    confidence = math.nextafter(1, 0)
    assert normal_quantile(confidence) == pytest.approx(norm.isf((1 - confidence) / 2))
    assert math.isfinite(student_quantile(confidence, 2000))


def test_the_restricted_mean_counts_truncated_runs_at_the_cap() -> None:
    """A run beyond the budget costs the budget, and is not left out."""
    mean = restrict_lengths([100, 300, 900], budget=512).mean()
    assert mean == pytest.approx((100 + 300 + 512) / 3)
    mean = restrict_lengths([[0, 10], [20, 1000]], budget=30).mean()
    assert mean == pytest.approx((5 + 25) / 2)


def test_the_length_ratio_uses_the_pairing() -> None:
    """Lengths that differ by 10 % prompt by prompt give a tight interval though the prompts vary a
    lot.
    """
    dense = np.array([100.0, 250, 400, 90, 310, 220])
    estimate = length_ratio(dense, 1.1 * dense, budget=10_000)
    assert estimate == pytest.approx((1.1, 1.1, 1.1), rel=1e-9)
    shuffled = length_ratio(dense, 1.1 * dense[::-1], budget=10_000)
    assert shuffled.lower < 0.8 < 1.5 < shuffled.upper


def test_the_length_interval_follows_the_delta_method() -> None:
    """Written out with variances and the covariance, as a textbook has it."""
    generator = np.random.default_rng(3)
    dense = generator.gamma(4, 50, size=40)
    pruned = dense * generator.uniform(0.8, 1.5, size=40)
    x, y = np.minimum(dense, 300), np.minimum(pruned, 300)
    (vx, cxy), (_, vy) = np.cov(x, y)
    variance = (vy / y.mean() ** 2 + vx / x.mean() ** 2 - 2 * cxy / (x.mean() * y.mean())) / 40
    half = student.ppf(0.95, 39) * math.sqrt(variance)
    center = math.log(y.mean() / x.mean())
    expected = (math.exp(center), math.exp(center - half), math.exp(center + half))
    assert length_ratio(dense, pruned, 300) == pytest.approx(expected, rel=1e-9)


def test_identical_lengths_give_a_degenerate_interval() -> None:
    """Nothing differs, so the ratio is certain."""
    assert length_ratio([5, 70, 9], [5, 70, 9], budget=50) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("dense", "pruned", "ratio"),
    [([100], [120], 1.2), ([0, 0], [0, 0], 1.0), ([0, 0], [5, 6], math.inf), ([5, 6], [0, 0], 0.0)],
)
def test_lengths_that_prove_nothing_give_an_unbounded_interval(
    dense: list[int], pruned: list[int], ratio: float
) -> None:
    """One prompt, or an arm that never thinks, passes no limit."""
    estimate = length_ratio(dense, pruned, budget=512)
    assert estimate == pytest.approx((ratio, 0.0, math.inf))
    assert judge(estimate, 1.2) == "inconclusive"


def test_the_length_gate_keeps_its_level_at_thirty_prompts() -> None:
    """A model at the limit passes at most 6.2 % of the time: nominal 5 %, 4000 draws ± 0.35
    points.
    """
    generator = np.random.default_rng(11)
    dense = generator.gamma(6, 30, size=(4000, 30))
    pruned = dense * 1.2 * generator.lognormal(-0.02, 0.2, size=(4000, 30))
    below = [length_ratio(d, p, 1e9).upper < 1.2 for d, p in zip(dense, pruned, strict=True)]
    assert np.mean(below) <= 0.062


@pytest.mark.parametrize(
    "call",
    [
        lambda: length_ratio([1, 2], [1], 10),
        lambda: power(2_000_000, 0.1, 0.05),
    ],
)
def test_other_prompts_and_too_many_are_refused(call: Callable[[], object]) -> None:
    """A ValueError with the numbers, never a figure."""
    with pytest.raises(ValueError, match=r"not the same prompts|up to 1000000"):
        call()
