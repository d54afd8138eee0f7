"""A report on a terminal: rich tables, or aligned plain text in a file or a pipe."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from racdeploy.report.front import who_wins
from racdeploy.report.model import Report
from racdeploy.report.tables import Table, explanation, headline, plain, tables

_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "skipped": "dim"}


def print_report(report: Report, console: Console) -> None:
    """Print the report; cells are text, never rich markup."""
    _print_line(console, headline(report), _STYLES[report.verdict])
    if reasons := explanation(report):
        _print_line(console, reasons)

    for table in tables(report):
        _print_line(console, "")
        print_table(table, console)

    notes = [plain(note) for note in report.notes]
    for title, lines in (("Who wins where", who_wins(report)), ("Notes", notes)):
        if lines:
            _print_line(console, "")
            _print_line(console, title)
        for line in lines:
            _print_line(console, f"- {line}")


def print_table(table: Table, console: Console) -> None:
    """Print a table; no cell is cut short, however narrow the terminal is."""
    if console.is_terminal:
        console.print(_rich(table))
        return
    for line in _align(table):
        _print_line(console, line)


def _print_line(console: Console, text: str, style: str = "") -> None:
    # A pipe gets one line per line, however wide: what reads it may look for words.
    wrap_softly = not console.is_terminal
    console.print(Text(text, style=style), soft_wrap=wrap_softly)


def _rich(table: Table) -> RichTable:
    rich_table = RichTable(title=Text(table.title), title_justify="left")
    for column in table.columns:
        rich_table.add_column(Text(column), overflow="fold")
    for row in table.rows:
        cells = [Text(cell, style=_STYLES.get(cell, "")) for cell in row]
        rich_table.add_row(*cells)
    return rich_table


def _align(table: Table) -> list[str]:
    rows = [table.columns, *table.rows]
    columns = zip(*rows, strict=True)
    widths = [max(cell_len(cell) for cell in column) for column in columns]

    lines = [table.title]

    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [cell + " " * (width - cell_len(cell)) for cell, width in cells]
        lines.append("  ".join(padded).rstrip())

    return lines
