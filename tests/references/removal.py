"""A slow textbook removal of whole inputs: one least-squares solve for each candidate, float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def remove(
    target_OI: Array, hessian_II: Array, units: Sequence[Sequence[int]], cohorts: int, count: int
) -> tuple[list[int], Array, float]:
    """Return the units that stay, the weights of all inputs, and the loss.

    Of each cohort, the unit whose removal leaves the least loss goes, judged one by one with every
    other weight at its optimum, until so many units are left.
    """
    left = list(range(len(units)))
    size = len(units) // cohorts

    while len(left) > count:
        gone = []
        for cohort in range(cohorts):
            own = [unit for unit in left if unit // size == cohort]
            losses = {}
            for unit in own:
                kept = [u for u in left if u != unit]
                losses[unit] = solve(target_OI, hessian_II, units, kept)[1]
            gone.append(min(own, key=losses.__getitem__))
        left = [unit for unit in left if unit not in gone]

    weight_OI, loss = solve(target_OI, hessian_II, units, left)
    return left, weight_OI, loss


def solve(
    target_OI: Array, hessian_II: Array, units: Sequence[Sequence[int]], kept: Sequence[int]
) -> tuple[Array, float]:
    """Return the best weights on the inputs of some units, and their loss tr(ΔW H ΔWᵀ)."""
    columns = [column for unit in kept for column in units[unit]]
    weight_OI = np.zeros_like(target_OI)
    right_KO = (target_OI @ hessian_II)[:, columns].T
    weight_OI[:, columns] = np.linalg.solve(hessian_II[np.ix_(columns, columns)], right_KO).T

    change_OI = weight_OI - target_OI
    return weight_OI, float(np.trace(change_OI @ hessian_II @ change_OI.T))
