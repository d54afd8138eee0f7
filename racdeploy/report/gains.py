"""Gains and losses by pruning: the four highlights of a report."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.report.tables import NONE, format_with_units
from racdeploy.results.report import Report

_EQUAL = 0.005  # a change that rounds to 0 %
_LOSS = (
    "{0.drop:points} points lost ({0.drop_lower:points} to {0.drop_upper:points}), "
    "margin {0.margin:points}"
)
_LENGTH = "{0.length_ratio:ratio} times as long ({0.length_lower:ratio} to {0.length_upper:ratio})"


@dataclass(frozen=True)
class Highlight:
    """Figure of both arms as text, with their comparison in a few words."""

    name: str
    dense: str
    pruned: str
    note: str


def list_highlights(report: Report) -> list[Highlight]:
    """Return accuracy, thinking, size and speed, if they were measured."""
    dense, pruned = report.find_arm("dense"), report.find_arm("pruned")
    if dense is None or pruned is None:
        return []

    comparison = report.comparison
    loss = length = ""
    if comparison:
        loss = format_with_units(_LOSS, comparison)
    if comparison and comparison.length_ratio is not None:
        limit = ", limit {0.length_limit:.2f}" if comparison.length_limit else ""
        length = format_with_units(f"{_LENGTH}{limit}", comparison)

    size = _change(dense.size_bytes, pruned.size_bytes, "larger", "smaller")
    speed = _change(dense.tokens_per_s, pruned.tokens_per_s, "faster", "slower")
    figures = {
        "Accuracy": ("{0.accuracy:.1%}", loss),
        "Thinking tokens": ("{0.thinking_tokens_mean:,.1f}", length),
        "Size": ("{0.size_bytes:bytes}", size),
        "Tokens/s": ("{0.tokens_per_s:,.0f}", speed),
    }

    highlights = []
    for name, (text, note) in figures.items():
        before, after = (format_with_units(text, arm) for arm in (dense, pruned))
        if note is not None and NONE not in (before, after):
            highlights.append(Highlight(name, before, after, note))

    return highlights


def _change(dense: float | None, pruned: float | None, more: str, less: str) -> str | None:
    """Return the relative change from dense to pruned in words; None if one was not measured."""
    if not dense or not pruned:
        return None

    change = pruned / dense - 1
    if abs(change) < _EQUAL:
        return "equal"
    return f"{abs(change):.0%} {more if change > 0 else less}"
