"""Report as one HTML file: self-contained, light and dark, printable, usable by keyboard.

Prompts and answers are hostile text: the template escapes everything, and a content security policy
allows only the page's own script and style, by their hashes. The script shows prompts page by page,
copies, and opens everything for print; the rest works without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from markupsafe import Markup

from racdeploy.report import charts, prompt_list
from racdeploy.report.facts import list_facts, write_command
from racdeploy.report.gains import list_highlights
from racdeploy.report.page import render_page
from racdeploy.report.pairs import AnswerPair, length_quantiles, list_thinking_lengths, pair_records
from racdeploy.report.sentences import count_sentences
from racdeploy.report.summary import is_widened, write_findings
from racdeploy.report.tables import (
    HARNESS_TITLE,
    ReportTable,
    TableRow,
    format_number,
    list_next_steps,
    list_tables,
    make_table,
)
from racdeploy.report.toml_writer import to_toml
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import BUILT_ROLES, Report

_MAX_ROWS = 200
_WORST_LINEARS = 8
_MIN_ERROR = 5e-5  # a smaller error prints as 0.00 %
_MAX_COLUMNS = 4  # models that fit side by side
_TITLES = {
    "checks": "Checks",
    "thinking": "Accuracy and thinking",
    "harness": HARNESS_TITLE,
    "size": "Size and speed",
    "structure": "Structure",
    "recovery": "Recovery",
    "pruning": "Pruning and export",
    "prompts": "Prompts",
    "made": "Settings and machine",
}


def render(report: Report, records: Sequence[AnswerRecord] = (), bundle: str = "") -> str:
    """Return the page.

    Args:
        records: of the arms ``dense`` and ``pruned``; others are ignored.
        bundle: folder in the command on the page; empty for no command.
    """
    pairs = pair_records(records)
    tables_by_title = _tables(report, pairs)
    cap = report.comparison.length_budget_tokens if report.comparison else None

    # Sections without content are left out of the page and of its navigation.
    shown = {
        "checks": True,
        "thinking": pairs or "Tasks" in tables_by_title,
        "harness": HARNESS_TITLE in tables_by_title,
        "size": report.both_roles in tables_by_title,
        "structure": "Structure" in tables_by_title,
        "recovery": "Recovery" in tables_by_title,
        "pruning": {"Worst linears", "Drift", "Deviations"} & tables_by_title.keys(),
        "prompts": pairs,
        "made": True,
    }

    values = {
        "report": report,
        "roles": dict(zip(BUILT_ROLES, report.roles, strict=True)),
        "sections": {section: title for section, title in _TITLES.items() if shown[section]},
        "findings": write_findings(report),
        "is_widened": is_widened(report),
        "facts": list_facts(report),
        "command": write_command(bundle, records),
        "highlights": list_highlights(report),
        "next_steps": list_next_steps(report),
        "tables": tables_by_title,
        "row_limit": _MAX_ROWS,
        "source": "report.json",
        "models_chart": _draw_models(report),
        "scatter_chart": charts.draw_thinking_by_prompt(pairs, cap, report.roles),
        "cap": cap,
        "quantiles": length_quantiles(pairs),
        "pairs": len(pairs),
        "points": charts.MAX_POINTS,
        "prompts": prompt_list.list_prompts(pairs),
        "cut": prompt_list.truncate,
        "count_shared": prompt_list.count_shared_characters,
        "recipe": to_toml(report.recipe),
        "machine": to_toml(report.fingerprint),
    }
    return render_page("report.html.jinja", values, ["report.js"])


def _tables(report: Report, pairs: Sequence[AnswerPair]) -> dict[str, ReportTable]:
    """Return the tables by their short title, and those that only a page has."""
    tables_by_title = {table.title.partition(" from ")[0]: table for table in list_tables(report)}

    arms = tables_by_title.get(report.both_roles)
    if arms and len(arms.rows) <= _MAX_COLUMNS:
        tables_by_title[report.both_roles] = arms.transpose()

    dense, pruned = report.roles
    measured = [(row.held_out_error or 0.0, row.name) for row in report.linears]
    worst = sorted(measured, key=lambda pair: -pair[0])[:_WORST_LINEARS]
    worst_rows = [(name, f"{error:.2%}") for error, name in worst if error >= _MIN_ERROR]
    task_columns = ("task", "prompts", dense, pruned, "change")
    page_tables = (
        make_table("Worst linears", ("linear", "held-out error"), worst_rows),
        make_table("Thinking by task", task_columns, _thinking_by_task(pairs)),
        make_table("Sentences of a thought", ("sentences", dense, pruned), _mean_sentences(pairs)),
    )

    for table in page_tables:
        if table.rows:
            tables_by_title[table.title] = table
    return tables_by_title


def _draw_models(report: Report) -> Markup:
    """Draw accuracy over thinking, if there are more models than the two that are compared."""
    points = []
    for arm in report.arms:
        if not arm.thinking_tokens_mean:
            continue
        point = charts.ModelPoint(
            name=arm.name,
            x=arm.thinking_tokens_mean,
            accuracy=arm.accuracy,
            lower=arm.accuracy_lower,
            upper=arm.accuracy_upper,
            is_dense=arm.name.startswith("dense"),
            wins=arm.name == "pruned",
        )
        points.append(point)

    return charts.draw_models(
        points if len(points) > len(BUILT_ROLES) else [], "mean thinking tokens", format_number
    )


def _mean_sentences(pairs: Sequence[AnswerPair]) -> list[TableRow]:
    """Return the mean number of sentences in a thought, by kind; without kinds that none has."""
    dense = count_sentences(pair.dense.thinking_text for pair in pairs)
    pruned = count_sentences(pair.pruned.thinking_text for pair in pairs)

    rows: list[TableRow] = []
    for kind in dense:
        if dense[kind] or pruned[kind]:
            dense_mean = dense[kind] / len(pairs)
            pruned_mean = pruned[kind] / len(pairs)
            rows.append((kind, f"{dense_mean:.2f}", f"{pruned_mean:.2f}"))
    return rows


def _thinking_by_task(pairs: Sequence[AnswerPair]) -> tuple[TableRow, ...]:
    """Return mean thinking tokens by task, the largest increase first; empty for a single task."""
    pairs_by_task: dict[str, list[AnswerPair]] = defaultdict(list)
    for pair in pairs:
        pairs_by_task[pair.dense.task].append(pair)
    if len(pairs_by_task) < 2:
        return ()

    rows = []
    for task, task_pairs in pairs_by_task.items():
        dense, pruned = (
            sum(lengths) / len(task_pairs) for lengths in list_thinking_lengths(task_pairs)
        )
        change = round(100 * (pruned / dense - 1)) if dense else 0
        sign = "+" if change > 0 else ""

        cells = (
            task,
            f"{len(task_pairs):,}",
            f"{dense:,.1f}",
            f"{pruned:,.1f}",
            f"{sign}{format_number(change)}%",
        )
        rows.append((dense - pruned, cells))  # the sort key: the largest increase comes first

    return tuple(cells for _, cells in sorted(rows))
