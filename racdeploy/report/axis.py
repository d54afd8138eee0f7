"""Axes of a chart with round ticks, and the templates of charts and pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jinja2
from markupsafe import Markup

from racdeploy.report.tables import format_number, shorten, to_single_line

_INTERVALS = 5
_MAX_POWERS = 6  # intervals of a logarithmic axis

TickFormatter = Callable[[float], str]


@dataclass(frozen=True)
class Frame:
    """Plotting area of a chart, and the size of its picture, in pixels."""

    left: float
    right: float
    top: float
    bottom: float
    height: float
    width: float = 460.0


FLAT_FRAME = Frame(56, 444, 16, 254, height=300)
SQUARE_FRAME = Frame(60, 440, 16, 396, height=442)
"""Equal scales of both axes, so that the diagonal has 45 degrees."""


@dataclass(frozen=True)
class Axis:
    """Axis that maps data to pixels, from ``start`` to ``stop``; call it with a value."""

    label: str
    ticks: Sequence[float]
    start: float
    stop: float
    format_tick: TickFormatter = format_number
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        first, last = self.ticks[0], self.ticks[-1]
        share = (value - first) / (last - first)
        if self.logarithmic:
            share = math.log(value / first) / math.log(last / first)
        return self.start + share * (self.stop - self.start)


def make_horizontal_axis(
    label: str, low: float, high: float, format_tick: TickFormatter, frame: Frame = FLAT_FRAME
) -> Axis:
    """Return an axis from left to right that covers a range."""
    # Ticks at multiples of 1, 2, 5 or 10, with about five intervals over the range.
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / _INTERVALS))
    steps = [factor * magnitude for factor in (1, 2, 5, 10)]
    step = next(step for step in steps if span / step <= _INTERVALS + 1)

    # A small tolerance, so that rounding adds no interval to a range that ends on a tick.
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return Axis(
        label,
        [index * step for index in range(first, last + 1)],
        frame.left,
        frame.right,
        format_tick,
    )


def list_power_ticks(base: float, low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis: powers of a base that cover the range."""
    first = math.floor(math.log(low, base) + 1e-9)
    last = max(math.ceil(math.log(high, base) - 1e-9), first + 1)
    step = math.ceil((last - first) / _MAX_POWERS)
    return [base**exponent for exponent in range(first, last + step, step)]


def make_token_formatter(max_tokens: float) -> TickFormatter:
    """Return a formatter of counts up to ``max_tokens``, all in one unit: as 0.5M, 200k or 50."""
    if max_tokens >= 1e6:
        return lambda tokens: f"{tokens / 1e6:g}M" if tokens else "0"
    if max_tokens >= 1e3:
        return lambda tokens: f"{tokens / 1e3:g}k" if tokens else "0"
    return format_number


def draw_chart(chart: str, **values: object) -> Markup:
    """Draw a chart by its macro in ``charts.svg.jinja``."""
    macros = load_templates().get_template("charts.svg.jinja").module
    markup = getattr(macros, chart)(**values)
    # The template is laid out in lines; no text in a chart holds a line end.
    return Markup("".join(line.lstrip() for line in markup.split("\n")))


@cache
def load_templates() -> jinja2.Environment:
    """Return the template environment of pages and charts, which escapes everything."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("racdeploy.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    environment.filters.update(
        plain=to_single_line, px="{:.1f}".format, number=format_number, shorten=shorten
    )
    return environment
