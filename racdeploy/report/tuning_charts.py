"""The picture of a search for the best model: accuracy over size, or over seconds an answer.

Plain SVG. A few names stand beside their points; every point has its figures as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from racdeploy.report.tables import number, plain, readable_bytes
from racdeploy.report.tuning import Candidate, Tuning
from racdeploy.report.tuning_tables import least_accuracy

_WIDTH, _HEIGHT = 760, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 730, 20, 340
_TICKS = 5
_LINE = '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="var(--{})" {}/>'
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
    """Draw the accuracy of all that answered; nothing where none has."""
    answered = [each for each in tuning.candidates if each.accuracy]
    limits = tuning.constraints
    by_time = limits.objective in ("speed", "seconds-per-correct-answer")
    across: Callable[[Candidate], float] = _seconds if by_time else lambda each: each.size_bytes
    shown = [each for each in answered if math.isfinite(across(each))]
    if not shown:
        return Markup("")

    label, write = ("size of the file", _write_bytes)
    if by_time:
        label, write = ("seconds an answer, predicted for the device", _write_seconds)
    x = _scale([across(each) for each in shown], _LEFT, _RIGHT)
    accuracies = [each.accuracy.value for each in shown if each.accuracy]
    y = _scale(accuracies, _BOTTOM, _TOP, low_end=0.0, high_end=1.0)

    parts = _draw_axes(x, y, label, write)
    least = least_accuracy(tuning)
    if least is not None and y.low <= least <= y.high:
        parts.append(_line(_LEFT, y(least), _RIGHT, y(least), "ink", 'stroke-dasharray="5 4"'))
    if not by_time and limits.max_bytes and x.low <= limits.max_bytes <= x.high:
        place = x(limits.max_bytes)
        parts.append(_line(place, _TOP, place, _BOTTOM, "ink", 'stroke-dasharray="5 4"'))
    for each in sorted(shown, key=lambda each: each.name == tuning.winner):
        parts.append(_draw_point(tuning, each, x(across(each)), y))

    title = f"Accuracy over {label}, by model"
    frame = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">'
    return Markup("").join([Markup(frame), *parts, Markup("</svg>")])


def _draw_axes(x: _Scale, y: _Scale, label: str, write: Callable[[float], str]) -> list[Markup]:
    parts = []
    for tick in y.ticks:
        parts.append(_line(_LEFT, y(tick), _RIGHT, y(tick), "line", 'stroke-width="1"'))
        parts.append(_text("tick", _LEFT - 8, y(tick) + 4, f"{tick:.1%}", "end"))
    for tick in x.ticks:
        parts.append(_text("tick", x(tick), _BOTTOM + 20, write(tick)))
    parts.append(_text("label", (_LEFT + _RIGHT) / 2, _BOTTOM + 44, label))
    return parts


def _draw_point(tuning: Tuning, each: Candidate, x: float, y: _Scale) -> Markup:
    assert each.accuracy
    color = "dense" if each.dense else "pruned"
    is_winner = each.name == tuning.winner
    up = y(each.accuracy.value)
    figures = f"{each.accuracy.value:.1%} right, {readable_bytes(each.size_bytes)}"
    ring = 'stroke="var(--ink)" stroke-width="3"' if is_winner else 'stroke="var(--card)"'

    dot = f'<circle cx="{x:.1f}" cy="{up:.1f}" r="7" fill="var(--{color})" {ring}><title>'
    parts = [
        _line(x, y(each.accuracy.lower), x, y(each.accuracy.upper), color, 'opacity=".5"'),
        Markup(dot) + escape(plain(f"{each.name}: {figures}")) + Markup("</title></circle>"),
    ]
    if each.name in (tuning.winner, tuning.rival):
        anchor = "end" if x > (_LEFT + _RIGHT) / 2 else "start"
        parts.append(_text("name", x, up - 14 if is_winner else up + 26, each.name, anchor))
    return Markup("").join(parts)


def _scale(
    values: Sequence[float],
    start: float,
    stop: float,
    low_end: float = 0.0,
    high_end: float = math.inf,
) -> _Scale:
    """Return a scale with some room around the values, within what values can be."""
    low, high = min(values), max(values)
    room = max(0.15 * (high - low), 0.03 * abs(high)) or 0.05
    return _Scale(max(low_end, low - room), min(high_end, high + room), start, stop)


def _line(x1: float, y1: float, x2: float, y2: float, color: str, more: str) -> Markup:
    return Markup(_LINE.format(x1, y1, x2, y2, color, more))


def _text(kind: str, x: float, y: float, content: str, anchor: str = "middle") -> Markup:
    return Markup(_TEXT.format(kind, x, y, anchor, escape(plain(content))))


def _seconds(each: Candidate) -> float:
    """Return the mean seconds of an answer, right or wrong."""
    cost, accuracy = each.seconds_per_correct, each.accuracy
    return cost.value * accuracy.value if cost and accuracy and accuracy.value else math.inf


def _write_bytes(value: float) -> str:
    return readable_bytes(round(value))


def _write_seconds(value: float) -> str:
    return f"{number(value)} s"
