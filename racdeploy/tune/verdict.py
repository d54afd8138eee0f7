"""One sentence on who wins, and by how much."""

from __future__ import annotations

from racdeploy.report.tables import points, readable_bytes
from racdeploy.report.tuning import Interval, Wishes
from racdeploy.tune.entries import Entry
from racdeploy.verify.stats.costs import cost_per_success


def write_verdict(
    winner: Entry,
    rival: Entry | None,
    gain: Interval | None,
    wishes: Wishes,
    confidence: float = 0.90,
) -> str:
    """Return who wins over whom, in accuracy, size and speed.

    Args:
        gain: of the winner's accuracy over the rival's, with its interval of that confidence.
    """
    asked = _describe_wishes(wishes)
    kind = "plain dense weights" if winner.choice.dense else "a pruned model"
    first = f"{asked}, {kind} won: {winner.name}, {_describe(winner)}."
    if rival is None and not winner.choice.dense:
        return f"{first} No dense model that was made keeps the limits."
    if rival is None or gain is None:
        return first

    other = "dense" if rival.choice.dense else "pruned"
    found = _describe(rival)
    second = f"The best {other} rival, {rival.name}, has {found}"
    compared = _describe_gain(winner, gain, confidence)
    return f"{first} {second}; {compared}."


def _describe(entry: Entry) -> str:
    """Return accuracy, size, speed and what a right answer costs."""
    marks = entry.marks
    assert marks is not None, "both were verified"

    speed = entry.takes.tokens_per_s
    cost = cost_per_success(marks.tokens_N / speed, marks.right_N)
    words = [
        f"{entry.accuracy:.1%} of {len(marks)} prompts right",
        readable_bytes(entry.size_bytes),
        f"{speed:,.0f} tokens/s predicted",
        f"{cost.ratio:.3g} s a right answer",
    ]
    return ", ".join(words)


def _describe_gain(winner: Entry, gain: Interval, confidence: float) -> str:
    lower = points(gain.lower)
    upper = points(gain.upper)
    interval = f"{confidence:.0%} interval {lower} to {upper} points"

    more = points(gain.value)
    if gain.lower > 0:
        return f"{winner.name} answers {more} points more ({interval})"

    if gain.upper < 0:
        fewer = points(-gain.value)
        return f"{winner.name} answers {fewer} points fewer ({interval})"

    return f"in accuracy the two are even ({more} points, {interval})"


def _describe_wishes(wishes: Wishes) -> str:
    """Return the limits and the aim, with a capital letter."""
    words = []
    if wishes.max_bytes:
        words.append(f"within {wishes.max_bytes:,} bytes")
    if wishes.min_tokens_per_s:
        words.append(f"at {wishes.min_tokens_per_s:g} tokens/s or more")
    if wishes.min_accuracy_ratio:
        words.append(f"with {wishes.min_accuracy_ratio:.0%} of the dense accuracy or more")

    aim = wishes.objective.replace("-", " ")
    words.append(f"asked for the best {aim}")

    said = ", ".join(words)
    return said[0].upper() + said[1:]
