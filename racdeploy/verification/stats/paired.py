"""Paired accuracy drop d = (n10 - n01) / n, its interval, its verdicts and their power.

n10 counts the prompts that only the first (dense) arm answers right, n01 those that only the second
does.

Tango's score test alone passes up to 6.8 % at the margin if one arm never wins (n10 is then
binomial), so :func:`drop_interval` also takes the exact binomial interval of the other count. It
fails up to 7.5 %, so the end between no drop and the observed one has a continuity correction of
half a prompt.

Several samples of a prompt are not independent prompts: :func:`paired_counts` applies Rao and
Scott's correction to its net differences, made safe by adding one prompt that flips completely.

Sources: T. Tango, Statistics in Medicine 17 (1998) 891-908; F. Yates, Supplement to JRSS 1 (1934)
217-235, the correction; J. N. K. Rao and A. J. Scott, Biometrics 48 (1992) 577-585; E. B. Wilson,
JASA 22 (1927) 209-212.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from racdeploy.verification.stats import distributions
from racdeploy.verification.stats.distributions import (
    Floats,
    bisect,
    last_accepted,
    normal_quantile,
)
from racdeploy.verification.stats.verdicts import ConfidenceInterval

MAX_PROMPTS = 1_000_000
"""Maximum number of prompts for :func:`power`."""
Counts = float | Floats | NDArray[np.int64]
_CONTINUITY = 0.5  # prompts
_TARGET_POWER = 0.8
_PROMPT_COUNTS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 800, 1000, 1500, 2000)
"""Numbers of prompts to recommend."""
_MARGIN_STEPS = 20  # halvings, for a margin to one millionth


class PairedCounts(NamedTuple):
    """Disagreements of two arms, in prompts; not whole numbers with several samples a prompt.

    Args:
        n10: only the first (dense) arm is right.
        n01: only the second arm is right.
        n: prompts.
    """

    n10: float
    n01: float
    n: float

    @property
    def drop(self) -> float:
        """Accuracy drop from the first arm to the second, as a fraction."""
        return (self.n10 - self.n01) / self.n


def paired_counts(first_right: ArrayLike, second_right: ArrayLike) -> PairedCounts:
    """Count the disagreements of two arms.

    Args:
        first_right, second_right: right_N of 0 or 1, or right_NX with X samples in any order.
    """
    first_N = _mean_right(first_right)
    second_N = _mean_right(second_right)
    if first_N.shape != second_N.shape:
        raise ValueError(f"{len(first_N)} and {len(second_N)} prompts: not the same ones")

    net_N = first_N - second_N
    more = float(np.maximum(net_N, 0).sum())
    fewer = float(np.maximum(-net_N, 0).sum())
    squares = float((net_N**2).sum())

    # Mean size of a difference, with one whole flip added. With one sample it is exactly 1, so that
    # counts stay whole numbers.
    scale = (squares + 1) / (more + fewer + 1)

    return PairedCounts(more / scale, fewer / scale, len(net_N) / scale)


def tango_interval(
    n10: float, n01: float, n: float, confidence: float = 0.95, continuity: float = 0.0
) -> ConfidenceInterval:
    """Return Tango's score interval: all drops that the score test does not reject.

    Args:
        continuity: flips by which the observed difference is reduced (Yates's correction).
    """
    quantile = normal_quantile(confidence)

    # Swapping the arms changes the drop's sign, so only the upper bound has to be solved for.
    lower = -_upper_bound(n01, n10, n, quantile=quantile, continuity=continuity)
    upper = _upper_bound(n10, n01, n, quantile=quantile, continuity=continuity)
    return ConfidenceInterval(lower, upper)


def drop_interval(n10: float, n01: float, n: float, confidence: float = 0.90) -> ConfidenceInterval:
    """Return the interval of the paired drop that verdicts are based on."""
    lower, upper = tango_interval(n10, n01, n, confidence)
    # The correction keeps false alarms near 5 %; it must not move an end beyond "no drop".
    if lower > 0:
        corrected = tango_interval(n10, n01, n, confidence, continuity=_CONTINUITY)
        lower = max(corrected.lower, 0.0)
    if upper < 0:
        corrected = tango_interval(n10, n01, n, confidence, continuity=_CONTINUITY)
        upper = min(corrected.upper, 0.0)

    # If one arm never wins, the other count is binomial: its exact interval is safe as well.
    tail = (1 - confidence) / 2
    if n01 == 0:
        lower = min(lower, distributions.clopper_pearson_lower(n10, n, tail))
        upper = max(upper, distributions.clopper_pearson_upper(n10, n, tail))
    if n10 == 0:
        lower = min(lower, -distributions.clopper_pearson_upper(n01, n, tail))
        upper = max(upper, -distributions.clopper_pearson_lower(n01, n, tail))

    return ConfidenceInterval(lower, upper)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> ConfidenceInterval:
    """Return Wilson's score interval of a single accuracy."""
    quantile = normal_quantile(confidence)
    spread = quantile**2 / n

    share = successes / n
    variance = share * (1 - share)
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (variance + spread / 4)) / (1 + spread)

    lower = 0.0 if successes == 0 else max(0.0, center - half)
    upper = 1.0 if successes == n else min(1.0, center + half)

    return ConfidenceInterval(lower, upper)


