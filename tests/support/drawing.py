"""What a terminal shows, as a picture: SVG by rich, of lines that are given or that were recorded.

A recording is read by pyte, which knows what its control sequences do to the screen.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import groupby

import pyte
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.style import Style
from rich.text import Text

_FONT = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)
_TALLEST = 500
_DIM, _DIM_COLOUR = 2, 90  # pyte has no dim text; bright black looks like it


class Screen(pyte.Screen):
    """A screen on which dim text is grey."""

    def select_graphic_rendition(self, *codes: int, **options: bool) -> None:
        """Set how what follows looks."""
        shown = [_DIM_COLOUR if code == _DIM else code for code in codes]
        super().select_graphic_rendition(*shown, **options)


def read_screen(recorded: str, columns: int) -> list[Text]:
    """Return what is on an endless screen after a recording, without blank lines at its end."""
    screen = Screen(columns, _TALLEST)
    pyte.Stream(screen).feed(recorded)
    lines = [read_line(screen, row) for row in range(_TALLEST)]

    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def read_line(screen: pyte.Screen, row: int) -> Text:
    """Return a row of a screen, a span for each run of one style."""
    line = Text()
    cells = [screen.buffer[row][column] for column in range(screen.columns)]
    for style, run in groupby(cells, _style):
        line.append("".join(cell.data for cell in run), style)

    line.rstrip()
    return line


def _style(cell: pyte.screens.Char) -> Style:
    return Style(color=_name(cell.fg), bgcolor=_name(cell.bg), bold=cell.bold or None)


def _name(colour: str) -> str | None:
    """Return rich's name of a colour of pyte's."""
    if colour == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", colour):
        return f"#{colour}"
    return colour.replace("brown", "yellow").replace("bright", "bright_")


def draw(lines: Sequence[Text], columns: int, name: str) -> str:
    """Return an SVG of lines in a window; ``name`` tells its parts from those of other pictures."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(line)

    # A picture asks no server for its font.
    template = _FONT.sub("", CONSOLE_SVG_FORMAT)
    return console.export_svg(title="racdeploy", code_format=template, unique_id=name)
