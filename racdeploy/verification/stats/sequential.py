"""Sequential test of a mean above zero, valid after every prompt: testing by betting.

A bettor stakes a share of the wealth on each difference. If the mean is not above zero, the
expected wealth never grows, so it reaches 1/ε with a probability of at most ε (Ville's inequality).
Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
arXiv 2010.09686; as in their section 4, the wealth is averaged over several shares.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

_SHARES = np.linspace(0.05, 0.95, 19)
"""Shares of the wealth that are bet; below 1, so that one loss cannot take everything."""


def max_wealth(differences: ArrayLike) -> float:
    """Return the largest wealth that a bettor on a mean above zero reached, starting with 1.

    Args:
        differences: differences_N in the order of observation, each at least -1.
    """
    difference_N = np.asarray(differences, dtype=np.float64)
    # Logarithm of the wealth after every prompt, for each of the X shares.
    log_XN = np.log1p(np.outer(_SHARES, difference_N)).cumsum(axis=1)
    log_N = np.logaddexp.reduce(log_XN, axis=0) - math.log(len(_SHARES))
    return float(np.exp(min(max(0.0, log_N.max()), 700.0)))


def is_above_zero(differences: ArrayLike, error: float) -> bool:
    """Return whether the mean is above zero, with an error probability of at most ``error``."""
    return max_wealth(differences) >= 1 / error
