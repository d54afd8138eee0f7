"""Interim analyses: after how many prompts a comparison is judged, and with what confidence.

A comparison that is judged several times, and ends at the first clear verdict, would err more often
than one that is judged once. So each analysis gets a part of the permitted error, by Lan and
DeMets's spending function of the O'Brien-Fleming kind: little at first, almost all at the end.

Its intervals are Jennison and Turnbull's repeated confidence intervals. Together they err at most
with the whole permitted error, whatever the reason to stop or not to stop: one check may wait for
another, and a comparison that looks hopeless may be ended or continued.

Sources: K. K. G. Lan and D. L. DeMets, Biometrika 70 (1983) 659-663; P. C. O'Brien and T. R.
Fleming, Biometrics 35 (1979) 549-556; C. Jennison and B. W. Turnbull, JRSS B 51 (1989) 305-361;
P. Armitage, C. K. McPherson and B. C. Rowe, JRSS A 132 (1969) 235-244, the recursion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from racdeploy.verification.stats.distributions import Floats, bisect

FIRST_ANALYSIS = 64
"""Prompts of the first interim analysis; each further one has twice as many."""
# Simulated, equally good models with 200 prompts are asked 191 on average, and pass 7 points more
# rarely than with one analysis; with 1,000 they are asked 598, and pass as often
# (benchmarks/RESULTS.md, "Interim analyses").
MIN_PROMPTS = 1000
"""Fewer prompts are judged once."""
_LAST_INTERIM = 0.8  # of all prompts: a later analysis would save less than a fifth
_DESIGNED_SHARE = 0.8  # of the permitted error is spent: the normal approximation is not exact
_MIN_SPENT = 1e-5  # at each analysis: a broken model fails at the first, 1 - error keeps its digits
_GRID_POINTS = 801
_GRID_SIGMAS = 8.0  # a normal's mass outside is below 1e-15

Spending = Callable[[float, float], float]
"""Error spent at a share of all prompts, of a total error."""


class Analysis(NamedTuple):
    """One analysis of a comparison.

    Args:
        prompts: prompts that are answered until then.
        confidence: of its two-sided intervals.
    """

    prompts: int
    confidence: float


def spend_like_obrien_fleming(share: float, error: float) -> float:
    """Return the error spent at a share of the prompts: little before the end."""
    quantile = -NormalDist().inv_cdf(error / 2)
    return _two_sided_tail(quantile / math.sqrt(share))


def plan_analyses(prompts: int, confidence: float) -> tuple[Analysis, ...]:
    """Return the analyses of a comparison; fewer than 1,000 prompts have one.

    Args:
        prompts: the greatest number of prompts.
        confidence: of two-sided intervals that are judged by one end, as 0.90 for an error of 5 %.
    """
    if prompts < MIN_PROMPTS:
        return (Analysis(prompts, confidence),)
    return share_error(list_counts(prompts), confidence)


def share_error(
    counts: Sequence[int], confidence: float, spend: Spending = spend_like_obrien_fleming
) -> tuple[Analysis, ...]:
    """Share the permitted error among analyses.

    Args:
        counts: prompts at each analysis, rising.
        confidence: as for :func:`plan_analyses`.
        spend: spending function.
    """
    error = _DESIGNED_SHARE * (1 - confidence) / 2
    shares = [count / counts[-1] for count in counts]
    spent = []
    for number, share in enumerate(shares, start=1):
        spent.append(max(spend(share, error), number * _MIN_SPENT))
    levels = find_levels(shares, spent)

    return tuple(
        Analysis(count, 1 - 2 * level) for count, level in zip(counts, levels, strict=True)
    )


def list_counts(prompts: int) -> list[int]:
    """Return the numbers of prompts at which a comparison is judged."""
    counts = []
    count = FIRST_ANALYSIS
    while count <= _LAST_INTERIM * prompts:
        counts.append(count)
        count *= 2
    return [*counts, prompts]


def find_levels(shares: Sequence[float], spent: Sequence[float]) -> list[float]:
    """Return the one-sided error of each analysis by itself.

    A mean of zero, in standard errors, is normal at each analysis; its sum has independent
    increments. The level of an analysis makes the probability that it is the first to err equal to
    what is spent there.

    Args:
        shares: of all prompts, rising to 1.
        spent: error spent until each analysis.
    """
    levels: list[float] = []
    sum_G, mass_G = np.zeros(1), np.ones(1)  # the sum before the first prompt
    share_before = spent_before = 0.0
    for share, spent_now in zip(shares, spent, strict=True):
        deviation = math.sqrt(share - share_before)
        bound = _find_bound(sum_G, mass_G, deviation=deviation, error=spent_now - spent_before)
        levels.append(_two_sided_tail(bound / math.sqrt(share)) / 2)

        sum_G, mass_G = _continue_below(bound, share, sum_G, mass_G, deviation=deviation)
        share_before = share
        spent_before = spent_now
    return levels


def _find_bound(sum_G: Floats, mass_G: Floats, *, deviation: float, error: float) -> float:
    """Return what the next sum exceeds with a probability of ``error``."""

    def is_below(bound: float) -> bool:
        return bool(mass_G @ _upper_tail((bound - sum_G) / deviation) > error)

    return bisect(is_below, -_GRID_SIGMAS, _GRID_SIGMAS)


def _continue_below(
    bound: float, share: float, sum_G: Floats, mass_G: Floats, *, deviation: float
) -> tuple[Floats, Floats]:
    """Return the next sums below the bound, with their masses, by the trapezoidal rule."""
    next_H = np.linspace(-_GRID_SIGMAS * math.sqrt(share), bound, _GRID_POINTS)
    step = next_H[1] - next_H[0]

    scores_HG = (next_H[:, None] - sum_G) / deviation
    scale = deviation * math.sqrt(2 * math.pi)
    density_HG = np.exp(-(scores_HG**2) / 2) / scale
    mass_H = step * (density_HG @ mass_G)
    mass_H[[0, -1]] /= 2
    return next_H, mass_H


def _two_sided_tail(score: float) -> float:
    return math.erfc(score / math.sqrt(2))


def _upper_tail(scores_G: Floats) -> Floats:
    return np.array([math.erfc(score / math.sqrt(2)) / 2 for score in scores_G.tolist()])
