"""Report on a terminal: rich tables, or aligned plain text in a file or a pipe.

No word is broken on a terminal of 80 columns: a table that is too wide is transposed, or printed
as a list.
"""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table as RichTable
from rich.text import Text

from racdeploy.report.gains import list_highlights
from racdeploy.report.summary import is_widened, write_findings, write_headline
from racdeploy.report.tables import ReportTable, list_next_steps, list_tables, to_single_line
from racdeploy.report.tuning_tables import list_facts, make_tuning_table
from racdeploy.results.report import Report
from racdeploy.results.tuning import Tuning

_STYLES = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "measured": "dim",
    "skipped": "dim",
}
_MAX_ROWS = 20
_BORDER_CHARACTERS = 3  # of a column, besides its cells
_MAX_TRANSPOSED_ROWS = 4


def print_report(report: Report, console: Console) -> None:
    """Print the report; cells are text, never rich markup."""
    print_verdict(report, console)
    if reasons := write_findings(report):
        _print_line(console, reasons)

    for table in list_tables(report):
        _print_line(console, "")
        _print_shortened(table, console)

    lists = {
        "Next steps": list_next_steps(report),
        "Notes": [to_single_line(note) for note in report.notes],
        "Gains and losses": [
            f"{each.name}: {each.dense} → {each.pruned}, {each.note}"
            for each in list_highlights(report)
        ],
    }
    for title, lines in lists.items():
        if lines:
            _print_line(console, f"\n{title}")
        for line in lines:
            _print_line(console, f"- {line}")


def print_tuning(tuning: Tuning, console: Console) -> None:
    """Print a search for the best model; a terminal gets fewer columns than a file."""
    table = make_tuning_table(tuning, answered=True, brief=console.is_terminal)
    _print_shortened(table, console, "tune.html")
    others = sum(not each.prompts for each in tuning.candidates)
    _print_line(console, f"{others} candidates did not answer: tune.html says why")

    for note in tuning.notes:
        _print_line(console, f"- {to_single_line(note)}")
    for name, text in list_facts(tuning):
        _print_line(console, f"{name.lower()}: {text}", "dim")
    _print_line(console, to_single_line(tuning.verdict), "bold")


def print_verdict(report: Report, console: Console) -> None:
    """Print the verdict with model and target, on one line."""
    style = "inconclusive" if is_widened(report) else report.verdict
    _print_line(console, write_headline(report), _STYLES[style])


def print_table(table: ReportTable, console: Console) -> None:
    """Print a table; no cell is truncated, however narrow the terminal is."""
    if not console.is_terminal:
        for line in _align(table):
            _print_line(console, line)
        return

    # Too wide: a table of few rows is transposed, any other becomes a list.
    widths = _fit(table, console.width)
    if widths is None and len(table.rows) <= _MAX_TRANSPOSED_ROWS < len(table.columns):
        table = table.transpose()
        widths = _fit(table, console.width)

    if widths is None:
        _print_list(table, console)
    else:
        # Cells are text, never rich markup.
        rich_table = RichTable(title=Text(table.title), title_justify="left")
        for column, width, right in zip(table.columns, widths, table.numeric, strict=True):
            justify: JustifyMethod = "right" if right else "left"
            rich_table.add_column(Text(column), width=width, overflow="fold", justify=justify)

        for row in table.rows:
            cells = [Text(cell, style=_STYLES.get(cell, "")) for cell in row]
            rich_table.add_row(*cells)
        console.print(rich_table)


def _print_shortened(table: ReportTable, console: Console, page: str = "report.html") -> None:
    """Print a table; on a terminal, a long one is truncated and refers to the page."""
    more = len(table.rows) - _MAX_ROWS
    if not console.is_terminal or more <= 0:
        print_table(table, console)
        return

    print_table(ReportTable(table.title, table.columns, table.rows[:_MAX_ROWS]), console)
    _print_line(console, f"{more} more rows are in {page}", "dim")


def _print_line(console: Console, text: str, style: str = "") -> None:
    # No wrapping in a pipe: programs such as grep expect whole lines.
    wrap_softly = not console.is_terminal
    console.print(Text(text, style=style), soft_wrap=wrap_softly)


def _fit(table: ReportTable, width: int) -> list[int] | None:
    """Return column widths that break no word; None if the terminal is too narrow."""
    columns = list(zip(table.columns, *table.rows, strict=True))
    min_widths = [max(map(cell_len, " ".join(column).split()), default=0) for column in columns]
    widths = [max(map(cell_len, column)) for column in columns]

    available = width - _BORDER_CHARACTERS * len(columns) - 1
    if sum(min_widths) > available:
        return None

    # Take from the widest column each time, so that all stay as readable as possible.
    while sum(widths) > available:
        shrinkable = (index for index, width in enumerate(widths) if width > min_widths[index])
        widths[max(shrinkable, key=widths.__getitem__)] -= 1

    return widths


def _print_list(table: ReportTable, console: Console) -> None:
    """Print each row as a paragraph."""
    _print_line(console, table.title, "bold")

    for row in table.rows:
        _print_line(console, row[0])
        for column, cell in zip(table.columns[1:], row[1:], strict=True):
            if cell:
                _print_line(console, f"  {column}: {cell}")


def _align(table: ReportTable) -> list[str]:
    """Return the lines of an aligned plain-text table."""
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
