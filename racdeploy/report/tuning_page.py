"""The page of a search for the best model: who wins, one picture, every candidate.

As the page of a report: one file that fetches nothing, and all text in it is hostile.
"""

from __future__ import annotations

from racdeploy.report.page import render_page
from racdeploy.report.settings import as_toml
from racdeploy.report.tuning_charts import draw_accuracy
from racdeploy.report.tuning_tables import keeps_limits, list_facts, tuning_table
from racdeploy.results.tuning import Tuning

_ROWS = 400
_TITLES = {"front": "Accuracy", "candidates": "Candidates", "again": "Build it again"}


def render(tuning: Tuning) -> str:
    """Return the page."""
    table = tuning_table(tuning)
    chart = draw_accuracy(tuning)
    sections = {place: title for place, title in _TITLES.items() if chart or place != "front"}
    values = {
        "tuning": tuning,
        "chart": chart,
        "facts": list_facts(tuning),
        "is_kept": keeps_limits(tuning),
        "recipe": as_toml(tuning.recipe),
        "tables": {table.title: table},
        "sections": sections,
        "row_limit": _ROWS,
        "source": "tune.json",
    }
    return render_page("tune.html.jinja", values)
