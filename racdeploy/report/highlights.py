"""The four numbers a reader looks for first, dense beside pruned, each with what decides on it."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.report.model import CheckVerdict, Comparison, Report
from racdeploy.report.tables import points, ratio_text, readable_bytes


@dataclass(frozen=True)
class Highlight:
    """A number of both arms.

    Args:
        dense, pruned: as text, with the unit.
        note: the comparison in a few words.
        verdict: of the check that decides on it.
    """

    name: str
    dense: str
    pruned: str
    note: str
    verdict: CheckVerdict | None = None


def highlights(report: Report) -> list[Highlight]:
    """Return accuracy, thinking, size and speed, as far as they were measured."""
    arms = {arm.name: arm for arm in report.arms}
    if "dense" not in arms or "pruned" not in arms:
        return []

    dense, pruned, comparison = arms["dense"], arms["pruned"], report.comparison
    verdicts = {check.name: check.verdict for check in report.checks}
    shares = f"{dense.accuracy:.1%}", f"{pruned.accuracy:.1%}"
    found = [Highlight("Accuracy", *shares, _drop(comparison), verdicts.get("accuracy"))]

    if dense.thinking_tokens_mean is not None and pruned.thinking_tokens_mean is not None:
        lengths = f"{dense.thinking_tokens_mean:.1f}", f"{pruned.thinking_tokens_mean:.1f}"
        verdict = verdicts.get("thinking")
        found.append(Highlight("Thinking tokens", *lengths, _length(comparison), verdict))

    if dense.size_bytes and pruned.size_bytes:
        sizes = readable_bytes(dense.size_bytes), readable_bytes(pruned.size_bytes)
        note = f"{pruned.size_bytes / dense.size_bytes:.2f} times the dense file"
        found.append(Highlight("Size", *sizes, note))

    if dense.tokens_per_s and pruned.tokens_per_s:
        speeds = f"{dense.tokens_per_s:,.0f}", f"{pruned.tokens_per_s:,.0f}"
        note = f"{pruned.tokens_per_s / dense.tokens_per_s:.2f} times dense"
        found.append(Highlight("Tokens/s", *speeds, note, verdicts.get("speed")))
    return found


def _drop(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    interval = f"{points(comparison.drop_lower)} to {points(comparison.drop_upper)}"
    margin = points(comparison.margin)
    return f"drop {points(comparison.drop)} points ({interval}), margin {margin}"


def _length(comparison: Comparison | None) -> str:
    if comparison is None or comparison.length_ratio is None:
        return ""
    limit = f", limit {comparison.length_limit:.2f}" if comparison.length_limit else ""
    interval = f"{ratio_text(comparison.length_lower)} to {ratio_text(comparison.length_upper)}"
    return f"{ratio_text(comparison.length_ratio)} times as long ({interval}){limit}"
