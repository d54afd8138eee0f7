"""A report on a terminal: rich tables, or aligned plain text where the output is a file or a pipe."""

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
    for title, lines in (
        ("Who wins where", who_wins(report)),
        ("Notes", [plain(note) for note in report.notes]),
    ):
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
    for line in _aligned(table):
        _print_line(console, line)


def _print_line(console: Console, text: str, style: str = "") -> None:
    # A pipe gets one line per line, however wide: what reads it may look for words.
    console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def _rich(table: Table) -> RichTable:
    rich_table = RichTable(title=Text(table.title), title_justify="left")
    for column in table.columns:
        rich_table.add_column(Text(column), overflow="fold")
    for row in table.rows:
        rich_table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return rich_table


def _aligned(table: Table) -> list[str]:
    rows = [table.columns, *table.rows]
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(table.columns))]
    padded = [
        "  ".join(
            cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)
        )
        for row in rows
    ]
    return [table.title, *(line.rstrip() for line in padded)]
