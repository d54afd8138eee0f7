"""Confidence intervals, and verdicts on a limit by two one-sided tests.

Source: D. J. Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15 (1987) 657-680.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from racdeploy.results.checks import VerdictName

_SEVERITY: tuple[VerdictName, ...] = ("pass", "inconclusive", "fail")


class ConfidenceInterval(NamedTuple):
    """Two-sided confidence interval."""

    lower: float
    upper: float


class RatioEstimate(NamedTuple):
    """Ratio of means with its two-sided interval."""

    ratio: float
    lower: float
    upper: float


def judge(estimate: ConfidenceInterval | RatioEstimate, limit: float) -> VerdictName:
    """Return "pass" if the interval is below ``limit``, "fail" if above, else "inconclusive"."""
    if estimate.upper < limit:
        return "pass"
    return "fail" if estimate.lower > limit else "inconclusive"


def judge_within(
    estimate: ConfidenceInterval | RatioEstimate, lowest: float, highest: float
) -> VerdictName:
    """Return "pass" if the interval is within both limits, "fail" if outside of them."""
    if lowest < estimate.lower and estimate.upper < highest:
        return "pass"

    outside = estimate.lower > highest or estimate.upper < lowest
    return "fail" if outside else "inconclusive"


def worst(verdicts: Iterable[str]) -> VerdictName:
    """Return the worst verdict: "fail" before "inconclusive" before "pass"."""
    return _SEVERITY[max(map(_SEVERITY.index, verdicts), default=0)]
