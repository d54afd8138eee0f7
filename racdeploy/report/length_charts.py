"""Charts of how long both models think: prompt by prompt, how often, and task by task.

A few thoughts that run into the cap do not squeeze the others: they are in a band at the edge.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.labels import shorten
from racdeploy.report.pairs import Pair, TaskLengths, list_lengths
from racdeploy.report.tables import number

POINTS = 2000
"""Prompts that the chart of all prompts draws at most."""
_BINS = 32
_TASKS = 12
_NAME_CHARACTERS = 18
_DRAWN = ("right", "wrong", "won", "lost")
_NOTHING = Markup("")


def paired_lengths(pairs: Sequence[Pair], cap: int | None) -> Markup:
    """Draw thinking tokens, pruned over dense, one point per prompt, on equal scales."""
    if not pairs:
        return _NOTHING

    dense, pruned = list_lengths(pairs)
    both = dense + pruned
    x = axis.across_counts("dense: thinking tokens", both, axis.SQUARE)
    y = axis.upward_counts("pruned: thinking tokens", both, axis.SQUARE)

    bands = []
    if x.is_beyond(max(dense)):
        bands.append(x)
    if y.is_beyond(max(pruned)):
        bands.append(y)

    every = math.ceil(len(pairs) / POINTS)
    dots = []
    for pair in pairs[::every]:
        dots.append((pair.outcome, pair.dense, pair.pruned))

    # Those that pruning lost come last, on top.
    dots.sort(key=lambda dot: _DRAWN.index(dot[0]))
    return axis.draw("lengths", x=x, y=y, dots=dots, cap=cap, bands=bands, frame=axis.SQUARE)


def describe_lengths(pairs: Sequence[Pair], cap: int | None) -> str:
    """Return what a reader of the length charts has to know: points at the edge, and the cap."""
    if not pairs:
        return ""

    dense, pruned = list_lengths(pairs)
    x = axis.across_counts("", dense + pruned)
    beyond = sum(x.is_beyond(max(lengths)) for lengths in zip(dense, pruned, strict=True))

    sentences = []
    if beyond:
        prompts = "1 prompt goes" if beyond == 1 else f"{beyond:,} prompts go"
        sentences.append(f"{prompts} beyond {number(x.ticks[-1])} tokens, drawn at the edge.")
    if cap:
        sentences.append(f"Thinking is cut at {cap:,} tokens.")

    return " ".join(sentences)


def length_histogram(pairs: Sequence[Pair], cap: int | None) -> Markup:
    """Draw how often each thinking length occurs, both arms side by side, with the cap."""
    if not pairs:
        return _NOTHING

    dense, pruned = list_lengths(pairs)
    x = axis.across_counts("thinking tokens", dense + pruned)
    bin_tokens = x.ticks[-1] / _BINS
    counts = {"dense": _count(dense, x), "pruned": _count(pruned, x)}
    y = axis.upward("prompts", 0, max(counts["dense"] + counts["pruned"]))

    return axis.draw(
        "histogram", x=x, y=y, counts=counts, bins=_BINS, bin_tokens=bin_tokens, cap=cap
    )


def lengths_of_tasks(rows: Sequence[TaskLengths]) -> Markup:
    """Draw mean thinking tokens of each task, dense joined to pruned; none for a single task."""
    if len(rows) < 2:
        return _NOTHING

    shown = rows[:_TASKS]
    step = min(80.0, 352.0 / len(shown))
    bottom = 16 + step * len(shown)
    frame = axis.Frame(132, 400, 16, bottom, height=bottom + 46)

    longest = max(max(row.dense, row.pruned) for row in shown)
    x = axis.across("mean thinking tokens", 0, longest, frame=frame)

    names = []
    for row in shown:
        names.append(shorten(row.task, _NAME_CHARACTERS))

    return axis.draw("tasks", x=x, rows=shown, names=names, step=step, frame=frame)


def _count(lengths: Iterable[int], x: axis.Axis) -> list[int]:
    """Return how many lengths are in each bin, and in the last place those beyond all of them."""
    bin_tokens = x.ticks[-1] / _BINS

    places = Counter[int]()
    for length in lengths:
        inside = min(int(length / bin_tokens), _BINS - 1)
        places[_BINS if x.is_beyond(length) else inside] += 1

    return [places[place] for place in range(_BINS + 1)]
