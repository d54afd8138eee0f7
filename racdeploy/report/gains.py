"""Gains and losses by pruning, in sentences and as the four highlights of the page."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.report.summary import describe_accuracy
from racdeploy.report.tables import (
    LENGTH_INTERVAL,
    LENGTH_RATIO,
    format_bytes,
    format_with_units,
    to_single_line,
)
from racdeploy.results.answers import ArmSummary
from racdeploy.results.checks import CheckVerdict
from racdeploy.results.report import Report

_EQUAL_SIZE, _EQUAL_SPEED = 0.02, 0.05  # changes too small to matter
_EQUAL = 0.005  # a change that rounds to 0 %
# Name, format of the value, and the check that decides on it, by the field of an arm.
_METRICS = {
    "accuracy": ("Accuracy", "{:.1%}", "accuracy"),
    "thinking_tokens_mean": ("Thinking tokens", "{:,.1f}", "thinking"),
    "size_bytes": ("Size", "{:bytes}", ""),
    "tokens_per_s": ("Tokens/s", "{:,.0f}", "speed"),
}
_LOSS = (
    "{0.drop:points} points lost ({0.drop_lower:points} to {0.drop_upper:points}), "
    "margin {0.margin:points}"
)


@dataclass(frozen=True)
class Highlight:
    """Figure of both arms as text, with their comparison in a few words."""

    name: str
    dense: str
    pruned: str
    note: str
    verdict: CheckVerdict | None


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
        length = format_with_units(f"{LENGTH_RATIO} ({LENGTH_INTERVAL}){limit}", comparison)

    notes = {
        "accuracy": loss,
        "thinking_tokens_mean": length,
        "size_bytes": _change(dense.size_bytes, pruned.size_bytes, "larger", "smaller"),
        "tokens_per_s": _change(dense.tokens_per_s, pruned.tokens_per_s, "faster", "slower"),
    }

    highlights = []
    for field, (name, text, deciding) in _METRICS.items():
        before, after = getattr(dense, field), getattr(pruned, field)
        note = notes[field]
        if before is None or after is None or note is None:
            continue
        check = report.find_check(deciding)
        verdict = check.verdict if check else None
        highlights.append(
            Highlight(
                name, format_with_units(text, before), format_with_units(text, after), note, verdict
            )
        )

    return highlights


def describe_gains(report: Report) -> list[str]:
    """Return sentences on size, parameters, speed and accuracy, if they are known."""
    sentences = describe_savings(report)
    if report.comparison:
        sentences.append(describe_accuracy(report.comparison))
    return sentences


def describe_savings(report: Report) -> list[str]:
    """Return sentences on the change of size, parameters and speed, if they are known."""
    dense, pruned, kept = report.find_arm("dense"), report.find_arm("pruned"), report.kept_structure
    if dense is None or pruned is None:
        return []

    sentences = [_describe_size(dense, pruned, report.roles[0])]
    if kept:
        fewer = 1 - kept.parameters / kept.parameters_dense
        counts = f"{kept.parameters_dense:,} → {kept.parameters:,}"
        sentences.append(f"{fewer:.0%} fewer parameters: {counts}")
    sentences.append(_describe_speed(dense, pruned, report.roles[0]))
    return [to_single_line(sentence) for sentence in sentences if sentence]


def _change(dense: float | None, pruned: float | None, more: str, less: str) -> str | None:
    """Return the relative change from dense to pruned in words; None if one was not measured."""
    if not dense or not pruned:
        return None

    change = pruned / dense - 1
    if abs(change) < _EQUAL:
        return "equal"
    return f"{abs(change):.0%} {more if change > 0 else less}"


def _describe_size(dense: ArmSummary, pruned: ArmSummary, role: str) -> str:
    before, after = dense.size_bytes, pruned.size_bytes
    if not before or not after:
        return ""

    figures = f"{format_bytes(before)} → {format_bytes(after)}"
    change = 1 - after / before
    if abs(change) < _EQUAL_SIZE:
        return f"the file is as large as the {role} one: {figures}"
    return f"the file is {abs(change):.0%} {'smaller' if change > 0 else 'larger'}: {figures}"


def _describe_speed(dense: ArmSummary, pruned: ArmSummary, role: str) -> str:
    if not dense.tokens_per_s or not pruned.tokens_per_s:
        return ""

    ratio = pruned.tokens_per_s / dense.tokens_per_s
    figures = f"{dense.tokens_per_s:,.0f} → {pruned.tokens_per_s:,.0f} tokens/s"
    if abs(ratio - 1) < _EQUAL_SPEED:
        return f"as fast as the {role} one: {figures}"
    return f"{ratio:.2f} times as fast: {figures}"
