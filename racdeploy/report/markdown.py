"""A report as Markdown that fits a pull-request comment, of which GitHub takes 65 536 characters.

Long tables and cells are cut with a sentence that says so.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from racdeploy.report.front import who_wins
from racdeploy.report.model import Report
from racdeploy.report.tables import Table, explanation, headline, plain, tables

LIMIT_CHARACTERS = 60_000
_ROWS, _CELL_CHARACTERS = 30, 400
_SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️"}
_SPECIAL = re.compile(r"([\\`*~|\[\]])|(?<!\w)(_)|(_)(?!\w)")
_CUT = f"_Cut at {LIMIT_CHARACTERS} characters; the rest is in report.html and report.json._"


def render(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown."""
    parts = [f"### {_SIGNS[report.verdict]} {escape(headline(report))}"]
    if reasons := explanation(report):
        parts.append(escape(reasons))
    parts += [_table(table) for table in tables(report)]

    if sentences := who_wins(report):
        parts.append(_section("Who wins where", _items(sentences)))
    if report.notes:
        notes = _items(report.notes[:_ROWS]) + _remainder(len(report.notes), "notes", "- ")
        parts.append(_section("Notes", notes))

    text = "\n\n".join(parts) + "\n"
    if len(text) <= LIMIT_CHARACTERS:
        return text

    kept = text[:LIMIT_CHARACTERS].rpartition("\n")[0]
    return f"{kept}\n\n{_CUT}\n"


def escape(text: str) -> str:
    """Return the text on one line; Markdown, HTML, mentions and issue links in it stay text."""
    text = html.escape(plain(text), quote=False)
    text = _SPECIAL.sub(r"\\\g<0>", text)
    text = re.sub(r"#(?=\w)", "&#35;", text)
    return text.replace("@", "&#64;").replace("://", "&#58;//").replace("www.", "www&#46;")


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"#### {title}", "", *lines])


def _items(texts: Iterable[str]) -> list[str]:
    return [f"- {escape(_clip(plain(text)))}" for text in texts]


def _table(table: Table) -> str:
    lines = [f"| {' | '.join(table.columns)} |", f"|{' --- |' * len(table.columns)}"]
    for row in table.rows[:_ROWS]:
        cells = [escape(_clip(cell)) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")

    if more := _remainder(len(table.rows), "rows"):
        lines += ["", *more]
    return _section(escape(table.title), lines)


def _remainder(count: int, noun: str, prefix: str = "") -> list[str]:
    if count <= _ROWS:
        return []
    return [f"{prefix}_{count - _ROWS} more {noun} are in report.html and report.json._"]


def _clip(cell: str) -> str:
    more = len(cell) - _CELL_CHARACTERS
    return f"{cell[:_CELL_CHARACTERS]}… ({more} more characters)" if more > 0 else cell
