"""Paired statistics of a comparison between a dense and a pruned model over the same prompts.

Accuracy: the drop d = (n10 - n01) / n, with n10 prompts that only the dense model answers and n01 that only
the pruned one does, judged by non-inferiority. Length: the ratio of restricted means E[min(T, budget)].
Power: how many prompts a verdict needs. Knows nothing of models, prompts or files.

Level: every ``confidence`` is that of a two-sided interval, and a gate looks at one end only. **A two-sided
90 % interval gives a one-sided 5 % test**: in general the gate's level is (1 - confidence) / 2. Counts are
whole, so it is met approximately: at most 5.9 % from 50 prompts on, 6.0 % in the worst table found below.

Sources: T. Tango, Statistics in Medicine 17 (1998) 891-908, for the paired drop; E. B. Wilson, JASA 22 (1927)
209-212; Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7, for Student's quantile.
"""

from __future__ import annotations

import math
from numbers import Integral
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from racdeploy.report_model import Verdict

__all__ = [
    "Interval",
    "RatioEstimate",
    "judge",
    "length_ratio",
    "non_inferiority",
    "power",
    "required_n",
    "restricted_mean_lengths",
    "smallest_detectable_drop",
    "tango_interval",
    "wilson_interval",
]

_BISECTIONS = 60  # 2 · 2⁻⁶⁰ is below the spacing of floats near 1
_TAIL_SIGMAS = 8.5  # a binomial's mass outside is below 1e-15
_LARGEST_N = 1_000_000


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    lower: float
    upper: float


class RatioEstimate(NamedTuple):
    """A ratio of means over ``n`` prompts with its two-sided interval."""

    ratio: float
    lower: float
    upper: float
    n: int


