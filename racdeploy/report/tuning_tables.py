"""The tables of a search for the best model, for its page, Markdown, a terminal, and while it runs.

As in :mod:`racdeploy.report.tables`, cells are plain text that each output escapes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

from racdeploy.report.settings import write_key, write_value
from racdeploy.report.tables import Row, Table, plain, ratio_text, say
from racdeploy.report.tuning import Candidate, DeviceRow, Interval, Reached, Tuning
from racdeploy.storage.unprintable import visible

ANSWERED, OTHERS = "Models that answered", "Models that did not answer"
WISHES, STAGES = "What was asked", "Stages"
_REACHED: tuple[Reached, ...] = get_args(Reached)
_DOES = {
    "count": "bytes, memory and speed, by arithmetic",
    "survey": "error of the blocks",
    "compare": "divergence on held-out traces",
    "race": "few prompts, stopped early",
    "verify": "full verification",
}
"""What the stages do, in the order of :data:`Reached`."""
_STAGES = tuple(_DOES)
_PREDICTED = {
    "memory": "{0.memory_bytes:bytes}",
    "tokens/s": "{0.tokens_per_s:speed}",
}
_MEASURED = {
    "memory, measured": "{0.measured_memory_bytes:bytes}",
    "tokens/s, measured": "{0.measured_tokens_per_s:speed}",
}
_GUESSED = {
    "error": "{0.error:.3g}",
    "KL, nats": "{0.kl_nats:.3g}",
    "top-1": "{0.top1:.1%}",
}
_WIDE = frozenset(
    [
        "memory",
        *_MEASURED,
        "prompts",
        "thinking tokens",
        "limits",
        "what",
        "top-1",
    ]
)
"""Columns that a terminal has no room for."""
_LISTS = {"tasks": "--task", "calibration_tasks": "--calibration-task", "also": "--also"}
"""Options of a build for lists of the recipe."""
_LIVE = "model|stage|size|tokens/s|error|KL|right|"


def tuning_tables(tuning: Tuning, brief: bool = False) -> list[Table]:
    """Return every table that has a row, in reading order.

    Args:
        brief: without the columns that a terminal has no room for.
    """
    answered = [each for each in tuning.candidates if each.accuracy]
    others = [each for each in tuning.candidates if not each.accuracy]

    wishes = ("wish", "asked", tuning.winner, "kept")
    stages = ("stage", "what", "in", "out", "time", "tokens")
    found = [
        Table(WISHES, wishes, tuple(_wishes(tuning))),
        _list_answered(tuning, answered),
        Table(STAGES, stages, tuple(_stages(tuning))),
        _list_others(others),
    ]
    if brief:
        found = [_without(table, _WIDE) for table in found]
    return [_clean(table) for table in found if table.rows]


def live_table(candidates: Sequence[Candidate], most: int) -> Table:
    """Return at most ``most`` candidates of a search that runs: those still in it, best first.

    Args:
        most: rows that there is room for; a line more says how many are not shown.
    """
    by_need = sorted(candidates, key=_rank)
    rows = [_live_row(each) for each in by_need[:most]]

    more = len(candidates) - most
    if more > 0:
        rows.append((f"… {more} more", *[""] * 7))
    return _clean(Table("", tuple(_LIVE.split("|")), tuple(rows)))


def describe_device(device: DeviceRow) -> str:
    """Return the device, and where its figures come from."""
    cores = "1 core" if device.cores == 1 else f"{device.cores} cores"
    kind = "measured on it" if device.measured else "estimated"
    said = device.source.removeprefix(f"{kind}: ")
    source = f": {said}" if said else ""
    return plain(f"{device.name}, {cores}; figures {kind}{source}")


def write_build(tuning: Tuning, candidate: Candidate) -> str:
    """Return the command that builds a candidate again, for a shell."""
    words = ["racdeploy", "build", tuning.model, "--target", tuning.target]
    if tuning.tier:
        words += ["--tier", tuning.tier]

    for settings in (tuning.recipe, candidate.settings):
        for key, value in _list_settings(settings):
            option = _LISTS.get(key)
            if option and isinstance(value, list | tuple):
                words += [word for each in value for word in (option, str(each))]
            else:
                words += ["--set", f"{_write_path(key)}={write_value(value)}"]

    # On one line; blanks in a word are part of it.
    return shlex.join(visible(word).replace("\n", " ") for word in words)


def keeps_wishes(tuning: Tuning) -> bool:
    """Return whether the winner keeps every limit that was asked for; what is unknown is not."""
    return all(row[-1] in ("yes", "") for row in _wishes(tuning))


def least_accuracy(tuning: Tuning) -> float | None:
    """Return the accuracy that was asked for; None for any, or where dense did not answer."""
    ratio = tuning.wishes.min_accuracy_ratio
    dense = tuning.find(tuning.reference)
    if ratio is None or dense is None or dense.accuracy is None:
        return None
    return ratio * dense.accuracy.value


def duration_text(seconds: float) -> str:
    """Return a time with the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def interval_text(found: Interval | None, write: Callable[[float], str]) -> str:
    """Return an estimate with its interval; a dash where there is none."""
    if found is None:
        return say("{}", None)
    return f"{write(found.value)} ({write(found.lower)} to {write(found.upper)})"


