"""In which order candidates are tried: the best of every kind first, none that another beats.

Predicted errors compare candidates of one kind well, and those of different kinds less well: a cut
and a rounding that change as much of a block are not missed as much. So kinds take turns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from racdeploy.report.tuning import Objective
from racdeploy.tune.entries import Entry, find_front

_HOPELESS = 30.0
"""What is predicted to change so many times as much as the best that fits cannot win."""


def order_entries(entries: Sequence[Entry], objective: Objective) -> list[Entry]:
    """Return those that are worth a closer look, in the order in which they get it.

    Entries that are left out get a reason.
    """
    if objective == "accuracy":
        _leave_hopeless(entries)

    by_kind: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.is_in:
            by_kind[entry.choice.kind].append(entry)

    rows = []
    for kind, own in by_kind.items():
        front = _keep_front(own, kind)
        rows.append(_spread(front, objective))

    rows.sort(key=lambda row: row[0].quality)
    turns = zip_longest(*rows)
    return [entry for turn in turns for entry in turn if entry is not None]


def _leave_hopeless(entries: Iterable[Entry]) -> None:
    """End the way of those that change too much to answer best."""
    errors = {entry.name: entry.error or 0.0 for entry in entries}
    least = min(filter(None, errors.values()), default=0.0)
    if not least:
        return

    for entry in entries:
        times = errors[entry.name] / least
        learns = entry.choice.recipe.recover.tokens > 0  # and changes less than is predicted
        if times > _HOPELESS and not learns:
            entry.leave(f"predicted to change {times:,.0f} times as much as the best that fits")


def _keep_front(own: Sequence[Entry], kind: str) -> list[Entry]:
    """Return those of a kind that no other of it beats in everything."""
    front = find_front(own)
    for entry in own:
        if entry.name not in front:
            entry.leave(f"another of its kind ({kind}) is predicted to be as good in everything")
    return [entry for entry in own if entry.is_in]


def _spread(front: Sequence[Entry], objective: Objective) -> list[Entry]:
    """Return a front in the order in which it is looked at.

    Where accuracy is the aim, the best first. Else nobody knows yet how small is too small: the one
    in the middle, both ends, then what lies in the middle of what was seen.
    """
    ordered = sorted(front, key=lambda entry: entry.quality)
    if objective == "accuracy" or len(ordered) < 3:
        return ordered

    last = len(ordered) - 1
    half = last // 2
    places = [half, last, 0]
    spans = [(0, half), (half, last)]

    for low, high in spans:
        middle = (low + high) // 2
        if middle in (low, high):
            continue

        places.append(middle)
        spans.append((low, middle))
        spans.append((middle, high))

    return [ordered[place] for place in places]
