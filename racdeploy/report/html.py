"""A report as one HTML file: nothing is fetched, light and dark, on paper, and by the keyboard.

Prompts and answers are hostile text: the template escapes everything, and a content security policy
lets run only the page's own script and style, which it names by their hashes. The script shows
prompts page by page, copies, and opens everything for print; all else is there without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from racdeploy.report import browser, charts
from racdeploy.report.facts import list_facts, write_command
from racdeploy.report.front import who_wins
from racdeploy.report.gains import list_highlights
from racdeploy.report.page import render_page
from racdeploy.report.pairs import Pair, length_quantiles, list_lengths, pair_records
from racdeploy.report.settings import as_toml
from racdeploy.report.summary import findings
from racdeploy.report.tables import (
    HARNESS,
    Row,
    Table,
    list_next_steps,
    make_tables,
    number,
    share_range,
    tables,
)
from racdeploy.results.answers import Record
from racdeploy.results.pruning import LinearRow
from racdeploy.results.report import Report

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
    by_title = _tables(report, pairs)
    zeros = _describe_zeros(report.linears)
    cap = report.comparison.length_budget_tokens if report.comparison else None

    shown = {
        "checks": True,
        "thinking": pairs or len(report.arms) > 1 or "Tasks" in by_title,
        "harness": HARNESS in by_title,
        "size": "Dense and pruned" in by_title,
        "structure": "Kept" in by_title,
        "recovery": "Recovery" in by_title,
        "pruning": zeros or {"Worst linears", "Drift", "Not as asked"} & by_title.keys(),
        "prompts": pairs,
        "made": True,
    }

    values = {
        "report": report,
        "sections": {place: title for place, title in _TITLES.items() if shown[place]},
        "findings": findings(report),
        "facts": list_facts(report),
        "command": write_command(bundle, records),
        "highlights": list_highlights(report),
        "next_steps": list_next_steps(report),
        "tables": by_title,
        "row_limit": _ROWS,
        "source": "report.json",
        "zeros": zeros,
        "winners": who_wins(report),
        "accuracy_chart": charts.accuracy_by_arm(report.arms),
        "scatter_chart": charts.thinking_by_prompt(pairs, cap),
        "recovery_chart": charts.recovery_over_tokens(report.recovery),
        "cap": cap,
        "quantiles": length_quantiles(pairs),
        "pairs": len(pairs),
        "points": charts.POINTS,
        "prompts": browser.list_prompts(pairs),
        "cut": browser.cut,
        "count_shared": browser.count_shared,
        "recipe": as_toml(report.recipe),
        "machine": as_toml(report.fingerprint),
    }
    return render_page("report.html.jinja", values, ["report.js"])


def _tables(report: Report, pairs: Sequence[Pair]) -> dict[str, Table]:
    """Return the tables by their short title, and those that only a page has."""
    found = {table.title.partition(" from ")[0]: table for table in tables(report)}

    arms = found.get("Dense and pruned")
    if arms and len(arms.rows) <= _COLUMNS:
        found["Dense and pruned"] = arms.turn()

    own = {
        ("Worst linears", "linear|held-out error"): _worst_linears(report.linears),
        ("Thinking by task", "task|prompts|dense|pruned|change"): _thinking_by_task(pairs),
    }
    return found | {table.title: table for table in make_tables(own)}


def _worst_linears(linears: Sequence[LinearRow]) -> tuple[Row, ...]:
    measured = [(row.held_out_error or 0.0, row.name) for row in linears]
    worst = sorted(measured, key=lambda found: -found[0])[:_WORST]
    return tuple((name, f"{error:.2%}") for error, name in worst if error >= _VISIBLE)


def _thinking_by_task(pairs: Sequence[Pair]) -> tuple[Row, ...]:
    """Return mean thinking tokens, the task that got longest first; nothing for a single task."""
    by_task: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_task[pair.dense.task].append(pair)
    if len(by_task) < 2:
        return ()

    rows = []
    for task, alike in by_task.items():
        dense, pruned = (sum(lengths) / len(alike) for lengths in list_lengths(alike))
        change = round(100 * (pruned / dense - 1)) if dense else 0
        sign = "+" if change > 0 else ""

        cells = (
            task,
            f"{len(alike):,}",
            f"{dense:,.1f}",
            f"{pruned:,.1f}",
            f"{sign}{number(change)}%",
        )
        rows.append((dense - pruned, cells))

    return tuple(cells for _, cells in sorted(rows))


def _describe_zeros(linears: Sequence[LinearRow]) -> str:
    """Return how many zeros the linears have, as a sentence; empty where there are none."""
    reached = share_range(row.sparsity_reached for row in linears) if linears else "0.0%"
    if reached == "0.0%":
        return ""
    return f"Each of the {len(linears):,} linears has {reached} zeros."