def seconds_text(seconds: float) -> str:
    """Return a time with three digits, also where it is infinite."""
    return ratio_text(seconds) if math.isinf(seconds) else f"{seconds:,.3g}"


def share_text(share: float) -> str:
    """Return a share in per cent."""
    return f"{share:.1%}"


def _wishes(tuning: Tuning) -> list[Row]:
    """Return each wish with what the winner has; a wish without a limit is not one."""
    wishes, winner = tuning.wishes, tuning.find(tuning.winner)
    assert winner, "the data model has checked that"

    memory = winner.measured_memory_bytes or winner.memory_bytes
    accuracy = winner.accuracy.value if winner.accuracy else None
    least = least_accuracy(tuning)

    rows: list[Row] = [("best in", wishes.objective.replace("-", " "), "", "")]
    rows += _at_most("size", "{:bytes}", wishes.max_bytes, winner.size_bytes)
    rows += _at_most("memory", "{:bytes}", wishes.max_memory_bytes, memory)

    speed = winner.tokens_per_s
    rows += _at_least("tokens/s", "{:speed}", wishes.min_tokens_per_s, speed)
    if wishes.min_accuracy_ratio:
        name = f"accuracy, {wishes.min_accuracy_ratio:.0%} of {tuning.reference or 'dense'}"
        unknown = (name, "a share of what is unknown", say("{:.1%}", accuracy), "unknown")
        rows += _at_least(name, "{:.1%}", least, accuracy) or [unknown]

    limit = f"at most {duration_text(wishes.budget_s)}"
    spent = duration_text(sum(tuning.seconds.values()))
    rows.append(("time of the search", limit, spent, ""))
    return rows


def _at_most(name: str, unit: str, limit: float | None, found: float | None) -> list[Row]:
    kept = "" if limit is None or found is None else _say_kept(found <= limit)
    return _wish(name, "at most", unit, limit, found, kept)


def _at_least(name: str, unit: str, limit: float | None, found: float | None) -> list[Row]:
    kept = "" if limit is None or found is None else _say_kept(found >= limit)
    return _wish(name, "at least", unit, limit, found, kept)


def _wish(
    name: str, side: str, unit: str, limit: float | None, found: float | None, kept: str
) -> list[Row]:
    if limit is None:
        return []
    return [(name, f"{side} {say(unit, limit)}", say(unit, found), kept or "unknown")]


def _say_kept(kept: bool) -> str:
    return "yes" if kept else "no"


def _list_answered(tuning: Tuning, answered: Sequence[Candidate]) -> Table:
    """Return the winner, its rival, then the others by size."""
    names = (tuning.winner, tuning.rival)
    in_order = sorted(answered, key=lambda each: (_place(each.name, names), each.size_bytes))

    figures = dict(_PREDICTED)
    nothing = say("{}", None)
    for column, cell in _MEASURED.items():
        if any(say(cell, each) != nothing for each in answered):
            figures[column] = cell

    rows = []
    for each in in_order:
        row = (
            _say_role(each, tuning),
            say("{0.size_bytes:bytes}", each),
            *(say(cell, each) for cell in figures.values()),
            interval_text(each.accuracy, share_text),
            f"{each.prompts:,}",
            say("{0.thinking_tokens_mean:,.1f}", each),
            interval_text(each.seconds_per_correct, seconds_text),
            "kept" if each.keeps_limits else "missed",
            "on it" if each.on_front else "",
            each.why,
        )
        rows.append(row)

    columns = (
        "model",
        "size",
        *figures,
        "accuracy (95%)",
        "prompts",
        "thinking tokens",
        "seconds per right answer (95%)",
        "limits",
        "front",
        "why it went no further",
    )
    return _without_empty(Table(ANSWERED, columns, tuple(rows)))


