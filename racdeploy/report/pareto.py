"""Pareto front of size, speed, accuracy and thinking length.

A metric counts only if every arm has it: an arm whose speed was not measured cannot lose on speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import ge

from racdeploy.results.answers import ArmSummary
from racdeploy.results.report import Report

# -1: lower is better.
_SIGNS = {"size_bytes": -1, "tokens_per_s": 1, "accuracy": 1, "thinking_tokens_mean": -1}


def find_pareto_front(arms: Sequence[ArmSummary]) -> frozenset[str]:
    """Return the names of the non-dominated arms."""
    qualities: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for field, sign in _SIGNS.items():
        values = [getattr(arm, field) for arm in arms]
        if None not in values:
            for arm, value in zip(arms, values, strict=True):
                qualities[arm.name].append(sign * value)

    return find_non_dominated(qualities)


def find_non_dominated(qualities: Mapping[str, Sequence[float]]) -> frozenset[str]:
    """Return the names that no other name dominates; higher values are better.

    A name is dominated by another that is at least as good in all values and better in one.
    """

    def is_dominated(quality: Sequence[float]) -> bool:
        others = [other for other in qualities.values() if other != quality]
        return any(all(map(ge, other, quality)) for other in others)

    return frozenset(name for name, quality in qualities.items() if not is_dominated(quality))


def describe_front(report: Report) -> str:
    """Return a sentence on the Pareto front; empty without dense rivals."""
    if not report.rivals:
        return ""
    best = find_pareto_front(report.arms)
    on = ", ".join(arm.name for arm in report.arms if arm.name in best)
    return f"Pareto front of size, speed, accuracy and thinking: {on}."
