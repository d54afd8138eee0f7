"""A figure of the pruned arm against the same figure of the dense one, both measured in one run."""

from __future__ import annotations

from collections.abc import Callable

from racdeploy.report.model import CheckResult


def compare_figures(
    name: str,
    show: Callable[[float], str],
    figures: tuple[float | None, float | None],
    limit: float | None,
    passes: Callable[[float, float], bool],
    remedy: str,
) -> CheckResult:
    """Decide on the ratio of two figures; without a limit it is told and decides nothing.

    Args:
        name: of the check; its figures are ``NAME_ratio``, ``NAME_dense`` and ``NAME_pruned``.
        show: writes a figure with its unit.
        figures: dense and pruned; None where it was not measured in this run.
        limit: of the ratio, or None.
        passes: whether a ratio keeps a limit.
        remedy: what to do where it does not.
    """
    dense, pruned = figures
    if not dense or not pruned:
        alone = (
            "the dense artifact alone"
            if dense
            else "the pruned artifact alone"
            if pruned
            else "neither artifact"
        )
        return CheckResult(
            name=name,
            verdict="skipped" if limit is None else "inconclusive",
            summary=f"{alone} was measured in this run",
            remedy="racdeploy bench measures both"
            if limit is None
            else "give the dense artifact with --baseline, or build again: both then run",
        )
    ratio = pruned / dense
    numbers: dict[str, float | int | str] = {
        f"{name}_ratio": ratio,
        f"{name}_dense": dense,
        f"{name}_pruned": pruned,
    }
    text = f"{show(pruned)}, dense {show(dense)}, ratio {ratio:.2f}"
    if limit is None:
        return CheckResult(
            name=name, verdict="skipped", summary=f"{text}; no limit is set", figures=numbers
        )
    kept = passes(ratio, limit)
    return CheckResult(
        name=name,
        verdict="pass" if kept else "fail",
        summary=f"{text}, limit {limit:g}",
        figures=numbers | {f"{name}_limit": limit},
        remedy="" if kept else remedy,
    )
