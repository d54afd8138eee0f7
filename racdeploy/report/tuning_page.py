"""HTML page of a search for the best model: the winner, a chart, and every candidate.

Like the page of a report, it is self-contained, and all text in it is hostile. The chart shows
accuracy over size: the winner and its rival are labelled; every point has its figures as a tooltip.
"""

from __future__ import annotations

from markupsafe import Markup

from racdeploy.report.charts import ModelPoint, draw_models
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

_MAX_ROWS = 400
_TITLES = {"front": "Accuracy", "candidates": "Candidates", "again": "Reproduce"}


def draw_accuracy(tuning: Tuning) -> Markup:
    """Draw the accuracy of all candidates that answered over their sizes; empty if none did."""
    points = []
    for candidate in tuning.candidates:
        if not candidate.accuracy:
            continue
        point = ModelPoint(
            name=candidate.name,
            x=candidate.size_bytes,
            accuracy=candidate.accuracy.value,
            lower=candidate.accuracy.lower,
            upper=candidate.accuracy.upper,
            is_dense=candidate.dense,
            is_named=candidate.name in (tuning.winner, tuning.rival),
            wins=candidate.name == tuning.winner,
        )
        points.append(point)

    return draw_models(
        points,
        "size of the file",
        format_bytes,
        least=find_min_accuracy(tuning),
        most=tuning.constraints.max_bytes,
    )


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
