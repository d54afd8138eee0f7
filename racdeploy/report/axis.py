"""The axes of a chart, over round ticks, and the template that draws charts and page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jinja2
from markupsafe import Markup

from racdeploy.report.tables import plain

_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 444.0, 16.0, 254.0  # of 460 by 300 pixels
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

TickText = Callable[[float], str]


@dataclass(frozen=True)
class Axis:
    """Data to pixels along one direction, from ``start`` to ``stop``."""

    label: str
    ticks: Sequence[float]
    start: float
    stop: float
    tick_text: TickText = "{:g}".format

    def __call__(self, value: float) -> float:
        first, last = self.ticks[0], self.ticks[-1]
        share = (value - first) / (last - first)
        return self.start + share * (self.stop - self.start)

    def log10(self, value: float) -> float:
        """Return the place of a value on an axis of decimal logarithms."""
        return self(math.log10(value))


def across(label: str, low: float, high: float, tick_text: TickText = "{:g}".format) -> Axis:
    """Return an axis from left to right."""
    return Axis(label, _round_ticks(low, high, most=5), _LEFT, _RIGHT, tick_text)


def upward(label: str, low: float, high: float, tick_text: TickText = "{:g}".format) -> Axis:
    """Return an axis from the bottom up."""
    return Axis(label, _round_ticks(low, high, most=4), _BOTTOM, _TOP, tick_text)


def upward_share(label: str, low: float, high: float) -> Axis:
    """Return an upward axis of percentages with as many digits as tell the ticks apart."""
    ticks = _round_ticks(low, high, most=4)
    digits = 0 if ticks[1] - ticks[0] >= 0.0099 else 1
    return Axis(label, ticks, _BOTTOM, _TOP, f"{{:.{digits}%}}".format)


def upward_decades(label: str, low: float, high: float) -> Axis:
    """Return an upward axis of decimal logarithms over whole powers of ten."""
    first = math.floor(math.log10(low))
    last = max(math.ceil(math.log10(high)), first + 1)
    step = max(1, math.ceil((last - first) / 6))
    ticks = range(first, last + step, step)
    return Axis(label, ticks, _BOTTOM, _TOP, _power_text)


def tokens_text(most: float) -> TickText:
    """Return how counts up to ``most`` are written, all in one unit: as 0.5M, 200k or 50."""
    if most >= 1e6:
        return lambda tokens: f"{tokens / 1e6:g}M" if tokens else "0"
    if most >= 1e3:
        return lambda tokens: f"{tokens / 1e3:g}k" if tokens else "0"
    return "{:g}".format


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

    environment.filters.update(plain=plain, px="{:.1f}".format)
    return environment


def _round_ticks(low: float, high: float, most: int) -> list[float]:
    """Return ticks with at most about ``most`` intervals that cover the range."""
    span = (high - low) or abs(high) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span / most))
    steps = [factor * magnitude for factor in (1, 2, 5, 10)]
    step = next(step for step in steps if span / step <= most + 1)

    # A hair of tolerance, so that rounding adds no interval to a range that ends on a tick.
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [index * step for index in range(first, last + 1)]


def _power_text(exponent: float) -> str:
    power = f"{exponent:.0f}".translate(_SUPERSCRIPTS)
    return f"10{power}"
