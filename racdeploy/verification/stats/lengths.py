"""Thinking lengths: the ratio of restricted means E[min(T, budget)] by prompt, and its power."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from racdeploy.verification.stats.distributions import Floats, student_quantile
from racdeploy.verification.stats.means import estimate_ratio, ratio_of_means
from racdeploy.verification.stats.verdicts import RatioEstimate

_TARGET_POWER = 0.8


def restrict_lengths(lengths: ArrayLike, budget: float) -> Floats:
    """Return min(length, budget) for each prompt, averaged over its samples.

    Args:
        lengths: lengths_N, or lengths_NX with X samples of each prompt. Truncated runs belong in
            it: leaving them out would reward a model for never stopping.
        budget: cap in tokens, the same for both models.
    """
    restricted = np.minimum(np.asarray(lengths, dtype=np.float64), budget)
    return restricted if restricted.ndim == 1 else restricted.mean(axis=1)


def length_ratio(
    dense_lengths: ArrayLike, pruned_lengths: ArrayLike, budget: float, confidence: float = 0.90
) -> RatioEstimate:
    """Return the ratio of restricted mean lengths, pruned to dense, over the same prompts."""
    dense_N = restrict_lengths(dense_lengths, budget)
    pruned_N = restrict_lengths(pruned_lengths, budget)
    if dense_N.shape != pruned_N.shape:
        raise ValueError(
            f"{len(dense_N)} dense and {len(pruned_N)} pruned lengths: not the same prompts"
        )

    ratio, influence_N = ratio_of_means(dense_N, pruned_N)
    if not dense_N.any() and not pruned_N.any():
        ratio = 1.0  # neither model thinks
    return estimate_ratio(ratio, influence_N, confidence)


def length_deviation(dense_lengths: ArrayLike, pruned_lengths: ArrayLike, budget: float) -> float:
    """Return the deviation over prompts on which the width of :func:`length_ratio` depends."""
    dense_N = restrict_lengths(dense_lengths, budget)
    _, influence_N = ratio_of_means(dense_N, restrict_lengths(pruned_lengths, budget))
    return float(influence_N.std(ddof=1))


def smallest_detectable_ratio(n: int, deviation: float, confidence: float = 0.90) -> float:
    """Return the smallest limit that a model of unchanged length passes with 80 % probability."""
    needed = student_quantile(confidence, n - 1) + NormalDist().inv_cdf(_TARGET_POWER)
    return math.exp(needed * deviation / math.sqrt(n))
