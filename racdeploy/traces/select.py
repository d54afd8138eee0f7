"""Selection of the traces that calibrate and of those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.errors import UsageError
from racdeploy.recipe import Calibration
from racdeploy.traces.trace import Trace


@dataclass(frozen=True)
class TraceSelection:
    """Traces by purpose, and the number of others by reason for leaving them out.

    Args:
        unused: those over the token budget, that nothing was fitted to.
    """

    calibration: list[Trace]
    held_out: list[Trace]
    unused: list[Trace]
    excluded: dict[str, int]


def select_traces(traces: Sequence[Trace], settings: Calibration) -> TraceSelection:
    """Leave out unwanted traces, hold a share out evenly, and apply the token budget.

    Raises:
        UsageError: no trace is left to calibrate.
    """
    reasons = {"truncated": 0, "repeating": 0, "wrong answer": 0, "over the token budget": 0}

    wanted = []
    for trace in traces:
        if trace.truncated and settings.keep_truncated is False:
            reasons["truncated"] += 1
        elif settings.keep_truncated is None and trace.repeats:
            reasons["repeating"] += 1
        elif settings.only_correct and not trace.correct:
            reasons["wrong answer"] += 1
        else:
            wanted.append(trace)

    # Held out before the budget, so that a smaller budget holds out the same traces.
    chosen = _choose_held_out(wanted, settings.held_out_share)
    held_out = [trace for trace in wanted if trace.index in chosen]
    rest = [trace for trace in wanted if trace.index not in chosen]
    calibration = take_within_budget(rest, settings.max_tokens)
    reasons["over the token budget"] = len(rest) - len(calibration)
    excluded = {reason: count for reason, count in reasons.items() if count}

    if not calibration:
        counts = ", ".join(f"{count} {reason}" for reason, count in excluded.items())
        raise UsageError(
            "no-calibration-traces",
            f"none of {len(traces)} traces can calibrate: {counts or 'there are none'}",
            remedy="raise traces.max_new_tokens, or set calibration.keep_truncated = true",
        )

    return TraceSelection(calibration, held_out, rest[len(calibration) :], excluded)


def take_within_budget(traces: Sequence[Trace], max_tokens: int) -> list[Trace]:
    """Return whole traces in order up to a token budget, 0 for all; no trace is truncated."""
    if not max_tokens:
        return list(traces)

    chosen, tokens = [], 0
    for trace in traces:
        if tokens + len(trace.ids) > max_tokens:
            break

        chosen.append(trace)
        tokens += len(trace.ids)

    return chosen


def _choose_held_out(traces: Sequence[Trace], share: float) -> set[int]:
    """Return the indices to hold out: the same share of each task, spread evenly."""
    chosen = set()
    for task in dict.fromkeys(trace.task for trace in traces):
        indices = [trace.index for trace in traces if trace.task == task]
        count = round(share * len(indices))

        for part in range(count):  # the middle of each of ``count`` equal parts
            middle = (2 * part + 1) * len(indices) // (2 * count)
            chosen.add(indices[middle])

    return chosen
