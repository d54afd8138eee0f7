"""A report as one HTML file: nothing is fetched, light and dark, on paper, and by the keyboard.

Prompts and answers are hostile text: the template escapes everything, and a content security policy
lets run only the page's own script and style, which it names by their hashes. The script shows
prompts page by page, copies, and opens everything for print; all else is there without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from markupsafe import Markup

from racdeploy.report import arm_charts, browser, charts, length_charts
from racdeploy.report.facts import list_facts, write_command
from racdeploy.report.front import front, who_wins
from racdeploy.report.highlights import highlights
from racdeploy.report.model import LinearRow, Record, Report
from racdeploy.report.page import render_page
from racdeploy.report.pairs import Pair, length_quantiles, lengths_by_task, pair_records
from racdeploy.report.settings import as_toml, list_sections
from racdeploy.report.summary import findings
from racdeploy.report.tables import HARNESS, Row, Table, list_next_steps, plain, tables

_ROWS = 200
_WORST = 8  # linears that are named
_VISIBLE = 5e-5  # an error that is more than 0.00 %
_COLUMNS = 4  # models that fit beside each other
_TITLES = {
    "checks": "Checks",
    "thinking": "Accuracy and thinking",
    "harness": HARNESS,
    "size": "Size and speed",
    "structure": "What is left of the model",
    "recovery": "Recovery",
    "pruning": "Pruning and export",
    "prompts": "Prompts",
    "made": "How it was made",
}


def render(report: Report, records: Sequence[Record] = (), bundle: str = "") -> str:
    """Return the page.

    Args:
        records: of the arms ``dense`` and ``pruned``; others are not drawn.
        bundle: the folder that the command on the page runs; without it there is no command.
    """
    pairs = pair_records(records)
    drawn = _draw_charts(report, pairs)
    by_title = _tables(report)

    values = {
        **drawn,
        "report": report,
        "sections": _list_sections(drawn, by_title, bool(pairs)),
        "findings": findings(report),
        "facts": list_facts(report),
        "command": write_command(bundle, records),
        "highlights": highlights(report),
        "next_steps": list_next_steps(report),
        "tables": by_title,
        "row_limit": _ROWS,
        "source": "report.json",
        "zeros": _describe_zeros(report.linears),
        "winners": who_wins(report),
        "quantiles": length_quantiles(pairs),
        "pairs": len(pairs),
        "points": length_charts.POINTS,
        "prompts": browser.list_prompts(pairs),
        "cut": browser.cut,
        "count_shared": browser.count_shared,
        "recipe": list_sections(report.recipe),
        "recipe_text": as_toml(report.recipe),
        "machine": list_sections(report.fingerprint),
        "machine_text": as_toml(report.fingerprint),
    }
    return render_page("report.html.jinja", values, ["report.js"])


def _draw_charts(report: Report, pairs: Sequence[Pair]) -> dict[str, Markup | str]:
    arms, linears, best = report.arms, report.linears, front(report.arms)
    cap = report.comparison.length_budget_tokens if report.comparison else None

    return {
        "accuracy_chart": arm_charts.accuracy_against_length(arms),
        "size_chart": arm_charts.accuracy_against_size(arms, best),
        "speed_chart": arm_charts.accuracy_against_speed(arms, best),
        "divergence_chart": charts.divergence_along(report.positions),
        "scatter_chart": length_charts.paired_lengths(pairs, cap),
        "histogram_chart": length_charts.length_histogram(pairs, cap),
        "tasks_chart": length_charts.lengths_of_tasks(lengths_by_task(pairs)),
        "lengths_note": length_charts.describe_lengths(pairs, cap),
        "widths_chart": charts.widths_by_block(report.structure),
        "recovery_chart": charts.recovery_over_tokens(report.recovery),
        "sparsity_chart": charts.heat_map(
            "Sparsity by linear", linears, attrgetter("sparsity_reached")
        ),
        "error_chart": charts.heat_map(
            "Held-out error by linear", linears, attrgetter("held_out_error")
        ),
    }


def _list_sections(
    drawn: dict[str, Markup | str], by_title: dict[str, Table], has_pairs: bool
) -> dict[str, str]:
    """Return the title of each part that has something to show, by its place in the page."""
    shown = {
        "checks": True,
        "thinking": drawn["accuracy_chart"] or has_pairs or "Tasks" in by_title,
        "harness": HARNESS in by_title,
        "size": "Dense and pruned" in by_title,
        "structure": "Kept" in by_title,
        "recovery": "Recovery" in by_title,
        "pruning": any(drawn[f"{name}_chart"] for name in ("sparsity", "error", "divergence"))
        or any(title in by_title for title in ("Drift", "Not as asked")),
        "prompts": has_pairs,
        "made": True,
    }
    return {place: title for place, title in _TITLES.items() if shown[place]}


def _tables(report: Report) -> dict[str, Table]:
    """Return the tables by title; few models are columns, and each name is short."""
    found = {table.title.partition(" from ")[0]: table for table in tables(report)}

    arms = found.get("Dense and pruned")
    if arms and len(arms.rows) <= _COLUMNS:
        head, *rows = zip(arms.columns, *arms.rows, strict=True)
        found["Dense and pruned"] = Table(arms.title, head, tuple(rows))

    worst = _worst_linears(report.linears)
    if worst:
        found["Worst linears"] = Table("Worst linears", ("linear", "held-out error"), worst)
    return found


def _worst_linears(linears: Sequence[LinearRow]) -> tuple[Row, ...]:
    measured = [(row.held_out_error or 0.0, row.name) for row in linears]
    worst = sorted(measured, key=lambda found: -found[0])[:_WORST]
    return tuple((plain(name), f"{error:.2%}") for error, name in worst if error >= _VISIBLE)


def _describe_zeros(linears: Sequence[LinearRow]) -> str:
    """Return one sentence where all linears have as many zeros; empty where they differ."""
    reached = {f"{row.sparsity_reached:.1%}" for row in linears}
    if len(reached) != 1 or reached == {"0.0%"}:
        return ""
    return f"Each of the {len(linears):,} linears has {reached.pop()} zeros."
