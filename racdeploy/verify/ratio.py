"""A figure of the pruned arm against the same figure of the dense one, both measured in one run."""

from __future__ import annotations

from collections.abc import Callable

from racdeploy.results.checks import CheckResult
from racdeploy.verify.evidence import make_result


def compare_figures(
    name: str,
    show: Callable[[float], str],
    dense: float | None,
    pruned: float | None,
    limit: float | None,
    keeps: Callable[[float, float], bool],
    remedy: str,
) -> CheckResult:
    """Decide on the ratio of two figures; without a limit it is reported and decides nothing.

    Args:
        name: of the check; its figures are ``NAME_ratio``, ``NAME_dense`` and ``NAME_pruned``.
        show: writes a figure with its unit.
        keeps: whether a ratio (the first argument) keeps a limit.
    """
    if not dense or not pruned:
        return _report_missing(name, dense, pruned, limit)

    ratio = pruned / dense
    figures = {f"{name}_ratio": ratio, f"{name}_dense": dense, f"{name}_pruned": pruned}

    text = f"{show(pruned)}, dense {show(dense)}, ratio {ratio:.2f}"
    if limit is None:
        return make_result(name, "measured", f"{text}; no limit is set", figures)

    figures[f"{name}_limit"] = limit
    text += f", limit {limit:g}"
    if keeps(ratio, limit):
        return make_result(name, "pass", text, figures)

    return make_result(name, "fail", text, figures, remedy)


def _report_missing(
    name: str, dense: float | None, pruned: float | None, limit: float | None
) -> CheckResult:
    measured = "neither artifact"
    if dense or pruned:
        measured = f"the {'dense' if dense else 'pruned'} artifact alone"

    summary = f"{measured} was measured in this run"
    if limit is None:
        remedy = "racdeploy bench measures both"
        return make_result(name, "skipped", summary, remedy=remedy)

    remedy = "give the dense artifact with --baseline, or build again: both then run"
    return make_result(name, "inconclusive", summary, remedy=remedy)
