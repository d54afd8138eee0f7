"""Axes of a chart, and the templates of charts and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import jinja2
from markupsafe import Markup

from racdeploy.report.tables import format_number, shorten, to_single_line


@dataclass(frozen=True)
class Axis:
    """Axis that maps data to pixels, from ``start`` to ``stop``; call it with a value."""

    label: str
    ticks: Sequence[float]
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        first, last = self.ticks[0], self.ticks[-1]
        share = (value - first) / (last - first)
        if self.logarithmic:
            share = math.log(value / first) / math.log(last / first)
        return self.start + share * (self.stop - self.start)


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
