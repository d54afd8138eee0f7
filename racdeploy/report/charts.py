"""Charts of the HTML report as inline SVG: no script, no network, colours from the style sheet.

What is drawn where; ``charts.svg.jinja`` draws it. Every mark carries a ``<title>``, which browsers
show on hover and screen readers read.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.model import (
    ArmSummary,
    LinearRow,
    PositionRow,
    Record,
    RecoveryRow,
    StructureRow,
)
from racdeploy.report.recovery import list_phases
from racdeploy.report.tables import readable_bytes, say

_BINS = 48
_POINTS = 2000
_FLOOR = 1e-9  # in nats: below it a mean KL is rounding
_NAME_PIXELS = 14  # from one upright name to the next
_NOTHING = Markup("")
_LOOK = "{0.phase}, {0.tokens:,} tokens: KL {0.kl_nats:.3g} nats, {0.accuracy:.1%} right"

Cell = tuple[str, int]
"""Kind of a linear and its block."""
ArmValue = tuple[ArmSummary, float]
_Arrow = tuple[complex, complex, tuple[complex, ...]]
"""Both ends of the line, and the corners of the head, each x + iy in pixels."""
_Mark = tuple[RecoveryRow, complex, str]
"""A look, its place as x + iy in pixels, and what it saw."""
_End = tuple[str, float, float]
"""Name of a phase, where it ends and where the name is, both from the left in pixels."""


def accuracy_against_length(arms: Sequence[ArmSummary]) -> Markup:
    """Draw accuracy over mean thinking length, with an arrow from dense to pruned."""
    values = [(arm, arm.thinking_tokens_mean) for arm in arms]
    measured = [(arm, value) for arm, value in values if value is not None]
    label = "Accuracy against mean thinking tokens, by model"
    return _accuracy_chart(label, measured, "mean thinking tokens", "{:.1f} tokens".format)


def accuracy_against_size(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw accuracy over the size of the file; arms that are not on the front are hollow."""
    sizes = [(arm, float(arm.size_bytes)) for arm in arms if arm.size_bytes]
    label = "Accuracy against size, by model"
    return _accuracy_chart(label, sizes, "size of the file", _bytes_text, _bytes_text, front)


def accuracy_against_speed(arms: Sequence[ArmSummary], front: Collection[str]) -> Markup:
    """Draw accuracy over decoding speed; arms that are not on the front are hollow."""
    speeds = [(arm, arm.tokens_per_s) for arm in arms if arm.tokens_per_s]
    value_text, tick_text = "{:,.0f} tokens/s".format, "{:,.0f}".format
    label = "Accuracy against speed, by model"
    return _accuracy_chart(label, speeds, "tokens/s decoded", value_text, tick_text, front)


def paired_lengths(pairs: Sequence[tuple[Record, Record]], cap: int | None) -> Markup:
    """Draw thinking tokens, pruned over dense, one point per prompt and at most 2000 points."""
    if not pairs:
        return _NOTHING

    longest = max(record.thinking_tokens for pair in pairs for record in pair)
    x = axis.across("dense: thinking tokens", 0, longest)
    y = axis.upward("pruned: thinking tokens", 0, longest)

    # Those that pruning lost come last, on top.
    every = math.ceil(len(pairs) / _POINTS)
    dots = [(_outcome(*pair), *pair) for pair in pairs[::every]]
    dots.sort(key=lambda dot: ("same", "won", "lost").index(dot[0]))
    return axis.draw("lengths", x=x, y=y, dots=dots, cap=cap)


def length_histogram(dense: Sequence[int], pruned: Sequence[int], cap: int | None) -> Markup:
    """Draw how often each thinking length occurs, both arms side by side, with the cap."""
    if not dense and not pruned:
        return _NOTHING

    x = axis.across("thinking tokens", 0, max([*dense, *pruned, cap or 0, 1]))
    bin_tokens = x.ticks[-1] / _BINS
    counts = {"dense": _count(dense, bin_tokens), "pruned": _count(pruned, bin_tokens)}
    most = max(counts["dense"] + counts["pruned"])
    y = axis.upward("prompts", 0, most)
    return axis.draw("histogram", x=x, y=y, counts=counts, bin_tokens=bin_tokens, cap=cap)


