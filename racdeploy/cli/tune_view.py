"""A search that runs, on stderr: a table of its candidates on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from racdeploy.cli.progress import fill_bars, make_bars, print_lines
from racdeploy.decoding.engine import Progress
from racdeploy.report.tables import Table, plain
from racdeploy.report.tuning_tables import live_table

if TYPE_CHECKING:
    from racdeploy.report.tuning import Candidate

_FRAME = 6  # lines beside the rows: head, count of the others, bars, and the cursor's
_LEAST_ROWS = 3
_GAP = 2  # characters between columns
_LEAST_REASON = 14  # characters that the last column has at least
_PER_S = 4  # redrawn so often

Show = Callable[[Sequence["Candidate"]], None]


@dataclass(frozen=True)
class SearchView:
    """What a search says while it runs.

    Args:
        show: takes all candidates as they are now; call it whenever one has changed.
        progress: of the stage that runs, as engines and builds give it.
    """

    show: Show
    progress: Progress


@contextmanager
def show_search(console: Console, quiet: bool = False) -> Iterator[SearchView]:
    """Yield a view of a search; on a terminal its table is gone afterwards, for the result."""
    if quiet:
        yield SearchView(lambda candidates: None, lambda label, done, total, tokens=0: None)
    elif console.is_terminal:
        with _draw(console) as view:
            yield view
    else:
        yield SearchView(_print_changes(console), print_lines(console))


@contextmanager
def _draw(console: Console) -> Iterator[SearchView]:
    bars = make_bars(console)
    candidates: list[Candidate] = []

    def render() -> RenderableType:
        rows = max(console.height - _FRAME, _LEAST_ROWS)
        return Group(_fit(live_table(candidates, rows), console.width), bars)

    live = Live(get_renderable=render, console=console, refresh_per_second=_PER_S, transient=True)

    def show(found: Sequence[Candidate]) -> None:
        candidates[:] = found
        live.refresh()

    with live:
        yield SearchView(show, fill_bars(bars, keep=False))


def _fit(table: Table, width: int) -> RenderableType:
    """Return the table with one line for each row: what is too wide is cut, or left out."""
    if not table.rows:
        return Text("")

    widths = []
    for column in zip(table.columns, *table.rows, strict=True):
        widths.append(max(map(cell_len, column)) + _GAP)

    while len(widths) > 1 and sum(widths[:-1]) + _LEAST_REASON > width:
        widths.pop()
    room = width - sum(widths[:-1])
    widths[-1] = min(widths[-1], room)

    drawn = RichTable(box=None, padding=(0, _GAP, 0, 0), header_style="dim")
    for name, own, right in zip(table.columns, widths, table.numeric, strict=False):
        justify: JustifyMethod = "right" if right else "left"
        drawn.add_column(
            Text(name), width=own - _GAP, no_wrap=True, overflow="ellipsis", justify=justify
        )

    for row in table.rows:
        style = "dim" if row[-1] else ""  # which go no further
        cells = map(Text, row[: len(widths)])
        drawn.add_row(*cells, style=style)
    return drawn


def _print_changes(console: Console) -> Show:
    """Return what prints a line where a candidate has come farther, or goes no further."""
    known: dict[str, tuple[str, str]] = {}

    def show(candidates: Sequence[Candidate]) -> None:
        for each in candidates:
            state = (each.reached, each.why)
            if known.get(each.name) == state:
                continue

            known[each.name] = state
            words = [f"{each.name}: {each.reached}"]
            if each.prompts:
                words.append(f"{each.correct}/{each.prompts} right")
            if each.why:
                words.append(f"stops: {each.why}")

            line = plain(", ".join(words))
            console.print(line, markup=False, soft_wrap=True)

    return show
