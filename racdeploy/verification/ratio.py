"""Ratio of a figure of both arms, measured in one run."""

from __future__ import annotations

from collections.abc import Callable

from racdeploy.verification.evidence import ArmResult, Evidence, Outcome


def judge_ratio(
    evidence: Evidence,
    name: str,
    show: Callable[[float], str],
    measure: Callable[[ArmResult], float | None],
    limit: float | None,
    keeps: Callable[[float, float], bool],
    remedy: str,
) -> Outcome:
    """Judge the ratio of two figures; without a limit it is only reported.

    Args:
        name: of the check; its figures are ``NAME_ratio``, ``NAME_dense`` and ``NAME_pruned``.
        show: formats a figure with its unit.
        measure: returns the figure of an arm, None if it was not measured.
        keeps: compares a ratio (first argument) with a limit, as ``operator.le`` does.
    """
    dense, pruned = measure(evidence.dense), measure(evidence.pruned)
    if not dense or not pruned:
        summary = "it was not measured for both models in this run"
        if limit is None:
            return Outcome("skipped", summary, remedy="racdeploy bench measures both")
        remedy = evidence.choose(
            "give the dense artifact with --baseline, or build again: both then run",
            "compare with the reference's file, which then runs beside it",
        )
        return Outcome("inconclusive", summary, remedy=remedy)

    ratio = pruned / dense
    figures = {f"{name}_ratio": ratio, f"{name}_dense": dense, f"{name}_pruned": pruned}

    text = f"{show(pruned)}, {evidence.roles[0]} {show(dense)}, ratio {ratio:.2f}"
    if limit is None:
        return Outcome("measured", f"{text}; no limit is set", figures)

    figures[f"{name}_limit"] = limit
    text += f", limit {limit:g}"
    if keeps(ratio, limit):
        return Outcome("pass", text, figures)

    return Outcome("fail", text, figures, remedy)
