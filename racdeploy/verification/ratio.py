"""Ratio of a figure of the pruned arm to that of the dense arm, both measured in one run."""

from __future__ import annotations

from collections.abc import Callable

from racdeploy.results.checks import CheckResult
from racdeploy.verification.evidence import make_check_result


def judge_ratio(
    name: str,
    show: Callable[[float], str],
    dense: float | None,
    pruned: float | None,
    limit: float | None,
    keeps: Callable[[float, float], bool],
    remedy: str,
) -> CheckResult:
    """Judge the ratio of two figures; without a limit it is only reported.

    Args:
        name: of the check; its figures are ``NAME_ratio``, ``NAME_dense`` and ``NAME_pruned``.
        show: formats a figure with its unit.
        keeps: compares a ratio (first argument) with a limit, as ``operator.le`` does.
    """
    if not dense or not pruned:
        return _report_missing(name, dense, pruned, limit)

    ratio = pruned / dense
    figures = {f"{name}_ratio": ratio, f"{name}_dense": dense, f"{name}_pruned": pruned}

    text = f"{show(pruned)}, dense {show(dense)}, ratio {ratio:.2f}"
    if limit is None:
        return make_check_result(name, "measured", f"{text}; no limit is set", figures)

    figures[f"{name}_limit"] = limit
    text += f", limit {limit:g}"
    if keeps(ratio, limit):
        return make_check_result(name, "pass", text, figures)

    return make_check_result(name, "fail", text, figures, remedy)


def _report_missing(
    name: str, dense: float | None, pruned: float | None, limit: float | None
) -> CheckResult:
    """Return the result without one of the figures: inconclusive if there is a limit."""
    measured = "neither artifact"
    if dense or pruned:
        measured = f"the {'dense' if dense else 'pruned'} artifact alone"

    summary = f"{measured} was measured in this run"
    if limit is None:
        remedy = "racdeploy bench measures both"
        return make_check_result(name, "skipped", summary, remedy=remedy)

    remedy = "give the dense artifact with --baseline, or build again: both then run"
    return make_check_result(name, "inconclusive", summary, remedy=remedy)
