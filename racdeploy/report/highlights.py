"""The four numbers a reader looks for first, dense beside pruned, each with what decides on it."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.report.model import ArmSummary, CheckVerdict, Comparison, Report
from racdeploy.report.tables import points, ratio_text, readable_bytes


@dataclass(frozen=True)
class Highlight:
    """A number of both arms.

    Args:
        name: what it is.
        dense, pruned: as text, with the unit.
        note: the comparison in a few words.
        verdict: of the check that decides on it, or empty.
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
    dense, pruned = arms["dense"], arms["pruned"]
    verdicts = {check.name: check.verdict for check in report.checks}
    found = [
        Highlight(
            "Accuracy",
            f"{dense.accuracy:.1%}",
            f"{pruned.accuracy:.1%}",
            _drop(report.comparison),
            verdicts.get("accuracy"),
        )
    ]
    if dense.thinking_tokens_mean is not None and pruned.thinking_tokens_mean is not None:
        lengths = f"{dense.thinking_tokens_mean:.1f}", f"{pruned.thinking_tokens_mean:.1f}"
        found.append(
            Highlight(
                "Thinking tokens", *lengths, _length(report.comparison), verdicts.get("thinking")
            )
        )
    if dense.size_bytes and pruned.size_bytes:
        sizes = readable_bytes(dense.size_bytes), readable_bytes(pruned.size_bytes)
        found.append(
            Highlight("Size", *sizes, _times(pruned.size_bytes, dense.size_bytes, "the dense file"))
        )
    found += _speed(dense, pruned, verdicts.get("speed"))
    return found


def _speed(dense: ArmSummary, pruned: ArmSummary, verdict: CheckVerdict | None) -> list[Highlight]:
    if not dense.tokens_per_s or not pruned.tokens_per_s:
        return []
    speeds = f"{dense.tokens_per_s:,.0f}", f"{pruned.tokens_per_s:,.0f}"
    return [
        Highlight(
            "Tokens/s", *speeds, _times(pruned.tokens_per_s, dense.tokens_per_s, "dense"), verdict
        )
    ]


def _drop(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    return (
        f"drop {points(comparison.drop)} points ({points(comparison.drop_lower)} to {points(comparison.drop_upper)}), "
        f"margin {points(comparison.margin)}"
    )


def _length(comparison: Comparison | None) -> str:
    if comparison is None or comparison.length_ratio is None:
        return ""
    limit = f", limit {comparison.length_limit:.2f}" if comparison.length_limit else ""
    interval = f"{ratio_text(comparison.length_lower)} to {ratio_text(comparison.length_upper)}"
    return f"{ratio_text(comparison.length_ratio)} times as long ({interval}){limit}"


def _times(pruned: float, dense: float, what: str) -> str:
    return f"{pruned / dense:.2f} times {what}"
