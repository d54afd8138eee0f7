"""What sparse kernels change on a device: which weights they take there, and what these cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from racdeploy.recipe import Zeros, count_zeros
from racdeploy.targets import EngineCosts, FormatCost
from racdeploy.tune.devices.work import Work

PATTERN = "2:4"
"""The pattern with kernels of its own; others are judged as unstructured zeros."""


def keep_known(costs: EngineCosts, work: Work) -> Work:
    """Return the work, of whose sparse weights those are left that the kernels there take."""
    found = {key: count for key, count in work.sparse.items() if find_cost(costs, *key)}
    return replace(work, sparse=found)


def find_cost(costs: EngineCosts, quant: str, zeros: Zeros) -> FormatCost | None:
    """Return what a weight among so many zeros costs the kernels; None where they are not used.

    Costs lie on a line between two shares that were measured. Beyond the largest nothing is gained,
    and below the smallest the engine's own kernels are as fast.
    """
    measured = costs.sparse.get(quant, {})
    if zeros == PATTERN:
        return measured.get(PATTERN)

    share = count_zeros(zeros)
    points = sorted((float(name), cost) for name, cost in measured.items() if name != PATTERN)
    if not points or share < points[0][0]:
        return None

    for (low, before), (high, after) in pairwise(points):
        if share <= high:
            return _mix(before, after, (share - low) / (high - low))
    return points[-1][1]


def name_zeros(zeros: Zeros) -> str:
    """Return a share of zeros, or N:M, as profiles have it."""
    return zeros if isinstance(zeros, str) else f"{zeros:g}"


def read_zeros(name: str) -> Zeros:
    """Return the zeros that a profile names."""
    return name if ":" in name else float(name)


def _mix(before: FormatCost, after: FormatCost, way: float) -> FormatCost:
    """Return the costs at a part of the way from one to another."""
    others = after.model_dump()
    mixed = {key: value + way * (others[key] - value) for key, value in before.model_dump().items()}
    return FormatCost(**mixed)
