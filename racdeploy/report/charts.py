"""Charts of linears, blocks and traces as inline SVG; those of models and prompts lie beside.

What is drawn where; ``charts.svg.jinja`` draws it, without script and network and in the colours of
the style sheet. Every mark carries a ``<title>``, which browsers show on hover and screen readers
read. A chart that would show nothing is empty.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.model import (
    LinearRow,
    PositionRow,
    RecoveryRow,
    StructureRow,
)
from racdeploy.report.recovery import list_phases
from racdeploy.report.tables import say

_VARIED = 5e-4  # shares that differ by less look alike
_FLOOR = 1e-9  # in nats: below it a mean KL is rounding
_NAMED_BLOCKS = 16
_NAME_PIXELS = 14  # from one upright name to the next
_NOTHING = Markup("")
_LOOK = "{0.phase}, {0.tokens:,} tokens: KL {0.kl_nats:.3g} nats, {0.accuracy:.1%} right"

Cell = tuple[str, int]
"""Kind of a linear and its block."""
_Mark = tuple[RecoveryRow, complex, str]
"""A look, its place as x + iy in pixels, and what it saw."""
_End = tuple[str, float, float]
"""Name of a phase, where it ends and where the name is, both from the left in pixels."""


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
    """Draw one number per linear: blocks across, kinds down; numbers of one cell are averaged.

    Where all are alike there is nothing to see, and nothing is drawn.
    """
    cells: dict[Cell, list[float]] = defaultdict(list)
    for row in linears:
        number = value(row)
        if number is not None and math.isfinite(number):
            cells[_cell(row.name)].append(number)

    if not cells:
        return _NOTHING

    means = {cell: sum(numbers) / len(numbers) for cell, numbers in cells.items()}
    spread = max(means.values()) - min(means.values())
    if spread <= _VARIED * max(map(abs, means.values())):
        return _NOTHING

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

    x = axis.Axis("block", (0, len(structure)), axis.FLAT.left, axis.FLAT.right)
    y = axis.upward_share("kept", 0, 1)
    every = math.ceil(len(structure) / _NAMED_BLOCKS)

    names = []
    for row in structure[::every]:
        middle = x(row.block + 0.5)
        names.append((middle, str(row.block)))

    return axis.draw("widths", x=x, y=y, rows=structure, shares=cut, names=names)


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


def _cell(name: str) -> Cell:
    """Split a linear's name into its kind and its block, experts and the like folded into ``*``."""
    match = re.search(r"\.(\d+)\.(.+)", name)
    if match is None:
        return name, 0
    kind = re.sub(r"\.\d+\.", ".*.", match.group(2))
    return kind.removeprefix("self_attn.").removeprefix("mlp."), int(match.group(1))