def divergence_along(rows: Sequence[PositionRow]) -> Markup:
    """Draw both divergences over the distance from the end of the prompt, logarithmically."""
    if not rows:
        return _NOTHING

    pruning = [max(row.pruning_kl_nats, _FLOOR) for row in rows]
    export = [max(row.export_kl_nats, _FLOOR) for row in rows]
    least, most = min(pruning + export), max(pruning + export)
    x = axis.across("completion tokens after the prompt", 0, rows[-1].stop_token)
    y = axis.upward_decades("KL in nats", least, most)
    values = {"pruning": pruning, "export": export}
    return axis.draw("divergence", x=x, y=y, rows=rows, values=values)


def heat_map(
    label: str, linears: Iterable[LinearRow], value: Callable[[LinearRow], float | None]
) -> Markup:
    """Draw one number per linear: blocks across, kinds down; numbers of one cell are averaged."""
    cells: dict[Cell, list[float]] = defaultdict(list)
    for row in linears:
        number = value(row)
        if number is not None and math.isfinite(number):
            cells[_cell(row.name)].append(number)

    if not cells:
        return _NOTHING

    means = {cell: sum(numbers) / len(numbers) for cell, numbers in cells.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in means))
    blocks = sorted({block for _, block in means})
    return axis.draw("heat", label=label, means=means, kinds=kinds, blocks=blocks)


def widths_by_block(structure: Sequence[StructureRow]) -> Markup:
    """Draw the shares of channels and of query heads that each block keeps; none if all are."""
    shares = {
        "channels": [row.channels / row.channels_dense for row in structure],
        "heads": [row.heads / row.heads_dense for row in structure],
    }
    cut = {name: kept for name, kept in shares.items() if any(share < 1 for share in kept)}
    if not cut:
        return _NOTHING

    x = axis.across("block", 0, len(structure))
    y = axis.upward_share("kept", 0, 1)
    return axis.draw("widths", x=x, y=y, rows=structure, shares=cut)


def recovery_over_tokens(rows: Sequence[RecoveryRow]) -> Markup:
    """Draw divergence and right answers over the tokens learned, one panel for each."""
    most = max((row.tokens for row in rows), default=0)
    if not most:
        return _NOTHING

    x = axis.across("tokens learned", 0, most, axis.tokens_text(most))
    ends = _phase_ends(rows, x)

    # Divergence falls, so the names of phases are at the top; right answers rise: at the bottom.
    return _recovery_kl(rows, x, ends) + _recovery_accuracy(rows, x, ends)


def _recovery_kl(rows: Sequence[RecoveryRow], x: axis.Axis, ends: Sequence[_End]) -> Markup:
    """Draw a line through the looks, logarithmically."""
    looks = []
    for row in rows:
        if row.kl_nats is not None and math.isfinite(row.kl_nats):
            looks.append((row, max(row.kl_nats, _FLOOR)))

    if not looks:
        return _NOTHING

    values = [value for _, value in looks]
    y = axis.upward_decades("KL in nats", min(values), max(values))
    marks = [_mark(row, x(row.tokens), y.log10(value)) for row, value in looks]

    return axis.draw(
        "recovery",
        label="Divergence from the dense model over the tokens learned",
        x=x,
        y=y,
        marks=marks,
        lines=_phase_lines(marks),
        ends=ends,
    )


def _recovery_accuracy(rows: Sequence[RecoveryRow], x: axis.Axis, ends: Sequence[_End]) -> Markup:
    """Draw a mark for each time that the calibration prompts were asked."""
    asked = []
    for row in rows:
        if row.accuracy is not None:
            asked.append((row, row.accuracy))

    if not asked:
        return _NOTHING

    shares = [share for _, share in asked]
    low = max(0.0, min(shares) - 0.02)
    high = min(1.0, max(shares) + 0.02)
    y = axis.upward_share("calibration prompts right", low, high)
    marks = [_mark(row, x(row.tokens), y(share)) for row, share in asked]

    return axis.draw(
        "recovery",
        label="Calibration prompts right over the tokens learned",
        x=x,
        y=y,
        marks=marks,
        lines={},
        ends=ends,
    )


