"""The axes of a chart, over round ticks, and the template that draws charts and page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jinja2
from markupsafe import Markup

from racdeploy.report.tables import number, plain, shorten

_INTERVALS = 5
_MOST_POWERS = 6  # intervals of a logarithmic axis

TickText = Callable[[float], str]


@dataclass(frozen=True)
class Frame:
    """The inside of a chart and the picture around it, in pixels."""

    left: float
    right: float
    top: float
    bottom: float
    height: float
    width: float = 460.0


FLAT = Frame(56, 444, 16, 254, height=300)
SQUARE = Frame(60, 440, 16, 396, height=442)
"""Equal scales across and upward, so that a diagonal has 45 degrees."""


@dataclass(frozen=True)
class Axis:
    """Data to pixels along one direction, from ``start`` to ``stop``."""

    label: str
    ticks: Sequence[float]
    start: float
    stop: float
    tick_text: TickText = number
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        first, last = self.ticks[0], self.ticks[-1]
        share = (value - first) / (last - first)
        if self.logarithmic:
            share = math.log(value / first) / math.log(last / first)
        return self.start + share * (self.stop - self.start)


def across(label: str, low: float, high: float, tick_text: TickText, frame: Frame = FLAT) -> Axis:
    """Return an axis from left to right."""
    return Axis(label, _round_ticks(low, high), frame.left, frame.right, tick_text)


def powers(base: float, low: float, high: float) -> list[float]:
    """Return the ticks of a logarithmic axis: powers of a base that cover the range."""
    first = math.floor(math.log(low, base) + 1e-9)
    last = max(math.ceil(math.log(high, base) - 1e-9), first + 1)
    step = math.ceil((last - first) / _MOST_POWERS)
    return [base**exponent for exponent in range(first, last + step, step)]


def tokens_text(most: float) -> TickText:
    """Return how counts up to ``most`` are written, all in one unit: as 0.5M, 200k or 50."""
    if most >= 1e6:
        return lambda tokens: f"{tokens / 1e6:g}M" if tokens else "0"
    if most >= 1e3:
        return lambda tokens: f"{tokens / 1e3:g}k" if tokens else "0"
    return number


def draw(chart: str, **values: object) -> Markup:
    """Draw a chart by its macro in ``charts.svg.jinja``."""
    macros = load_templates().get_template("charts.svg.jinja").module
    markup = getattr(macros, chart)(**values)
    # The template is laid out in lines; no text in a chart holds a line end.
    return Markup("".join(line.lstrip() for line in markup.split("\n")))


@cache
def load_templates() -> jinja2.Environment:
    """Return the environment of the page and the charts, which escapes everything."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("racdeploy.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    environment.filters.update(plain=plain, px="{:.1f}".format, number=number, shorten=shorten)
    return environment


def _round_ticks(low: float, high: float) -> list[float]:
    """Return ticks with about five intervals that cover the range."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / _INTERVALS))
    steps = [factor * magnitude for factor in (1, 2, 5, 10)]
    step = next(step for step in steps if span / step <= _INTERVALS + 1)

    # A hair of tolerance, so that rounding adds no interval to a range that ends on a tick.
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [index * step for index in range(first, last + 1)]
