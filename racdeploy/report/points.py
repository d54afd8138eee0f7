"""A chart of named points with their intervals: models over size, speed or thinking length.

Points that coincide are rings around each other; what is not on the front is hollow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from racdeploy.report import axis
from racdeploy.report.labels import Anchor, Box, Label, group_marks, place_labels

_BAR_PIXELS = 5.0  # between the bars of marks that coincide
_NOTHING = Markup("")
_EDGE = 4.0  # pixels that keep the name of a limit off the edge of the picture

_Arrow = tuple[complex, complex, tuple[complex, ...]]
"""Both ends of the line, and the corners of the head, each x + iy in pixels."""


@dataclass(frozen=True)
class Point:
    """A model on a chart.

    Args:
        kind: ``dense``, ``pruned`` or ``rival``: its colour.
        lower: end of the interval of ``up``; so is ``upper``.
        text: what is read there.
        is_filled: whether it is on the front.
        is_named: whether its name is written beside it; else it is read on hover alone.
    """

    name: str
    kind: str
    across: float
    up: float
    lower: float
    upper: float
    text: str
    is_filled: bool = True
    is_named: bool = True


@dataclass(frozen=True)
class Limit:
    """A line that points shall not cross, with its name."""

    value: float
    name: str


@dataclass(frozen=True)
class _Line:
    """A limit as a line without width, and the places that its name may have, best first."""

    box: Box
    names: Sequence[Label]

    def choose_name(self, taken: Sequence[Box]) -> Label:
        """Return the name where it covers least."""
        return min(self.names, key=lambda name: sum(name.box.shared(other) for other in taken))


@dataclass(frozen=True)
class Mark:
    """A point in pixels, x + iy.

    Args:
        ring: how many marks are drawn inside it, at the same place.
        bar: where its interval is drawn, from the left.
    """

    point: Point
    place: complex
    ring: int = 0
    bar: float = 0.0


def draw_points(
    label: str,
    points: Sequence[Point],
    x: axis.Axis,
    y: axis.Axis,
    frame: axis.Frame,
    *,
    arrow: tuple[str, str] | None = None,
    limit_across: Limit | None = None,
    limit_up: Limit | None = None,
) -> Markup:
    """Draw points with bars and names; one alone compares nothing, and is not drawn.

    Args:
        arrow: names of the points that it leads from and to; drawn where both are there.
        limit_across: of what is on ``x``; left out where the axis does not reach it.
        limit_up: of what is on ``y``; the same.
    """
    if len(points) < 2:
        return _NOTHING

    marks = []
    for each in points:
        place = complex(x(each.across), y(each.up))
        marks.append(Mark(each, place))

    marks = _set_apart(marks)
    by_name = {mark.point.name: mark.place for mark in marks}
    drawn = _arrow(*(by_name.get(name) for name in arrow)) if arrow else None

    taken = [*_bars(marks, y), *_along(drawn), *(_around(mark.place) for mark in marks)]
    lines = _draw_limits(x, y, limit_across, limit_up)
    notes = [line.choose_name(taken) for line in lines]
    taken += [line.box.widened(2) for line in lines] + [note.box for note in notes]
    named = [mark for mark in marks if mark.point.is_named]

    names = place_labels(
        [mark.point.name for mark in named],
        [mark.place for mark in named],
        taken,
        Box(frame.left, 0, frame.width, frame.bottom),
    )
    return axis.draw(
        "points",
        label=label,
        x=x,
        y=y,
        marks=marks,
        names=names,
        arrow=drawn,
        lines=[line.box for line in lines],
        notes=notes,
        frame=frame,
    )


def _set_apart(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks, those that coincide as rings around each other with bars side by side."""
    found = list(marks)

    for group in group_marks([mark.place for mark in marks]):
        for depth, index in enumerate(group):
            inner = len(group) - 1 - depth
            shift = _BAR_PIXELS * (depth - (len(group) - 1) / 2)
            found[index] = replace(marks[index], ring=inner, bar=marks[index].place.real + shift)

    return found


def _draw_limits(x: axis.Axis, y: axis.Axis, across: Limit | None, up: Limit | None) -> list[_Line]:
    """Return the lines of the limits that the axes reach, and where their names may be."""
    lines = []

    if across and x.ticks[0] <= across.value <= x.ticks[-1]:
        place = x(across.value)
        right = place + _EDGE
        left = place - _EDGE

        names = []
        for height in (y.start - 6, y.stop + 10):
            names.append(_name(across, complex(right, height), "start"))
            names.append(_name(across, complex(left, height), "end"))
        lines.append(_Line(Box(place, y.stop, place, y.start), names))

    if up and y.ticks[0] <= up.value <= y.ticks[-1]:
        height = y(up.value)
        right = x.stop - _EDGE
        left = x.start + _EDGE

        names = []
        for line in (height - 5, height + 14):
            names.append(_name(up, complex(right, line), "end"))
            names.append(_name(up, complex(left, line), "start"))
        lines.append(_Line(Box(x.start, height, x.stop, height), names))

    return lines


def _name(limit: Limit, place: complex, anchor: Anchor) -> Label:
    return Label(limit.name, place, anchor, place)


def _bars(marks: Sequence[Mark], y: axis.Axis) -> list[Box]:
    """Return what the bars of the intervals cover."""
    boxes = []
    for mark in marks:
        across, top, bottom = mark.bar, y(mark.point.upper), y(mark.point.lower)
        boxes.append(Box(across - 2, top, across + 2, bottom))
    return boxes


def _around(place: complex) -> Box:
    return Box(place.real - 7, place.imag - 7, place.real + 7, place.imag + 7)


def _along(arrow: _Arrow | None) -> list[Box]:
    """Return small boxes along an arrow."""
    if arrow is None:
        return []

    tail, stop, _ = arrow
    steps = max(int(abs(stop - tail) / 6), 1)
    places = [tail + (stop - tail) * step / steps for step in range(steps + 1)]
    return [Box(at.real - 3, at.imag - 3, at.real + 3, at.imag + 3) for at in places]


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
