"""The table of a search for the best model, and the facts beside it, for every output.

As in :mod:`racdeploy.report.tables`, cells are plain text that each output escapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

from racdeploy.report.tables import (
    Row,
    Table,
    number,
    plain,
    ratio_text,
    readable_bytes,
    say,
)
from racdeploy.results.tuning import Candidate, Constraints, DeviceRow, Interval, Reached, Tuning
from racdeploy.results.units import points

_REACHED: tuple[Reached, ...] = get_args(Reached)
_CELLS: dict[str, Callable[[Candidate], str]] = {
    "last stage": lambda each: each.reached,
    "size": lambda each: say("{0.size_bytes:bytes}", each),
    "memory": lambda each: say("{0.memory_bytes:bytes}", each),
    "tokens/s": lambda each: say("{0.tokens_per_s:speed}", each),
    "tokens/s, measured": lambda each: say("{0.measured_tokens_per_s:speed}", each),
    "KL, 10⁻³ nats": lambda each: (
        "" if each.kl_nats is None else number(float(f"{1e3 * each.kl_nats:.2g}"))
    ),
    "right": lambda each: f"{each.correct:,} of {each.prompts:,}" if each.prompts else "",
    "accuracy (95%)": lambda each: interval_text(each.accuracy, "{:.1%}".format),
    "thinking tokens": lambda each: say("{0.thinking_tokens_mean:,.0f}", each),
    "s a right answer": lambda each: interval_text(each.seconds_per_correct, seconds_text),
    "why it went no further": lambda each: each.reason,
}
_WIDE = ("last stage", "memory", "right", "thinking tokens")
"""Columns that a terminal has no room for."""
_NOTHING = {"", say("{}", None)}


def tuning_table(tuning: Tuning, *, answered: bool = False, brief: bool = False) -> Table:
    """Return all candidates: the winner, its rival, those that answered, the others.

    Args:
        answered: without those that did not answer.
        brief: without the columns that a terminal has no room for.
    """
    roles = {tuning.winner: "winner", tuning.rival: "beside it"}

    def rank(each: Candidate) -> tuple[int, int, int]:
        role = [*roles].index(each.name) if each.name in roles else len(roles)
        return role, -_REACHED.index(each.reached), each.size_bytes

    rows: list[Row] = []
    for each in sorted(tuning.candidates, key=rank):
        if answered and not each.prompts:
            continue

        kind = " (dense)" if each.dense else ""
        role = f", {roles[each.name]}" if each.name in roles else ""
        cells = [cell(each) for cell in _CELLS.values()]
        rows.append((f"{each.name}{kind}{role}", *cells))

    columns = ("model", *_CELLS)
    kept = [0]
    for place, column in enumerate(_CELLS, start=1):
        is_empty = _NOTHING.issuperset(row[place] for row in rows)
        if not is_empty and not (brief and column in _WIDE):
            kept.append(place)

    table = []
    for row in (columns, *rows):
        table.append(tuple(plain(row[place]) for place in kept))

    return Table("Candidates", table[0], tuple(table[1:]))


def list_facts(tuning: Tuning) -> list[tuple[str, str]]:
    """Return what a reader has to know of the search, in a few words each."""
    facts = {
        "Asked for": describe_limits(tuning.constraints),
        "Device": describe_device(tuning.device),
        "Beside the winner": f"{tuning.rival}, on the same prompts" if tuning.rival else "",
        "Gain in accuracy": _describe_gain(tuning.gain),
        "Tasks": ", ".join(tuning.tasks),
        "Time": _describe_time(tuning),
        "Bundle": tuning.bundle,
    }
    return [(name, plain(text)) for name, text in facts.items() if text]


def describe_limits(limits: Constraints) -> str:
    """Return the objective and each limit in words."""
    words = [f"best {limits.objective.replace('-', ' ')}"]
    if limits.max_bytes:
        words.append(f"{limits.max_bytes:,} bytes at most")
    if limits.max_memory_bytes:
        words.append(f"{readable_bytes(limits.max_memory_bytes)} of memory at most")
    if limits.min_tokens_per_s:
        words.append(f"{limits.min_tokens_per_s:g} tokens/s at least")
    if limits.min_accuracy_ratio:
        words.append(f"{limits.min_accuracy_ratio:.0%} of the dense accuracy at least")
    return ", ".join(words)


def _describe_time(tuning: Tuning) -> str:
    spent = duration_text(sum(tuning.seconds.values()))
    budget = duration_text(tuning.constraints.budget_s)
    stages = [f"{name} {duration_text(each)}" for name, each in tuning.seconds.items()]
    said = f"{spent} of {budget}: {', '.join(stages)}"

    whole = tuning.tokens_asked + tuning.tokens_saved
    if not whole:
        return said
    return f"{said}; stopping early saved {tuning.tokens_saved / whole:.0%} of the race"


def _describe_gain(gain: Interval | None) -> str:
    if gain is None:
        return ""
    ends = f"{points(gain.lower)} to {points(gain.upper)}"
    return f"{points(gain.value)} points ({ends}), 90% interval, paired"


def least_accuracy(tuning: Tuning) -> float | None:
    """Return the accuracy that was asked for; None for any, or where dense did not answer."""
    ratio = tuning.constraints.min_accuracy_ratio
    dense = tuning.find(tuning.reference)
    if ratio is None or dense is None or dense.accuracy is None:
        return None
    return ratio * dense.accuracy.value


def keeps_limits(tuning: Tuning) -> bool:
    """Return whether the winner keeps every limit that was asked for; what is unknown is not."""
    winner = tuning.find(tuning.winner)
    assert winner, "the data model has checked that"
    if tuning.constraints.min_accuracy_ratio is None:
        return winner.keeps_limits
    least = least_accuracy(tuning)
    if least is None or winner.accuracy is None:
        return False
    return winner.keeps_limits and winner.accuracy.value >= least


def describe_device(device: DeviceRow) -> str:
    """Return the device, and where its figures come from."""
    cores = "1 core" if device.cores == 1 else f"{device.cores} cores"
    kind = "measured on it" if device.measured else "estimated"
    source = device.source.removeprefix("estimated: ")
    return plain(f"{device.name}, {cores}; figures {kind}: {source}")


def duration_text(seconds: float) -> str:
    """Return a time with the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def interval_text(estimate: Interval | None, write: Callable[[float], str]) -> str:
    """Return an estimate with its interval; nothing where there is none."""
    if estimate is None:
        return ""
    return f"{write(estimate.value)} ({write(estimate.lower)} to {write(estimate.upper)})"


def seconds_text(seconds: float) -> str:
    """Return a time with three digits, also where it is infinite."""
    return ratio_text(seconds) if math.isinf(seconds) else f"{seconds:,.3g}"
