"""What every chart is made of: scales over round ticks, axes, SVG elements and the SVG itself.

Text from outside (names of arms and linears) is escaped here, because the template takes a chart as
finished markup.
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
        steps = [factor * magnitude for factor in (1, 2, 5, 10)]
        step = next(step for step in steps if span / step <= most + 1)

        # A hair of tolerance, so that rounding adds no interval to a range that ends on a tick.
        first = math.floor(low / step + 1e-9)
        last = max(math.ceil(high / step - 1e-9), first + 1)
        ticks = [index * step for index in range(first, last + 1)]
        return cls(tuple(ticks), start, stop)

    def __call__(self, value: float) -> float:
        first, last = self.ticks[0], self.ticks[-1]
        share = (value - first) / (last - first)
        return self.start + share * (self.stop - self.start)


def x_scale(low: float, high: float) -> Scale:
    """Return a scale from left to right."""
    return Scale.over(low, high, start=_LEFT, stop=WIDTH - _RIGHT, most=5)


def y_scale(low: float, high: float) -> Scale:
    """Return a scale from the bottom up."""
    return Scale.over(low, high, start=HEIGHT - _BOTTOM, stop=_TOP, most=4)


def axes(
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str] = "{:g}".format,
    x_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """Draw ticks, grid lines and labels of both axes."""
    right, floor = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    marks = [text(x(tick), floor + 18, x_text(tick)) for tick in x.ticks]

    for tick in y.ticks:
        up = y(tick)
        marks.append(tag("line", "grid", x1=f"{_LEFT:g}", x2=f"{right:g}", y1=up, y2=up))
        marks.append(text(_LEFT - 8, up + 4, y_text(tick), anchor="end"))

    marks.append(text((_LEFT + right) / 2, HEIGHT - 6, x_label, "label"))
    turn = f"translate(12 {(_TOP + floor) / 2:g}) rotate(-90)"
    marks.append(tag("g", content=text(0, 0, y_label, "label"), transform=turn))
    return "".join(marks)


def rule_x(x: Scale, y: Scale, value: float, label: str) -> str:
    """Draw a labelled vertical line across the chart."""
    across = x(value)
    line = tag("line", "cap", x1=across, x2=across, y1=f"{y.start:g}", y2=f"{y.stop:g}")
    return line + text(across - 5, y.stop + 11, label, anchor="end")


def text(x: float, y: float, content: str, kind: str = "tick", anchor: str = "middle") -> str:
    """Draw one line of text."""
    words = escape(plain(content))
    return tag("text", kind, words, x=float(x), y=float(y), text_anchor=anchor)


def title(content: str) -> str:
    """Return what a browser shows on hover and a screen reader reads."""
    return f"<title>{escape(plain(content))}</title>"


def tag(name: str, kind: str = "", content: str = "", **attributes: float | str) -> str:
    """Return one element; ``kind`` is its class, and numbers with a fraction get one digit.

    ``content`` and attributes are markup: text from outside comes through :func:`text` or
    :func:`title`.
    """
    parts = [name]
    if kind:
        parts.append(f'class="{kind}"')

    for key, value in attributes.items():
        shown = f"{value:.1f}" if isinstance(value, float) else value
        parts.append(f'{key.replace("_", "-")}="{shown}"')

    start = " ".join(parts)
    return f"<{start}>{content}</{name}>" if content else f"<{start}/>"


def svg(marks: Iterable[str], label: str, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """Return a chart with an accessible name."""
    opening = (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
    )
    body = "".join(marks)
    return Markup(f"{opening}{body}</svg>")  # every text in it went through escape()
