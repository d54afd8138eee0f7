"""Thinking lengths: the ratio of restricted means E[min(T, budget)] by prompt, and its power."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from racdeploy.verify.stats.distributions import check_confidence, student_quantile
from racdeploy.verify.stats.verdicts import RatioEstimate

_LARGEST_EXPONENT = 700.0  # e to this is still a float64


def restrict_lengths(lengths: ArrayLike, budget: float) -> NDArray[np.float64]:
    """Return min(length, budget) by prompt, averaged over its samples.

    A truncated run belongs in ``lengths`` (lengths_N, or lengths_NX with X samples of each prompt)
    with the tokens it reached: leaving it out would reward a model for never stopping.
    """
    raw = np.asarray(lengths, dtype=np.float64)
    if raw.ndim not in (1, 2) or raw.size == 0:
        raise ValueError(
            f"lengths are one number, or one row of samples, per prompt; got shape {raw.shape}"
        )

    if not np.isfinite(raw).all() or (raw < 0).any():
        raise ValueError("a length is negative or not finite")
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"the budget is {budget}; it is a number of tokens above 0")

    restricted = np.minimum(raw, budget)
    return restricted if raw.ndim == 1 else restricted.mean(axis=1)


def length_ratio(
    dense_lengths: ArrayLike, pruned_lengths: ArrayLike, budget: float, confidence: float = 0.90
) -> RatioEstimate:
    """Return the ratio of restricted mean lengths, pruned over dense, over the same prompts.

    By the delta method, log(mean y / mean x) has the variance var(y / mean y - x / mean x) / n,
    paired covariance included. One prompt or a zero mean gives an interval up to infinity.
    """
    dense_N = restrict_lengths(dense_lengths, budget)
    pruned_N = restrict_lengths(pruned_lengths, budget)
    if dense_N.shape != pruned_N.shape:
        raise ValueError(
            f"{len(dense_N)} dense and {len(pruned_N)} pruned lengths: not the same prompts"
        )

    check_confidence(confidence)
    n = len(dense_N)

    dense_mean = float(dense_N.mean())
    pruned_mean = float(pruned_N.mean())
    if dense_mean == pruned_mean == 0:
        return RatioEstimate(1.0, 0.0, math.inf, n)

    ratio = pruned_mean / dense_mean if dense_mean else math.inf
    if n == 1 or dense_mean == 0 or pruned_mean == 0:
        return RatioEstimate(ratio, 0.0, math.inf, n)

    quantile = student_quantile((1 + confidence) / 2, n - 1)
    deviation = _deviation(dense_N, pruned_N)
    half = quantile * (deviation / math.sqrt(n))
    factor = math.exp(half) if half < _LARGEST_EXPONENT else math.inf

    return RatioEstimate(ratio, ratio / factor, ratio * factor, n)


def length_deviation(dense_lengths: ArrayLike, pruned_lengths: ArrayLike, budget: float) -> float:
    """Return the deviation by prompt that decides the width of :func:`length_ratio`'s interval."""
    dense_N = restrict_lengths(dense_lengths, budget)
    return _deviation(dense_N, restrict_lengths(pruned_lengths, budget))


def length_power(
    n: int, deviation: float, limit: float, confidence: float = 0.90, ratio: float = 1.0
) -> float:
    """Return the probability that a true ``ratio`` passes its limit, in normal approximation."""
    check_confidence(confidence)
    if n < 2 or limit <= 0 or ratio <= 0 or deviation < 0:
        raise ValueError(
            f"no power for n = {n}, deviation {deviation}, limit {limit}, ratio {ratio}"
        )

    room = math.log(limit / ratio)
    if deviation == 0:
        return 1.0 if room > 0 else 0.0

    needed = student_quantile((1 + confidence) / 2, n - 1)
    return NormalDist().cdf(room * math.sqrt(n) / deviation - needed)


def smallest_detectable_ratio(
    n: int, deviation: float, confidence: float = 0.90, target_power: float = 0.8
) -> float:
    """Return the smallest limit that a model of unchanged length passes with ``target_power``."""
    if n < 2 or not 0 < target_power < 1:
        raise ValueError(f"no ratio for n = {n} and target_power {target_power}")
    quantile = student_quantile((1 + confidence) / 2, n - 1)
    needed = quantile + NormalDist().inv_cdf(target_power)
    return math.exp(needed * deviation / math.sqrt(n))


def _deviation(dense_N: NDArray[np.float64], pruned_N: NDArray[np.float64]) -> float:
    difference_N = pruned_N / pruned_N.mean() - dense_N / dense_N.mean()
    return float(difference_N.std(ddof=1))