def _mark(row: RecoveryRow, across: float, height: float) -> _Mark:
    return row, complex(across, height), say(_LOOK, row)


def _phase_lines(marks: Sequence[_Mark]) -> dict[tuple[str, bool], list[complex]]:
    """Return the line of each phase, from the last look that was kept, and whether it was kept."""
    lines: dict[tuple[str, bool], list[complex]] = {}
    start: list[complex] = []

    for row, place, _ in marks:
        line = lines.setdefault((row.phase, row.kept), list(start))
        line.append(place)
        if row.kept:
            start = [place]

    return lines


def _phase_ends(rows: Sequence[RecoveryRow], x: axis.Axis) -> list[_End]:
    """Return where each phase ends, and where its name is: left of that, clear of the next."""
    ends = []
    free = math.inf

    for phase in reversed(list_phases(rows)):
        if phase.tokens:
            end = x(phase.tokens)
            free = min(end - 4, free)
            ends.append((phase.phase, end, free))
            free -= _NAME_PIXELS

    return ends


def _accuracy_chart(
    label: str,
    values: Sequence[ArmValue],
    x_label: str,
    value_text: axis.TickText,
    tick_text: axis.TickText = "{:g}".format,
    front: Collection[str] | None = None,
) -> Markup:
    if not values:
        return _NOTHING

    arms = [arm for arm, _ in values]
    amounts = [value for _, value in values]
    low = min(arm.accuracy_lower for arm in arms) - 0.02
    high = max(arm.accuracy_upper for arm in arms) + 0.02
    x = axis.across(x_label, min(amounts) * 0.9, max(amounts) * 1.1, tick_text)
    y = axis.upward_share("accuracy", max(0.0, low), min(1.0, high))

    places = [complex(x(value), y(arm.accuracy)) for arm, value in values]
    heights = _label_heights(places)
    arrow = None
    if front is None:
        by_name = {arm.name: place for arm, place in zip(arms, places, strict=True)}
        arrow = _arrow(by_name.get("dense"), by_name.get("pruned"))

    marks = list(zip(arms, places, heights, map(value_text, amounts), strict=True))
    return axis.draw("accuracy", label=label, x=x, y=y, marks=marks, arrow=arrow, front=front)


def _label_heights(places: Sequence[complex]) -> list[float]:
    """Return a height for each name so that names of neighbouring marks do not overlap."""
    heights = [0.0] * len(places)
    taken: list[complex] = []

    top_first = sorted(range(len(places)), key=lambda index: places[index].imag)
    for index in top_first:
        place = places[index]
        near = [used.imag for used in taken if abs(place.real - used.real) < 130]

        height = place.imag - 9
        while any(abs(height - used) < 15 for used in near):
            height += 3
        heights[index] = height
        taken.append(complex(place.real, height))

    return heights


def _arrow(start: complex | None, stop: complex | None) -> _Arrow | None:
    """Return an arrow short of both circles; without a head where there is no room."""
    if start is None or stop is None or start == stop:
        return None

    length = abs(stop - start)
    if length < 22:
        return start, stop, ()

    along = (stop - start) / length
    tip = stop - 7 * along
    base = tip - 8 * along
    half_width = 4.5j * along
    return start + 7 * along, base, (tip, base + half_width, base - half_width)


def _cell(name: str) -> Cell:
    """Split a linear's name into its kind and its block, experts and the like folded into ``*``."""
    match = re.search(r"\.(\d+)\.(.+)", name)
    if match is None:
        return name, 0
    kind = re.sub(r"\.\d+\.", ".*.", match.group(2))
    return kind.removeprefix("self_attn.").removeprefix("mlp."), int(match.group(1))


def _count(lengths: Iterable[int], bin_tokens: float) -> list[int]:
    places = Counter(min(int(length / bin_tokens), _BINS - 1) for length in lengths)
    return [places[place] for place in range(_BINS)]


def _outcome(dense: Record, pruned: Record) -> str:
    if dense.correct == pruned.correct:
        return "same"
    return "lost" if dense.correct else "won"


def _bytes_text(value: float) -> str:
    return readable_bytes(round(value))
