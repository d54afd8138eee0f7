"""Report as Markdown that fits into a pull-request comment: GitHub allows 65,536 characters.

Verdict, figures and checks are visible; lost prompts and details are folded. Texts of models and
prompts are escaped, and truncated with a note.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from racdeploy.report.pairs import AnswerPair, pair_records
from racdeploy.report.summary import is_widened, write_findings, write_headline
from racdeploy.report.tables import (
    HARNESS_TITLE,
    ReportTable,
    list_next_steps,
    list_tables,
    shorten,
    to_single_line,
)
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report

MAX_CHARACTERS = 60_000
_MAX_LOST, _LOST_CHARACTERS = 10, 16_000  # rows, and characters of all of them after escaping
_QUESTION_CHARACTERS, _ANSWER_CHARACTERS = 240, 80
_MAX_ROWS, _CELL_CHARACTERS = 30, 400
_OPEN = ("Checks", "Tasks", HARNESS_TITLE)  # after both arms; the other tables are folded
_SIGNS = {"pass": "✅", "fail": "❌", "inconclusive": "⚠️", "measured": "📏", "skipped": "➖"}
_SPECIAL = re.compile(r"([\\`*~|$\[\]])|(?<!\w)(_)|(_)(?!\w)")
_CUT = "_Cut at {:,} characters; the rest is in report.html and report.json._"
_LOST_COLUMNS = ("task", "question", "right", "{}", "{}", "thinking tokens")


def render(report: Report, records: Sequence[AnswerRecord] = ()) -> str:
    """Return the report as GitHub-flavoured Markdown.

    Args:
        records: of all arms; lost prompts are listed from them.
    """
    sign = "☑️" if is_widened(report) else _SIGNS[report.verdict]
    parts = [f"### {sign} {escape(write_headline(report))}"]
    if reasons := write_findings(report):
        parts.append(escape(reasons))

    tables_by_title = {table.title: table for table in list_tables(report)}
    shown = (report.both_roles, *_OPEN)
    parts += [
        write_table(tables_by_title.pop(title)) for title in shown if title in tables_by_title
    ]
    lost = [pair for pair in pair_records(records) if pair.outcome == "lost"]
    if lost:
        parts.append(_list_lost(lost, report.roles))
    if steps := list_next_steps(report):
        parts.append(_section("Next steps", _items(steps)))

    folded = [write_table(table) for table in tables_by_title.values()]
    if report.notes:
        notes = _items(report.notes[:_MAX_ROWS]) + _remainder(len(report.notes), "notes", "- ")
        folded.append(_section("Notes", notes))

    return _fit(parts, folded)


def escape(text: str) -> str:
    """Return the text on one line, with Markdown, HTML, mentions and issue links escaped."""
    text = html.escape(to_single_line(text), quote=False)
    text = _SPECIAL.sub(r"\\\g<0>", text)
    text = re.sub(r"#(?=\w)", "&#35;", text)
    text = re.sub(r"(?i)\bgh-(?=\d)", "GH&#45;", text)
    return text.replace("@", "&#64;").replace("://", "&#58;//").replace("www.", "www&#46;")


def _fit(parts: Sequence[str], folded: Sequence[str]) -> str:
    """Join visible and folded parts within the limit; the folded part is truncated first."""
    text = "\n\n".join(parts)
    remaining = MAX_CHARACTERS - len(text)
    if remaining < 0 or not folded:
        return f"{_cut(text, MAX_CHARACTERS)}\n"

    inside = _cut("\n\n".join(folded), remaining)
    return f"{text}\n\n{_fold('Details: recovery, deviations and notes', inside)}\n"


def _cut(text: str, characters: int) -> str:
    """Return a text, truncated at the end of a line with a note if it is too long."""
    if len(text) <= characters:
        return text
    shown = text[:characters].rpartition("\n")[0]
    return f"{shown}\n\n{_CUT.format(MAX_CHARACTERS)}"


def _fold(summary: str, text: str) -> str:
    # GitHub reads Markdown inside only after an empty line.
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def _list_lost(lost: Sequence[AnswerPair], roles: tuple[str, str]) -> str:
    """Return a folded table of prompts that only the first model answers right."""
    rules = ["---"] * (len(_LOST_COLUMNS) - 1) + ["---:"]
    lines = [_line(_LOST_COLUMNS).format(*roles), _line(rules)]
    remaining = _LOST_CHARACTERS
    shown = 0

    # Escaping can lengthen a text many times: the budget counts characters, not only rows.
    for pair in lost[:_MAX_LOST]:
        dense, pruned = pair.dense, pair.pruned
        cells = (
            shorten(dense.task, _ANSWER_CHARACTERS),
            shorten(dense.question, _QUESTION_CHARACTERS),
            shorten(dense.gold, _ANSWER_CHARACTERS),
            _answer(dense),
            _answer(pruned),
            f"{dense.thinking_tokens:,} → {pruned.thinking_tokens:,}",
        )
        line = _line(map(escape, cells))

        remaining -= len(line)
        if remaining < 0:
            break
        lines.append(line)
        shown += 1

    if shown < len(lost):
        lines += ["", f"_{len(lost) - shown:,} more are in report.html and records.jsonl._"]

    prompts = "1 prompt was" if len(lost) == 1 else f"{len(lost):,} prompts were"
    return _fold(f"{prompts} lost: {roles[0]} is right and {roles[1]} is not", "\n".join(lines))


def _answer(record: AnswerRecord) -> str:
    """Return the scored answer, or the reason why there is none."""
    if record.extracted is not None:
        return shorten(record.extracted, _ANSWER_CHARACTERS)
    if record.state == "open":
        if record.finish_reason == "stop":
            return "ends inside the thinking"
        return "repeats itself" if record.loop_tokens else "the thinking never ends"
    return f"no answer found: {shorten(record.answer_text, _ANSWER_CHARACTERS)}"


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"#### {title}", "", *lines])


def _items(texts: Iterable[str]) -> list[str]:
    return [f"- {escape(_clip(to_single_line(text)))}" for text in texts]


def write_table(table: ReportTable) -> str:
    """Return a table with its title, every cell escaped."""
    rules = []
    for is_numeric in table.numeric:
        rules.append("---:" if is_numeric else "---")

    lines = [_line(table.columns), _line(rules)]
    for row in table.rows[:_MAX_ROWS]:
        cells = [escape(_clip(cell)) for cell in row]
        if table.title == "Checks":
            verdict = row[1]
            cells[1] = f"{_SIGNS[verdict]} {verdict}"
        lines.append(_line(cells))

    if more := _remainder(len(table.rows), "rows"):
        lines += ["", *more]
    return _section(escape(table.title), lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _remainder(count: int, noun: str, prefix: str = "") -> list[str]:
    if count <= _MAX_ROWS:
        return []
    return [f"{prefix}_{count - _MAX_ROWS:,} more {noun} are in report.html and report.json._"]


def _clip(cell: str) -> str:
    more = len(cell) - _CELL_CHARACTERS
    return f"{cell[:_CELL_CHARACTERS]}… ({more:,} more characters)" if more > 0 else cell
