"""A report on a terminal: rich tables, or aligned plain text in a file or a pipe.

No word is broken on a terminal of 80 columns: a table that is too wide is turned on its side, or
becomes a list.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from racdeploy.report.front import who_wins
from racdeploy.report.gains import describe_gains
from racdeploy.report.summary import explanation, headline
from racdeploy.report.tables import Table, list_next_steps, plain, tables
from racdeploy.report.tuning_tables import list_facts, tuning_table
from racdeploy.results.report import Report
from racdeploy.results.tuning import Tuning

_STYLES = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "measured": "dim",
    "skipped": "dim",
}
_ROWS = 20
_BORDERS = 3  # characters that a column takes beside its cells
_FEW = 4  # rows that can be columns


def print_report(report: Report, console: Console) -> None:
    """Print the report; cells are text, never rich markup."""
    print_verdict(report, console)
    if reasons := explanation(report):
        _print_line(console, reasons)

    for table in tables(report):
        _print_line(console, "")
        _print_shortened(table, console)

    lists = {
        "Next steps": list_next_steps(report),
        "Who wins where": who_wins(report),
        "Notes": [plain(note) for note in report.notes],
        "What was gained": describe_gains(report),
    }
    for title, lines in lists.items():
        if lines:
            _print_line(console, f"\n{title}")
        for line in lines:
            _print_line(console, f"- {line}")


def print_tuning(tuning: Tuning, console: Console) -> None:
    """Print a search for the best model; on a terminal without columns that have no room."""
    table = tuning_table(tuning, answered=True, brief=console.is_terminal)
    _print_shortened(table, console, "tune.html")
    others = sum(not each.prompts for each in tuning.candidates)
    _print_line(console, f"{others} candidates did not answer: tune.html says why")

    for note in tuning.notes:
        _print_line(console, f"- {plain(note)}")
    for name, text in list_facts(tuning):
        _print_line(console, f"{name.lower()}: {text}", "dim")
    _print_line(console, plain(tuning.verdict), "bold")


def print_verdict(report: Report, console: Console) -> None:
    """Print the verdict and what it is about, on one line."""
    _print_line(console, headline(report), _STYLES[report.verdict])


def print_table(table: Table, console: Console) -> None:
    """Print a table; no cell is cut short, however narrow the terminal is."""
    if not console.is_terminal:
        for line in _align(table):
            _print_line(console, line)
        return

    widths = _fit(table, console.width)
    if widths is None and len(table.rows) <= _FEW < len(table.columns):
        table = table.turn()
        widths = _fit(table, console.width)

    if widths is None:
        _print_list(table, console)
    else:
        console.print(_rich(table, widths))


def _print_shortened(table: Table, console: Console, page: str = "report.html") -> None:
    """Print a table of a report; on a terminal the end of a long one is left to the browser."""
    more = len(table.rows) - _ROWS
    if not console.is_terminal or more <= 0:
        print_table(table, console)
        return

    print_table(Table(table.title, table.columns, table.rows[:_ROWS]), console)
    _print_line(console, f"{more} more rows are in {page}", "dim")


def _print_line(console: Console, text: str, style: str = "") -> None:
    # A pipe gets one line per line, however wide: what reads it may look for words.
    wrap_softly = not console.is_terminal
    console.print(Text(text, style=style), soft_wrap=wrap_softly)


def _fit(table: Table, width: int) -> list[int] | None:
    """Return column widths that break no word; None where there is no room for them."""
    columns = list(zip(table.columns, *table.rows, strict=True))
    least = [max(map(cell_len, " ".join(column).split()), default=0) for column in columns]
    widths = [max(map(cell_len, column)) for column in columns]

    room = width - _BORDERS * len(columns) - 1
    if sum(least) > room:
        return None

    while sum(widths) > room:
        shrinkable = (index for index, width in enumerate(widths) if width > least[index])
        widths[max(shrinkable, key=widths.__getitem__)] -= 1

    return widths


def _print_list(table: Table, console: Console) -> None:
    """Print each row as a paragraph."""
    _print_line(console, table.title, "bold")

    for row in table.rows:
        _print_line(console, row[0])
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            if cell:
                _print_line(console, f"  {column}: {cell}")


def _rich(table: Table, widths: Sequence[int]) -> RichTable:
    rich_table = RichTable(title=Text(table.title), title_justify="left")
    for column, width, right in zip(table.columns, widths, table.numeric, strict=True):
        justify: JustifyMethod = "right" if right else "left"
        rich_table.add_column(Text(column), width=width, overflow="fold", justify=justify)

    for row in table.rows:
        cells = [Text(cell, style=_STYLES.get(cell, "")) for cell in row]
        rich_table.add_row(*cells)
    return rich_table


def _align(table: Table) -> list[str]:
    rows = [table.columns, *table.rows]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]

    lines = [table.title]
    for row in rows:
        padded = []
        for cell, width, right in zip(row, widths, table.numeric, strict=True):
            spaces = " " * (width - cell_len(cell))
            padded.append(spaces + cell if right else cell + spaces)
        lines.append("  ".join(padded).rstrip())

    return lines
