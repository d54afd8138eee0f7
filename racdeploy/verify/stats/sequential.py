"""Tests that may be looked at after every prompt, however often: betting on a mean above zero.

Where the mean of the differences is not above zero, whoever bets a share of the wealth on each has
no more in expectation than at first: it ever reaches 1/ε with a probability of at most ε (Ville).
Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
arXiv 2010.09686; the shares are averaged over, as in their section 4.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

_SHARES = np.linspace(0.05, 0.95, 19)
"""Of the wealth that is bet; all below 1, so that no loss ruins."""


def wealth(differences: ArrayLike) -> float:
    """Return the most that a bettor on a mean above zero ever had of a first wealth of 1.

    Args:
        differences: differences_N in the order in which they were seen, each at least -1.
    """
    found_N = np.asarray(differences, dtype=np.float64)
    if found_N.ndim != 1 or not np.isfinite(found_N).all() or (found_N < -1).any():
        raise ValueError("differences are one finite number per prompt, none below -1")

    if not found_N.size:
        return 1.0

    # The logarithm of each share's wealth after every prompt; shares X.
    log_XN = np.log1p(np.outer(_SHARES, found_N)).cumsum(axis=1)
    log_N = np.logaddexp.reduce(log_XN, axis=0) - math.log(len(_SHARES))
    return float(np.exp(min(max(0.0, log_N.max()), 700.0)))


def is_above_zero(differences: ArrayLike, error: float) -> bool:
    """Return whether the mean is surely above zero; it errs with that probability at most."""
    if not 0 < error < 1:
        raise ValueError(f"an error of {error} is not between 0 and 1")

    found_N = np.asarray(differences, dtype=np.float64)
    won = np.log1p(_SHARES[-1] * found_N.clip(0)).sum()
    if won < -math.log(error):  # too little even without a loss
        return False
    return wealth(found_N) >= 1 / error
