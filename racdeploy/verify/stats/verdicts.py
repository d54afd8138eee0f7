"""Intervals, and what one says about a limit.

Source: D. J. Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15 (1987) 657-680.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from racdeploy.results.checks import Verdict

_SEVERITY: tuple[Verdict, ...] = ("pass", "inconclusive", "fail")


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    lower: float
    upper: float


class RatioEstimate(NamedTuple):
    """A ratio of means with its two-sided interval."""

    ratio: float
    lower: float
    upper: float


def judge(estimate: Interval | RatioEstimate, limit: float) -> Verdict:
    """Return "pass" if the interval is below ``limit``, "fail" if above, else "inconclusive"."""
    if not math.isfinite(limit):
        raise ValueError(f"the limit is {limit}; a limit that is not a number gates nothing")
    if estimate.upper < limit:
        return "pass"
    return "fail" if estimate.lower > limit else "inconclusive"


def judge_within(estimate: Interval | RatioEstimate, lowest: float, highest: float) -> Verdict:
    """Return "pass" if the interval is in the limits, "fail" if outside, else "inconclusive"."""
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
        raise ValueError(f"the limits are {lowest} and {highest}; the first is below the second")
    if lowest < estimate.lower and estimate.upper < highest:
        return "pass"

    outside = estimate.lower > highest or estimate.upper < lowest
    return "fail" if outside else "inconclusive"


def worst(verdicts: Iterable[str]) -> Verdict:
    """Return "fail" if one failed, else "inconclusive" if one is, else "pass"."""
    return _SEVERITY[max(map(_SEVERITY.index, verdicts), default=0)]
