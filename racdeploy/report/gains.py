"""What pruning gained and what it cost: in sentences, and as the four numbers of the page."""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy.report.tables import LENGTH, LENGTH_INTERVAL, plain, readable_bytes, say
from racdeploy.results.answers import ArmSummary, Comparison
from racdeploy.results.checks import CheckVerdict
from racdeploy.results.report import Report
from racdeploy.results.units import points

_EVEN_SIZE, _EVEN_SPEED = 0.02, 0.05  # changes that nobody notices
_EVEN = 0.005  # a change that rounds to no per cent
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


@dataclass(frozen=True)
class Highlight:
    """A number of both arms as text, with the comparison in a few words."""

    name: str
    dense: str
    pruned: str
    note: str
    verdict: CheckVerdict | None = None


def list_highlights(report: Report) -> list[Highlight]:
    """Return accuracy, thinking, size and speed, as far as they were measured."""
    dense, pruned = report.arm("dense"), report.arm("pruned")
    if dense is None or pruned is None:
        return []

    comparison = report.comparison
    loss = length = ""
    if comparison:
        loss = say(_LOSS, comparison)
    if comparison and comparison.length_ratio is not None:
        limit = ", limit {0.length_limit:.2f}" if comparison.length_limit else ""
        length = say(f"{LENGTH} ({LENGTH_INTERVAL}){limit}", comparison)

    notes = {
        "accuracy": loss,
        "thinking_tokens_mean": length,
        "size_bytes": _change(dense.size_bytes, pruned.size_bytes, "larger", "smaller"),
        "tokens_per_s": _change(dense.tokens_per_s, pruned.tokens_per_s, "faster", "slower"),
    }

    found = []
    for field, (name, text, deciding) in _QUALITIES.items():
        before, after = getattr(dense, field), getattr(pruned, field)
        note = notes[field]
        if before is None or after is None or note is None:
            continue
        check = report.check(deciding)
        verdict = check.verdict if check else None
        found.append(Highlight(name, say(text, before), say(text, after), note, verdict))

    return found


def describe_gains(report: Report) -> list[str]:
    """Return size, parameters, speed and accuracy, as far as they are known."""
    found = describe_savings(report)
    if report.comparison:
        found.append(_describe_accuracy(report.comparison))
    return found


def describe_savings(report: Report) -> list[str]:
    """Return what pruning did to size, parameters and speed, as far as they are known."""
    dense, pruned, kept = report.arm("dense"), report.arm("pruned"), report.kept
    if dense is None or pruned is None:
        return []

    found = [_describe_size(dense, pruned)]
    if kept:
        fewer = 1 - kept.parameters / kept.parameters_dense
        counts = f"{kept.parameters_dense:,} → {kept.parameters:,}"
        found.append(f"{fewer:.0%} fewer parameters: {counts}")
    found.append(_describe_speed(dense, pruned))
    return [plain(sentence) for sentence in found if sentence]


def _change(dense: float | None, pruned: float | None, more: str, less: str) -> str | None:
    """Return by how much pruned is more or less than dense; None where one was not measured."""
    if not dense or not pruned:
        return None

    change = pruned / dense - 1
    if abs(change) < _EVEN:
        return "as before"
    return f"{abs(change):.0%} {more if change > 0 else less}"


def _describe_size(dense: ArmSummary, pruned: ArmSummary) -> str:
    before, after = dense.size_bytes, pruned.size_bytes
    if not before or not after:
        return ""

    figures = f"{readable_bytes(before)} → {readable_bytes(after)}"
    change = 1 - after / before
    if abs(change) < _EVEN_SIZE:
        return f"the file is as large as the dense one: {figures}"
    return f"the file is {abs(change):.0%} {'smaller' if change > 0 else 'larger'}: {figures}"


def _describe_speed(dense: ArmSummary, pruned: ArmSummary) -> str:
    if not dense.tokens_per_s or not pruned.tokens_per_s:
        return ""

    ratio = pruned.tokens_per_s / dense.tokens_per_s
    figures = f"{dense.tokens_per_s:,.0f} → {pruned.tokens_per_s:,.0f} tokens/s"
    if abs(ratio - 1) < _EVEN_SPEED:
        return f"as fast as the dense one: {figures}"
    return f"{ratio:.2f} times as fast: {figures}"


def _describe_accuracy(comparison: Comparison) -> str:
    on = f"on {comparison.n:,} prompts"
    if comparison.drop_upper < 0:
        return f"{points(-comparison.drop)} points more right answers {on}"

    is_even = comparison.drop_lower <= 0
    if is_even and comparison.verdict == "pass":
        most = points(comparison.drop_upper)
        return f"no measurable loss of accuracy, at most {most} points {on}"

    chance = ", which chance can explain" if is_even else ""
    return f"{points(comparison.drop)} points fewer right answers {on}{chance}"