def power(
    n: int, discordant_rate: float, margin: float, confidence: float = 0.90, drop: float = 0.0
) -> float:
    """Return the exact probability that :func:`drop_interval` is below the margin.

    Args:
        discordant_rate: share of prompts on which the arms disagree.
        drop: true drop, at most ``discordant_rate`` in size; at ``margin`` the result is the type-I
            error.
    """
    if n > MAX_PROMPTS:
        raise ValueError(f"n is {n}; power is computed up to {MAX_PROMPTS} prompts")

    quantile = normal_quantile(confidence)
    tail = (1 - confidence) / 2
    n10_rate = (discordant_rate + drop) / 2
    n01_rate = (discordant_rate - drop) / 2
    n10_L = distributions.likely_counts(n, n10_rate)
    n10_mass_L = distributions.binomial_pmf(n10_L, n, n10_rate)
    # Where only the dense model wins, the exact binomial test has to pass too; see drop_interval.
    is_lenient_L = distributions.binomial_cdf(n10_L, n, margin) >= tail

    total = 0.0
    rows = zip(n10_L.tolist(), n10_mass_L, is_lenient_L, strict=True)
    for n10, mass, is_lenient in rows:
        rest = n - n10
        rest_rate = n01_rate / (1 - n10_rate)
        n01_L = distributions.likely_counts(rest, rest_rate)
        passes_L = tango_score(n10, n01_L, n, margin) < -quantile
        passes_L &= (n01_L > 0) | (not is_lenient)
        n01_mass_L = distributions.binomial_pmf(n01_L, rest, rest_rate)
        total += mass * n01_mass_L[passes_L].sum()

    return float(min(total, 1.0))


@cache
def find_min_prompts(discordant_rate: float, margin: float, confidence: float) -> int | None:
    """Return the fewest prompts with which an equally good model passes with 80 % probability.

    None stands for more than 2,000.
    """
    for prompts in _PROMPT_COUNTS:
        if power(prompts, discordant_rate, margin, confidence) >= _TARGET_POWER:
            return prompts
    return None


def smallest_detectable_drop(
    n: int, discordant_rate: float, confidence: float = 0.90, target_power: float = _TARGET_POWER
) -> float:
    """Return the smallest margin that a model without a drop passes with ``target_power``."""
    return bisect(
        lambda margin: power(n, discordant_rate, margin, confidence) < target_power,
        0.0,
        1.0,
        _MARGIN_STEPS,
    )


def tango_score(
    n10: Counts, n01: Counts, n: Counts, drop: float | Floats, continuity: float = 0.0
) -> Floats:
    """Return Tango's score of a hypothetical drop: its difference in standard deviations.

    Args:
        n10, n01, n, drop: broadcast against each other.
        continuity: flips by which the difference is reduced.
    """
    # The most likely p01 under the hypothesis is the larger root of 2n p² + b p + c = 0, written
    # so that no digits cancel.
    b = -n10 - n01 + (2 * n - n10 + n01) * drop
    c = -n01 * drop * (1 - drop)

    root = np.sqrt(np.maximum(b * b - 8 * n * c, 0.0))

    divisor = np.where(b > 0, root + b, 1.0)
    larger = (root - b) / (4 * n)
    p01 = np.where(b > 0, -2 * c / divisor, larger)

    variance_each = 2 * p01 + drop * (1 - drop)
    variance = n * np.maximum(variance_each, 0.0)

    difference = n10 - n01 - n * drop
    corrected = np.maximum(np.abs(difference) - continuity, 0.0)
    difference = np.copysign(corrected, difference)

    # Without variance, any difference rejects the hypothesis: its score is infinite.
    limit_score = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    varies = variance > 0
    deviation = np.sqrt(np.where(varies, variance, 1.0))

    return np.where(varies, difference / deviation, limit_score)


@cache  # a report judges the same counts in several places, a simulation in many
def _upper_bound(n10: float, n01: float, n: float, *, quantile: float, continuity: float) -> float:
    """Return the largest drop that the score test accepts; the score falls with the drop."""
    observed = (n10 - n01) / n
    if observed == 1.0:
        return 1.0

    def is_accepted(drop_P: Floats) -> NDArray[np.bool_]:
        return ~(tango_score(n10, n01, n, drop_P, continuity=continuity) < -quantile)

    return last_accepted(is_accepted, observed, 1.0)


def _mean_right(right: ArrayLike) -> Floats:
    """Return the share of right samples by prompt."""
    raw = np.asarray(right, dtype=np.float64)
    return raw if raw.ndim == 1 else raw.mean(axis=1)