def tango_interval(n10: int, n01: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the score interval of the paired drop (n10 - n01) / n.

    The interval holds every drop that Tango's score test does not reject. It exists for any table, also
    without discordant prompts.

    Args:
        n10: prompts with a right answer from the dense model only.
        n01: prompts with a right answer from the pruned model only.
        n: all prompts, at least 1.
        confidence: of the two-sided interval, in (0, 1).

    Raises:
        ValueError: the counts do not fit together.
    """
    _check_counts(n10, n01, n)
    quantile = _normal_quantile(confidence)
    # Swapping the arms turns the drop round, so one end is enough to solve for.
    return Interval(-_upper_bound(n01, n10, n, quantile), _upper_bound(n10, n01, n, quantile))


def non_inferiority(n10: int, n01: int, n: int, margin: float, confidence: float = 0.90) -> Verdict:
    """Judge whether the accuracy drop stays below ``margin``.

    Args:
        n10: prompts with a right answer from the dense model only.
        n01: prompts with a right answer from the pruned model only.
        n: all prompts, at least 1.
        margin: largest acceptable drop as a fraction, in [0, 1).
        confidence: of the two-sided interval; 0.90 makes "pass" a one-sided 5 % test.

    Returns:
        "pass" if the whole interval lies below the margin, "fail" if it lies above, else "inconclusive".
    """
    _check_margin(margin)
    return judge(tango_interval(n10, n01, n, confidence), margin)


def judge(estimate: Interval | RatioEstimate, limit: float) -> Verdict:
    """Return "pass" if the interval lies below ``limit``, "fail" if it lies above, else "inconclusive".

    The same rule for a drop with its margin and for a length ratio with its limit.
    """
    if not math.isfinite(limit):
        raise ValueError(f"the limit is {limit}; a limit that is not a number gates nothing")
    if estimate.upper < limit:
        return "pass"
    return "fail" if estimate.lower > limit else "inconclusive"


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the score interval of a single accuracy.

    Args:
        successes: right answers, at most ``n``.
        n: prompts, at least 1.
        confidence: of the two-sided interval, in (0, 1).
    """
    _check_counts(successes, 0, n)
    quantile = _normal_quantile(confidence)
    share, spread = successes / n, quantile**2 / n
    center = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    lower = 0.0 if successes == 0 else max(0.0, center - half)
    upper = 1.0 if successes == n else min(1.0, center + half)
    return Interval(lower, upper)


def restricted_mean_lengths(lengths: ArrayLike, budget: float) -> float:
    """Return E[min(T, budget)], the mean thinking length under a cap.

    A truncated run belongs in ``lengths`` with the tokens it reached: it counts as the budget, which is what
    it cost. Leaving it out would reward a model for never stopping.

    Args:
        lengths: lengths_N in tokens, or lengths_NS with S samples of each prompt; zeros allowed.
        budget: the cap in tokens, above 0, the same for every arm.
    """
    return float(_restricted_N(lengths, budget).mean())


def length_ratio(
    dense_lengths: ArrayLike, pruned_lengths: ArrayLike, budget: float, confidence: float = 0.90
) -> RatioEstimate:
    """Return the ratio of restricted mean lengths, pruned over dense, over the same prompts.

    The prompt is the unit: the samples of one prompt are averaged first. With x and y the restricted lengths
    of a prompt, the delta method on log(mean y / mean x) gives the variance var(y / mean y - x / mean x) / n,
    which holds the paired covariance. The interval uses Student's quantile with n - 1 degrees of freedom.

    Identical arms give a ratio of 1 with a degenerate interval. One prompt, or an arm whose mean is zero (the
    logarithm does not exist), gives the interval from 0 to infinity: no limit is passed on such data.

    Args:
        dense_lengths: lengths_N or lengths_NS in tokens, truncated runs included at what they reached.
        pruned_lengths: the same for the pruned model, prompt by prompt.
        budget: the cap in tokens, above 0, the same for both.
        confidence: of the two-sided interval, in (0, 1).
    """
    dense_N, pruned_N = _restricted_N(dense_lengths, budget), _restricted_N(pruned_lengths, budget)
    if dense_N.shape != pruned_N.shape:
        raise ValueError(f"{len(dense_N)} dense and {len(pruned_N)} pruned lengths: not the same prompts")
    _check_confidence(confidence)
    n, dense_mean, pruned_mean = len(dense_N), float(dense_N.mean()), float(pruned_N.mean())
    if dense_mean == 0 or pruned_mean == 0:
        ratio = 1.0 if dense_mean == pruned_mean else math.inf if dense_mean == 0 else 0.0
        return RatioEstimate(ratio, 0.0, math.inf, n)
    ratio = pruned_mean / dense_mean
    if n == 1:
        return RatioEstimate(ratio, 0.0, math.inf, n)
    deviation = float((pruned_N / pruned_mean - dense_N / dense_mean).std(ddof=1)) / math.sqrt(n)
    half = _student_quantile((1 + confidence) / 2, n - 1) * deviation
    factor = math.exp(half) if half < 700 else math.inf
    return RatioEstimate(ratio, ratio / factor, ratio * factor, n)


def power(n: int, discordant_rate: float, margin: float, confidence: float = 0.90, drop: float = 0.0) -> float:
    """Return the probability that :func:`non_inferiority` says "pass".

    Exact: a sum over the tables that can occur, not an approximation. With ``drop`` equal to ``margin`` it is
    the type-I error.

    Args:
        n: prompts, 1 to a million.
        discordant_rate: share of prompts on which the arms disagree, in [0, 1].
        margin: largest acceptable drop, in [0, 1).
        confidence: of the two-sided interval, in (0, 1).
        drop: the true drop; its size is at most ``discordant_rate``.
    """
    _check_counts(0, 0, n)
    _check_margin(margin)
    if n > _LARGEST_N:
        raise ValueError(f"n is {n}; power is computed up to {_LARGEST_N} prompts")
    if not 0 <= discordant_rate <= 1 or not abs(drop) <= discordant_rate:
        raise ValueError(f"a drop of {drop} needs a discordant rate in [{abs(drop)}, 1], not {discordant_rate}")
    quantile = _normal_quantile(confidence)
    share = 0.5 if discordant_rate == 0 else (discordant_rate + drop) / (2 * discordant_rate)
    log_factorials = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    discordant_D = _likely_counts(n, discordant_rate)
    mass_D = _binomial_masses(discordant_D, n, discordant_rate, log_factorials)
    passing_D = _most_passing(discordant_D, n, margin, quantile)
    total = 0.0
    for discordant, mass, passing in zip(discordant_D, mass_D, passing_D, strict=True):
        counts = _likely_counts(int(discordant), share)
        counts = counts[counts <= passing]
        total += mass * _binomial_masses(counts, int(discordant), share, log_factorials).sum()
    return float(min(total, 1.0))


def required_n(
    discordant_rate: float,
    margin: float,
    confidence: float = 0.90,
    drop: float = 0.0,
    target_power: float = 0.8,
) -> int:
    """Return how many prompts make "pass" as likely as ``target_power``.

    Counts are whole, so power climbs in a saw-tooth; this is a crossing of it, and a few prompts more may
    fall a little below.

    Raises:
        ValueError: the drop is not below the margin, or more than a million prompts would be needed.
    """
    if not 0 < target_power < 1:
        raise ValueError(f"target_power is {target_power}; it lies between 0 and 1")
    if not drop < margin:
        raise ValueError(f"a true drop of {drop} is not below the margin of {margin}: no n is enough")
    high = 1
    while power(high, discordant_rate, margin, confidence, drop) < target_power:
        if high == _LARGEST_N:
            raise ValueError(f"more than {_LARGEST_N} prompts would be needed for a margin of {margin}")
        high = min(2 * high, _LARGEST_N)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if power(middle, discordant_rate, margin, confidence, drop) < target_power:
            low = middle
        else:
            high = middle
    return high


def smallest_detectable_drop(
    n: int, discordant_rate: float, confidence: float = 0.90, target_power: float = 0.8
) -> float:
    """Return the smallest margin that a model without any drop passes with ``target_power`` on ``n`` prompts.

    A gate with a smaller margin mostly answers "inconclusive". 1.0 means that no margin is small enough.
    """
    if not 0 < target_power < 1:
        raise ValueError(f"target_power is {target_power}; it lies between 0 and 1")
    low, high = 0.0, 1.0
    for _ in range(20):  # to a millionth
        middle = (low + high) / 2
        if power(n, discordant_rate, middle, confidence) < target_power:
            low = middle
        else:
            high = middle
    return high


def _upper_bound(n10: int, n01: int, n: int, quantile: float) -> float:
    """Bisect for the largest drop that the score test does not reject; the score falls with the drop."""
    low, high = (n10 - n01) / n, 1.0
    if low == high:
        return 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if float(_score(n10, n01, n, middle)) < -quantile:
            high = middle
        else:
            low = middle
    return high


def _score(n10: ArrayLike, n01: ArrayLike, n: int, drop: float) -> NDArray[np.float64]:
    """Return Tango's score statistic for the hypothesis that the true drop is ``drop``.

    Its variance takes the maximum-likelihood p01 under the hypothesis, the larger root of
    2n p² + b p + c = 0, written so that nothing cancels.
    """
    n10, n01 = np.asarray(n10, dtype=np.float64), np.asarray(n01, dtype=np.float64)
    b = -n10 - n01 + (2 * n - n10 + n01) * drop
    c = -n01 * drop * (1 - drop)
    root = np.sqrt(np.maximum(b * b - 8 * n * c, 0.0))
    p01 = np.where(b > 0, -2 * c / np.where(b > 0, root + b, 1.0), (root - b) / (4 * n))
    variance = n * np.maximum(2 * p01 + drop * (1 - drop), 0.0)
    difference = n10 - n01 - n * drop
    # Without variance any difference is infinitely surprising, and none is no surprise.
    surprise = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    return np.where(variance > 0, difference / np.sqrt(np.where(variance > 0, variance, 1.0)), surprise)


def _most_passing(discordant_D: NDArray[np.int64], n: int, margin: float, quantile: float) -> NDArray[np.int64]:
    """Return the largest n10 that passes for each number of discordant prompts; -1 where none does."""
    low_D, high_D = np.full_like(discordant_D, -1), discordant_D + 1
    while np.any(high_D - low_D > 1):
        middle_D = (low_D + high_D) // 2
        passes_D = (_score(middle_D, discordant_D - middle_D, n, margin) < -quantile) | (middle_D < 0)
        low_D, high_D = np.where(passes_D, middle_D, low_D), np.where(passes_D, high_D, middle_D)
    return low_D


def _likely_counts(n: int, rate: float) -> NDArray[np.int64]:
    """Return the counts that hold all but a negligible part of a binomial's mass."""
    reach = _TAIL_SIGMAS * math.sqrt(n * rate * (1 - rate)) + 25  # the constant covers small, skewed cases
    return np.arange(max(0, math.floor(n * rate - reach)), min(n, math.ceil(n * rate + reach)) + 1)


def _binomial_masses(
    counts: NDArray[np.int64], n: int, rate: float, log_factorials: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return P(X = count) for X ~ Binomial(n, rate)."""
    log_rate, log_rest = math.log(max(rate, 1e-300)), math.log(max(1 - rate, 1e-300))
    log_choose = log_factorials[n] - log_factorials[counts] - log_factorials[n - counts]
    masses: NDArray[np.float64] = np.exp(log_choose + counts * log_rate + (n - counts) * log_rest)
    return masses


def _restricted_N(lengths: ArrayLike, budget: float) -> NDArray[np.float64]:
    """Return min(length, budget) by prompt, averaged over its samples."""
    raw = np.asarray(lengths, dtype=np.float64)
    if raw.ndim not in (1, 2) or raw.size == 0:
        raise ValueError(f"lengths are one number, or one row of samples, per prompt; got shape {raw.shape}")
    if not np.isfinite(raw).all() or (raw < 0).any():
        raise ValueError("a length is negative or not finite")
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"the budget is {budget}; it is a number of tokens above 0")
    restricted = np.minimum(raw, budget)
    return restricted if raw.ndim == 1 else restricted.mean(axis=1)


def _normal_quantile(confidence: float) -> float:
    _check_confidence(confidence)
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _student_quantile(probability: float, freedom: int) -> float:
    """Return Student's quantile for a probability of at least one half.

    Bisects the angle of Abramowitz and Stegun 26.7.3 and 26.7.4, whose sums are finite for whole degrees of
    freedom; above 1000 the first term of 26.7.5 is within 1e-6.
    """
    if freedom > 1000:
        normal = NormalDist().inv_cdf(probability)
        return normal + (normal**3 + normal) / (4 * freedom)
    odd, steps = freedom % 2, np.arange(1, freedom // 2)
    factors = (2 * steps - 1 + odd) / (2 * steps + odd)
    low, high = 0.0, math.pi / 2
    for _ in range(_BISECTIONS):
        angle = (low + high) / 2
        series = 1 + np.cumprod(factors * math.cos(angle) ** 2).sum() if freedom > 1 else 0.0
        inside = math.sin(angle) * series
        if odd:
            inside = 2 / math.pi * (angle + math.cos(angle) * inside)
        if inside < 2 * probability - 1:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(high)


def _check_counts(n10: int, n01: int, n: int) -> None:
    if not all(isinstance(count, Integral) for count in (n10, n01, n)):
        raise ValueError(f"counts are whole numbers, not {n10!r}, {n01!r}, {n!r}")
    if n < 1 or n10 < 0 or n01 < 0 or n10 + n01 > n:
        raise ValueError(f"counts {n10} and {n01} do not fit into {n} prompts")


def _check_margin(margin: float) -> None:
    if not 0 <= margin < 1:
        raise ValueError(f"the margin is {margin}; it is a fraction from 0 up to 1, such as 0.02 for 2 points")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is {confidence}; it lies between 0 and 1, such as 0.90")
