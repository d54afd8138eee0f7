"""HTML page of a search for the best model: the winner, a chart, and every candidate.

Like the page of a report, it is self-contained, and all text in it is hostile.
"""

from __future__ import annotations

from racdeploy.report.page import render_page
from racdeploy.report.toml_writer import to_toml
from racdeploy.report.tuning_charts import draw_accuracy
from racdeploy.report.tuning_tables import list_facts, make_tuning_table, meets_limits
from racdeploy.results.tuning import Tuning

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