def _list_others(others: Sequence[Candidate]) -> Table:
    """Return those that came farthest first."""
    in_order = sorted(others, key=lambda each: (-_depth(each), each.size_bytes))
    figures = _PREDICTED | _GUESSED

    rows = []
    for each in in_order:
        row = (
            _say_kind(each),
            each.reached,
            say("{0.size_bytes:bytes}", each),
            *(say(cell, each) for cell in figures.values()),
            each.why,
        )
        rows.append(row)

    columns = ("model", "last stage", "size", *figures, "why it went no further")
    return _without_empty(Table(OTHERS, columns, tuple(rows)))


def _stages(tuning: Tuning) -> list[Row]:
    """Return how many candidates entered and left each stage, and what it took, in its order."""
    rows: list[Row] = []
    for name in dict.fromkeys([*tuning.seconds, *_STAGES]):
        came, went = _count_through(tuning, name)
        tokens = _say_tokens(tuning) if name == "race" else ""

        time = say("{}", None)
        if name in tuning.seconds:
            time = duration_text(tuning.seconds[name])

        rows.append((name, _DOES.get(name, ""), came, went, time, tokens))
    return rows


def _count_through(tuning: Tuning, stage: str) -> tuple[str, str]:
    """Return how many candidates entered and left a stage; empty for one that has none."""
    if stage not in _STAGES:
        return "", ""

    depth = _STAGES.index(stage)
    depths = [_depth(each) for each in tuning.candidates]
    came = sum(own >= depth for own in depths)
    went = sum(own > depth for own in depths)

    if stage == _STAGES[-1]:  # which the winner leaves
        went = min(1, came)
    return f"{came:,}", f"{went:,}"


def _say_tokens(tuning: Tuning) -> str:
    whole = tuning.tokens_asked + tuning.tokens_saved
    if not whole:
        return ""
    share = tuning.tokens_saved / whole
    return f"{tuning.tokens_asked:,} asked; {tuning.tokens_saved:,} ({share:.0%}) saved by stopping"


def _live_row(each: Candidate) -> Row:
    right = f"{each.correct:,}/{each.prompts:,}" if each.prompts else ""
    cells = (
        "{0.size_bytes:bytes}",
        "{0.tokens_per_s:speed}",
        "{0.error:.2g}",
        "{0.kl_nats:.2g}",
    )
    figures = [say(cell, each) for cell in cells]
    return (_say_kind(each), each.reached, *figures, right, each.why)


def _rank(each: Candidate) -> tuple[bool, int, float, float]:
    """Return what sorts a search that runs: those still in it, the farthest, the most right."""
    share = each.correct / each.prompts if each.prompts else 0.0
    guess = each.error if each.kl_nats is None else each.kl_nats
    return bool(each.why), -_depth(each), -share, math.inf if guess is None else guess


def _depth(each: Candidate) -> int:
    return _REACHED.index(each.reached)


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _say_role(each: Candidate, tuning: Tuning) -> str:
    roles = {tuning.rival: "beside it", tuning.winner: "winner"}
    role = f", {roles[each.name]}" if each.name in roles else ""
    return f"{_say_kind(each)}{role}"


def _say_kind(each: Candidate) -> str:
    return f"{each.name} (dense)" if each.dense else each.name


def _list_settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each key with its part, ``prune.sparsity``, and its value."""
    for key, value in settings.items():
        if "." not in key and isinstance(value, Mapping):
            for inner, own in value.items():
                if own is not None:
                    yield f"{key}.{inner}", own
        elif value is not None:
            yield key, value


def _write_path(key: str) -> str:
    """Return the dotted key of a recipe as TOML; each part is quoted where it has to be."""
    return ".".join(write_key(part) for part in key.split("."))


def _without_empty(table: Table) -> Table:
    """Return the table without columns in which nobody has anything."""
    nothing = {"", say("{}", None)}
    empty = []
    for place, column in enumerate(table.columns):
        if place and all(row[place] in nothing for row in table.rows):
            empty.append(column)
    return _without(table, empty)


def _without(table: Table, columns: Collection[str]) -> Table:
    kept = [place for place, column in enumerate(table.columns) if column not in columns]
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[place] for place in kept), rows)


def _clean(table: Table) -> Table:
    rows = tuple(tuple(plain(cell) for cell in row) for row in table.rows)
    return Table(table.title, tuple(plain(column) for column in table.columns), rows)
