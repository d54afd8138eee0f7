"""The four numbers a reader looks for first, dense beside pruned, each with what decides on it."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.report.model import CheckVerdict, Comparison, Report
from racdeploy.report.tables import LENGTH, LENGTH_INTERVAL, LIMIT, say

# Name, how a value is written, and the check that decides on it, by the field of an arm.
_QUALITIES = {
    "accuracy": ("Accuracy", "{:.1%}", "accuracy"),
    "thinking_tokens_mean": ("Thinking tokens", "{:,.1f}", "thinking"),
    "size_bytes": ("Size", "{:bytes}", ""),
    "tokens_per_s": ("Tokens/s", "{:,.0f}", "speed"),
}
_LOSS = (
    "{0.drop:points} points lost ({0.drop_lower:points} to {0.drop_upper:points}), "
    "margin {0.margin:points}"
)
_EVEN = 0.005  # a change that rounds to no per cent


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
    comparison = report.comparison
    notes = {
        "accuracy": say(_LOSS, comparison) if comparison else "",
        "thinking_tokens_mean": _compare_lengths(comparison),
        "size_bytes": _change(dense.size_bytes, pruned.size_bytes, "larger", "smaller"),
        "tokens_per_s": _change(dense.tokens_per_s, pruned.tokens_per_s, "faster", "slower"),
    }

    found = []
    for field, (name, text, check) in _QUALITIES.items():
        before, after = getattr(dense, field), getattr(pruned, field)
        note = notes[field]
        if before is None or after is None or note is None:
            continue
        verdict = verdicts.get(check)
        found.append(Highlight(name, say(text, before), say(text, after), note, verdict))

    return found


def _compare_lengths(comparison: Comparison | None) -> str:
    if comparison is None or comparison.length_ratio is None:
        return ""
    limit = say(LIMIT, comparison) if comparison.length_limit else ""
    return say(f"{LENGTH} ({LENGTH_INTERVAL}){limit}", comparison)


def _change(dense: float | None, pruned: float | None, more: str, less: str) -> str | None:
    """Return by how much pruned is more or less than dense; None where one was not measured."""
    if not dense or not pruned:
        return None

    change = pruned / dense - 1
    if abs(change) < _EVEN:
        return "as before"
    return f"{abs(change):.0%} {more if change > 0 else less}"
