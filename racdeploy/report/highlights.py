"""The four numbers a reader looks for first, dense beside pruned, each with what decides on it."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.report import tables
from racdeploy.report.model import CheckVerdict, Comparison, Report

# Name, field of an arm, how it is written, and the check that decides on it.
_QUALITIES = (
    ("Accuracy", "accuracy", "{:.1%}".format, "accuracy"),
    ("Thinking tokens", "thinking_tokens_mean", "{:.1f}".format, "thinking"),
    ("Size", "size_bytes", tables.readable_bytes, ""),
    ("Tokens/s", "tokens_per_s", "{:,.0f}".format, "speed"),
)


@dataclass(frozen=True)
class Highlight:
    """A number of both arms as text, with the comparison in a few words."""

    name: str
    dense: str
    pruned: str
    note: str
    verdict: CheckVerdict | None = None


def highlights(report: Report) -> list[Highlight]:
    """Return accuracy, thinking, size and speed, as far as they were measured."""
    arms = {arm.name: arm for arm in report.arms}
    dense, pruned = arms.get("dense"), arms.get("pruned")
    if dense is None or pruned is None:
        return []

    verdicts = {check.name: check.verdict for check in report.checks}
    notes = {
        "Accuracy": _drop(report.comparison),
        "Thinking tokens": _length(report.comparison),
        "Size": _times(dense.size_bytes, pruned.size_bytes, "the dense file"),
        "Tokens/s": _times(dense.tokens_per_s, pruned.tokens_per_s, "dense"),
    }

    found = []
    for name, field, text, check in _QUALITIES:
        before, after, note = getattr(dense, field), getattr(pruned, field), notes[name]
        if before is None or after is None or note is None:
            continue
        found.append(Highlight(name, text(before), text(after), note, verdicts.get(check)))
    return found


def _drop(comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    drop, margin = tables.points(comparison.drop), tables.points(comparison.margin)
    interval = tables.points_interval(comparison.drop_lower, comparison.drop_upper)
    return f"drop {drop} points ({interval}), margin {margin}"


def _length(comparison: Comparison | None) -> str:
    if comparison is None or comparison.length_ratio is None:
        return ""
    ratio = tables.ratio_text(comparison.length_ratio)
    interval = tables.ratio_interval(comparison.length_lower, comparison.length_upper)
    limit = f", limit {comparison.length_limit:.2f}" if comparison.length_limit else ""
    return f"{ratio} times as long ({interval}){limit}"


def _times(dense: float | None, pruned: float | None, of_what: str) -> str | None:
    return f"{pruned / dense:.2f} times {of_what}" if dense and pruned else None
