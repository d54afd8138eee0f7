"""What pruning gained and what it cost, in sentences that need no table."""

from __future__ import annotations

from racdeploy.report.model import ArmSummary, Comparison, Kept, Report
from racdeploy.report.tables import plain, readable_bytes, say

_EVEN_SIZE, _EVEN_SPEED = 0.02, 0.05  # changes that nobody notices


def describe_gains(report: Report) -> list[str]:
    """Return size, parameters, speed and accuracy, as far as they are known."""
    accuracy = _describe_accuracy(report.comparison)
    return [*describe_savings(report), *([accuracy] if accuracy else [])]


def describe_savings(report: Report) -> list[str]:
    """Return what pruning did to size, parameters and speed, as far as they are known."""
    arms = {arm.name: arm for arm in report.arms}
    dense, pruned = arms.get("dense"), arms.get("pruned")
    if dense is None or pruned is None:
        return []

    found = [
        _describe_size(dense, pruned),
        _describe_parameters(report.kept),
        _describe_speed(dense, pruned),
    ]
    return [plain(sentence) for sentence in found if sentence]


def _describe_size(dense: ArmSummary, pruned: ArmSummary) -> str:
    before, after = dense.size_bytes, pruned.size_bytes
    if not before or not after:
        return ""

    figures = f"{readable_bytes(before)} → {readable_bytes(after)}"
    change = 1 - after / before
    if abs(change) < _EVEN_SIZE:
        return f"the file is as large as the dense one: {figures}"
    return f"the file is {abs(change):.0%} {'smaller' if change > 0 else 'larger'}: {figures}"


def _describe_parameters(kept: Kept | None) -> str:
    if kept is None:
        return ""
    fewer = 1 - kept.parameters / kept.parameters_dense
    return f"{fewer:.0%} fewer parameters: {kept.parameters_dense:,} → {kept.parameters:,}"


def _describe_speed(dense: ArmSummary, pruned: ArmSummary) -> str:
    if not dense.tokens_per_s or not pruned.tokens_per_s:
        return ""

    ratio = pruned.tokens_per_s / dense.tokens_per_s
    figures = f"{dense.tokens_per_s:,.0f} → {pruned.tokens_per_s:,.0f} tokens/s"
    if abs(ratio - 1) < _EVEN_SPEED:
        return f"as fast as the dense one: {figures}"
    return f"{ratio:.2f} times as fast: {figures}"


def _describe_accuracy(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""

    n = f"{comparison.n:,} prompts"
    if comparison.drop_lower > 0:
        return say("{0.drop:points} points fewer right answers on {1}", comparison, n)
    if comparison.drop_upper < 0:
        return say("{0:points} points more right answers on {1}", -comparison.drop, n)
    if comparison.verdict != "pass":
        return say(
            "{0:points} points fewer right answers on {1}, which chance can explain",
            comparison.drop,
            n,
        )
    return say(
        "no measurable loss of accuracy, at most {0.drop_upper:points} points on {1}", comparison, n
    )
