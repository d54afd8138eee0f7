"""HTML page of a search for the best model: the winner, a chart, and every candidate.

Like the page of a report, it is self-contained, and all text in it is hostile. The chart shows
accuracy over size: the winner and its rival are labelled; every point has its figures as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from racdeploy.report.axis import Axis, draw_chart
from racdeploy.report.page import render_page
from racdeploy.report.tables import format_bytes
from racdeploy.report.toml_writer import to_toml
from racdeploy.report.tuning_tables import (
    find_min_accuracy,
    list_facts,
    make_tuning_table,
    meets_limits,
)
from racdeploy.results.tuning import Tuning

_TICKS = 5


def draw_accuracy(tuning: Tuning) -> Markup:
    """Draw the accuracy of all candidates that answered over their sizes; empty if none did."""
    shown = [each for each in tuning.candidates if each.accuracy]
    if not shown:
        return Markup("")

    sizes = [float(each.size_bytes) for each in shown]
    accuracies = [each.accuracy.value for each in shown if each.accuracy]
    return draw_chart(
        "candidates",
        x=_scale(sizes, 60, 730),
        y=_scale(accuracies, 340, 20, high_end=1.0),
        # The winner is drawn last, on top.
        shown=sorted(shown, key=lambda each: each.name == tuning.winner),
        tuning=tuning,
        min_accuracy=find_min_accuracy(tuning),
        size_text=format_bytes,
    )


def _scale(values: Sequence[float], start: float, stop: float, high_end: float = math.inf) -> Axis:
    """Return an axis over the values with a margin, between 0 and ``high_end``."""
    low, high = min(values), max(values)
    margin = max(0.15 * (high - low), 0.03 * abs(high)) or 0.05
    low, high = max(0.0, low - margin), min(high_end, high + margin)
    ticks = [low + index / _TICKS * (high - low) for index in range(_TICKS + 1)]
    return Axis("", ticks, start, stop)


_MAX_ROWS = 400
_TITLES = {"front": "Accuracy", "candidates": "Candidates", "again": "Reproduce"}


def render(tuning: Tuning) -> str:
    """Return the page."""
    table = make_tuning_table(tuning)
    chart = draw_accuracy(tuning)
    sections = {section: title for section, title in _TITLES.items() if chart or section != "front"}
    values = {
        "tuning": tuning,
        "chart": chart,
        "facts": list_facts(tuning),
        "is_kept": meets_limits(tuning),
        "recipe": to_toml(tuning.recipe),
        "tables": {table.title: table},
        "sections": sections,
        "row_limit": _MAX_ROWS,
        "source": "tune.json",
    }
    return render_page("tune.html.jinja", values)
