"""The picture of a search for the best model: accuracy over size.

Plain SVG. A few names stand beside their points; every point has its figures as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from racdeploy.report.tables import plain, readable_bytes
from racdeploy.report.tuning_tables import least_accuracy
from racdeploy.results.tuning import Candidate, Tuning

_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 730, 20, 340
_TICKS = 5
_DASHED = 'stroke-dasharray="5 4"'
_LINE = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="var(--{})" {}/>'
_DOT = '<circle cx="{:.1f}" cy="{:.1f}" r="7" fill="var(--{})" {}><title>'
_TEXT = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'


@dataclass(frozen=True)
class _Scale:
    """Values to pixels, from ``low`` at ``start`` to ``high`` at ``stop``."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        return [self.low + place / _TICKS * (self.high - self.low) for place in range(_TICKS + 1)]


def draw_accuracy(tuning: Tuning) -> Markup:
    """Draw the accuracy of all that answered over their sizes; nothing where none has."""
    shown = [each for each in tuning.candidates if each.accuracy]
    if not shown:
        return Markup("")

    x = _scale([float(each.size_bytes) for each in shown], _LEFT, _RIGHT)
    accuracies = [each.accuracy.value for each in shown if each.accuracy]
    y = _scale(accuracies, _BOTTOM, _TOP, high_end=1.0)
    parts = [*_draw_axes(x, y), *_draw_limits(tuning, x, y)]

    # The winner comes last, on top.
    for each in sorted(shown, key=lambda each: each.name == tuning.winner):
        parts.append(_draw_point(tuning, each, x(each.size_bytes), y))

    title = "Accuracy over size, by model"
    frame = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">'
    return Markup("").join([Markup(frame), *parts, Markup("</svg>")])


def _draw_limits(tuning: Tuning, x: _Scale, y: _Scale) -> Iterator[Markup]:
    least, most_bytes = least_accuracy(tuning), tuning.constraints.max_bytes
    if least is not None and y.low <= least <= y.high:
        yield _line(_LEFT, y(least), _RIGHT, y(least), "ink", _DASHED)
    if most_bytes and x.low <= most_bytes <= x.high:
        yield _line(x(most_bytes), _TOP, x(most_bytes), _BOTTOM, "ink", _DASHED)


def _draw_axes(x: _Scale, y: _Scale) -> Iterator[Markup]:
    for tick in y.ticks:
        yield _line(_LEFT, y(tick), _RIGHT, y(tick), "line", 'stroke-width="1"')
        yield _text("tick", _LEFT - 8, y(tick) + 4, f"{tick:.1%}", "end")
    for tick in x.ticks:
        yield _text("tick", x(tick), _BOTTOM + 20, readable_bytes(round(tick)))
    yield _text("label", (_LEFT + _RIGHT) / 2, _BOTTOM + 44, "size of the file")


def _draw_point(tuning: Tuning, each: Candidate, x: float, y: _Scale) -> Markup:
    accuracy = each.accuracy
    assert accuracy
    color = "dense" if each.dense else "pruned"
    bar = _line(x, y(accuracy.lower), x, y(accuracy.upper), color, 'opacity=".5"')

    up = y(accuracy.value)
    is_winner = each.name == tuning.winner
    ring = 'stroke="var(--ink)" stroke-width="3"' if is_winner else ""
    dot = _DOT.format(x, up, color, ring)
    figures = f"{each.name}: {accuracy.value:.1%} right, {readable_bytes(each.size_bytes)}"
    parts = [bar, Markup(dot), escape(plain(figures)), Markup("</title></circle>")]

    if each.name in (tuning.winner, tuning.rival):
        anchor = "end" if x > (_LEFT + _RIGHT) / 2 else "start"
        parts.append(_text("name", x, up - 14 if is_winner else up + 26, each.name, anchor))
    return Markup("").join(parts)


def _scale(
    values: Sequence[float],
    start: float,
    stop: float,
    high_end: float = math.inf,
) -> _Scale:
    """Return a scale with some room around the values, within what values can be."""
    low, high = min(values), max(values)
    room = max(0.15 * (high - low), 0.03 * abs(high)) or 0.05
    return _Scale(max(0.0, low - room), min(high_end, high + room), start, stop)


def _line(x1: float, y1: float, x2: float, y2: float, color: str, more: str) -> Markup:
    return Markup(_LINE.format(x1, y1, x2, y2, color, more))


def _text(kind: str, x: float, y: float, content: str, anchor: str = "middle") -> Markup:
    return Markup(_TEXT.format(kind, x, y, anchor, escape(plain(content))))
