"""Table and facts of a search for the best model, for every output.

As in :mod:`racdeploy.report.tables`, cells are plain text that each output escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from racdeploy.report.tables import (
    NONE,
    ReportTable,
    fill_cells,
    format_bytes,
    format_duration,
    format_figure,
    format_number,
    to_single_line,
)
from racdeploy.results.tuning import Candidate, Constraints, DeviceRow, Estimate, Reached, Tuning

_REACHED: tuple[Reached, ...] = get_args(Reached)
_CELLS = {
    "last stage": "{0.reached}",
    "size": "{0.size_bytes:bytes}",
    "memory": "{0.memory_bytes:bytes}",
    "tokens/s": "{0.tokens_per_s:speed}",
    "tokens/s, measured": "{0.measured_tokens_per_s:speed}",
    "KL, 10⁻³ nats": "{1}",
    "right": "{2}",
    "accuracy (95%)": "{3}",
    "thinking tokens": "{0.thinking_tokens_mean:,.0f}",
    "s a right answer": "{4}",
    "reason for rejection": "{0.reason}",
}
_WIDE_COLUMNS = ("last stage", "memory", "right", "thinking tokens")
"""Columns that a terminal has no room for."""
_EMPTY = {"", NONE}


def make_tuning_table(
    tuning: Tuning, *, answered: bool = False, brief: bool = False
) -> ReportTable:
    """Return the candidates: the winner, its rival, those that answered, the others.

    Args:
        answered: leave out candidates that did not answer.
        brief: leave out columns that a terminal has no room for.
    """
    roles = {tuning.winner: "winner", tuning.rival: "rival"}

    def rank(each: Candidate) -> tuple[int, int, int]:
        role = [*roles].index(each.name) if each.name in roles else len(roles)
        return role, -_REACHED.index(each.reached), each.size_bytes

    rows = []
    for each in sorted(tuning.candidates, key=rank):
        if answered and not each.prompts:
            continue

        kind = " (dense)" if each.dense else ""
        role = f", {roles[each.name]}" if each.name in roles else ""
        kl = "" if each.kl_nats is None else format_number(float(f"{1e3 * each.kl_nats:.2g}"))
        right = f"{each.correct:,} of {each.prompts:,}" if each.prompts else ""
        accuracy = format_estimate(each.accuracy, "{:.1%}".format)
        cost = format_estimate(each.seconds_per_correct, format_figure)
        texts = (kl, right, accuracy, cost)
        cells = fill_cells(_CELLS, each, *texts)
        rows.append((f"{each.name}{kind}{role}", *cells))

    # A column without any figure, as memory on an unknown device, is left out.
    columns = ("model", *_CELLS)
    kept = [0]
    for index, column in enumerate(_CELLS, start=1):
        is_empty = _EMPTY.issuperset(row[index] for row in rows)
        if not is_empty and not (brief and column in _WIDE_COLUMNS):
            kept.append(index)

    head, *body = [_pick_cells(row, kept) for row in (columns, *rows)]
    return ReportTable("Candidates", head, tuple(body))


def _pick_cells(row: Sequence[str], indices: Sequence[int]) -> tuple[str, ...]:
    return tuple(to_single_line(row[index]) for index in indices)


def list_facts(tuning: Tuning) -> list[tuple[str, str]]:
    """Return names and texts of the facts of a search: constraints, device, tasks, time."""
    spent = format_duration(sum(tuning.seconds.values()))
    budget = format_duration(tuning.constraints.budget_s)
    stages = [f"{name} {format_duration(each)}" for name, each in tuning.seconds.items()]
    facts = {
        "Constraints": describe_limits(tuning.constraints),
        "Device": describe_device(tuning.device),
        "Tasks": ", ".join(tuning.tasks),
        "Time": f"{spent} of {budget}: {', '.join(stages)}",
        "Bundle": tuning.bundle,
    }
    return [(name, to_single_line(text)) for name, text in facts.items() if text]


def describe_limits(limits: Constraints) -> str:
    """Return the objective and each limit in words."""
    words = [f"best {limits.objective.replace('-', ' ')}"]
    if limits.max_bytes:
        words.append(f"{limits.max_bytes:,} bytes at most")
    if limits.max_memory_bytes:
        words.append(f"{format_bytes(limits.max_memory_bytes)} of memory at most")
    if limits.min_tokens_per_s:
        words.append(f"{limits.min_tokens_per_s:g} tokens/s at least")
    if limits.min_accuracy_ratio:
        words.append(f"{limits.min_accuracy_ratio:.0%} of the dense accuracy at least")
    return ", ".join(words)


def find_min_accuracy(tuning: Tuning) -> float | None:
    """Return the required accuracy; None without a requirement or without a dense accuracy."""
    ratio = tuning.constraints.min_accuracy_ratio
    dense = tuning.find(tuning.reference)
    if ratio is None or dense is None or dense.accuracy is None:
        return None
    return ratio * dense.accuracy.value


def meets_limits(tuning: Tuning) -> bool:
    """Return whether the winner keeps every limit; an unknown figure keeps none."""
    winner = tuning.find(tuning.winner)
    assert winner, "the data model has checked that"
    if tuning.constraints.min_accuracy_ratio is None:
        return winner.meets_limits
    min_accuracy = find_min_accuracy(tuning)
    if min_accuracy is None or winner.accuracy is None:
        return False
    return winner.meets_limits and winner.accuracy.value >= min_accuracy


def describe_device(device: DeviceRow) -> str:
    """Return the device, and the source of its figures."""
    cores = "1 core" if device.cores == 1 else f"{device.cores} cores"
    kind = "measured on it" if device.measured else "estimated"
    source = device.source.removeprefix("estimated: ")
    return to_single_line(f"{device.name}, {cores}; figures {kind}: {source}")


def format_estimate(estimate: Estimate | None, write: Callable[[float], str]) -> str:
    """Return an estimate with its interval; empty without an estimate."""
    if estimate is None:
        return ""
    return f"{write(estimate.value)} ({write(estimate.lower)} to {write(estimate.upper)})"
