"""What every chart is made of: scales over round ticks, axes, marks with titles, and the SVG round them.

Text from outside (names of arms and linears) is escaped here, because the template takes a chart as finished markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from markupsafe import Markup, escape

from racdeploy.report.tables import plain

WIDTH, HEIGHT = 460.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 16.0, 46.0


@dataclass(frozen=True)
class Scale:
    """Data to pixels along one axis, over round ticks."""

    ticks: tuple[float, ...]
    start: float
    stop: float

    @classmethod
    def over(cls, low: float, high: float, start: float, stop: float, most: int) -> Scale:
        """Return a scale with at most about ``most`` intervals that covers the range."""
        span = (high - low) or abs(high) or 1.0
        magnitude = 10.0 ** math.floor(math.log10(span / most))
        step = next(m * magnitude for m in (1, 2, 5, 10) if span / (m * magnitude) <= most + 1)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(tuple(i * step for i in range(first, max(last, first + 1) + 1)), start, stop)

    def __call__(self, value: float) -> float:
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.start + share * (self.stop - self.start)


def x_scale(low: float, high: float) -> Scale:
    """Return a scale from left to right."""
    return Scale.over(low, high, _LEFT, WIDTH - _RIGHT, 5)


def y_scale(low: float, high: float) -> Scale:
    """Return a scale from the bottom up."""
    return Scale.over(low, high, HEIGHT - _BOTTOM, _TOP, 4)


def axes(
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str] = "{:g}".format,
    x_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """Draw ticks, grid lines and labels of both axes."""
    floor, middle = HEIGHT - _BOTTOM, (_TOP + HEIGHT - _BOTTOM) / 2
    marks = [text(x(tick), floor + 18, x_text(tick)) for tick in x.ticks]
    for tick in y.ticks:
        up = f"{y(tick):.1f}"
        marks.append(
            f'<line class="grid" x1="{_LEFT:g}" x2="{WIDTH - _RIGHT:g}" y1="{up}" y2="{up}"/>'
        )
        marks.append(text(_LEFT - 8, y(tick) + 4, y_text(tick), anchor="end"))
    marks.append(text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_label, "label"))
    turned = (
        f'<g transform="translate(12 {middle:g}) rotate(-90)">{text(0, 0, y_label, "label")}</g>'
    )
    return "".join([*marks, turned])


def rule_x(x: Scale, y: Scale, value: float, label: str) -> str:
    """Draw a labelled vertical line across the chart."""
    across = x(value)
    return (
        f'<line class="cap" x1="{across:.1f}" x2="{across:.1f}" y1="{y.start:g}" y2="{y.stop:g}"/>'
        f"{text(across - 5, y.stop + 11, label, anchor='end')}"
    )


def text(x: float, y: float, content: str, kind: str = "tick", anchor: str = "middle") -> str:
    """Draw one line of text."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(plain(content))}</text>'


def title(content: str) -> str:
    """Return what a browser shows on hover and a screen reader reads."""
    return f"<title>{escape(plain(content))}</title>"


def svg(marks: Iterable[str], label: str, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """Return a chart with an accessible name."""
    body = "".join(marks)
    return Markup(  # every text in it went through escape()
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )
