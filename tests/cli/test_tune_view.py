"""A search that runs: a table that fits the terminal and goes, lines where there is none."""

from __future__ import annotations

import io
import re

import pyte
import pytest
from rich.console import Console

from racdeploy.cli.tune_view import show_search
from tests.support.sample_report import HOSTILE
from tests.support.sample_tuning import build_tuning

CANDIDATES = build_tuning().candidates


class _Screen(io.StringIO):
    """A terminal that is read as pyte shows it."""

    def __init__(self, columns: int, lines: int) -> None:
        super().__init__()
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def read_lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]


def _terminal(columns: int, lines: int) -> tuple[_Screen, Console]:
    stream = _Screen(columns, lines)
    console = Console(file=stream, width=columns, height=lines, force_terminal=True)
    return stream, console


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (120, 24), (40, 12)])
def test_a_terminal_has_a_table_that_fits_and_goes(columns: int, lines: int) -> None:
    """The winner so far on top, the bar of the stage below; nothing of it stays."""
    stream, console = _terminal(columns, lines)
    with show_search(console) as view:
        view.progress("raced", 3, 40)
        view.show(CANDIDATES)
        shown = stream.read_lines()

    assert shown[0].startswith("model")
    assert shown[1].startswith("50% Q4_0 joint")
    assert re.match(r"… \d+ more$", shown[-2])
    assert "3/40" in shown[-1]
    assert len(shown) < lines
    assert stream.read_lines() == []


def test_bars_of_ended_stages_leave_the_room_to_the_table() -> None:
    """Twenty candidates have twenty of them."""
    stream, console = _terminal(80, 24)
    with show_search(console) as view:
        for number in range(20):
            view.progress(f"prune {number}", 0, 2)
            view.progress(f"prune {number}", 2, 2)
            view.progress(f"prune {number}", 2, 2)
        view.progress("answers", 1, 2)
        view.show([])
        shown = stream.read_lines()
    assert [line.split()[0] for line in shown] == ["answers"]


def test_a_log_gets_a_line_where_something_changed() -> None:
    """Once for each step, on one line, and text from elsewhere stays text."""
    stream = io.StringIO()
    first = CANDIDATES[0].model_copy(update={"reached": "surveyed", "prompts": 0})
    with show_search(Console(file=stream, width=20)) as view:
        view.show([first])
        view.show([first])
        view.show([CANDIDATES[0]])
        view.show([CANDIDATES[0].model_copy(update={"why": HOSTILE})])

    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["Q8_0: surveyed", "Q8_0: raced, 352/400 right"]
    assert lines[2].startswith("Q8_0: raced, 352/400 right, stops: <script>")
    assert len(lines) == 3
    assert not re.search(r"[\x1b\u202e]", stream.getvalue())


def test_a_quiet_search_prints_nothing() -> None:
    """Neither on a terminal nor elsewhere."""
    stream, console = _terminal(80, 24)
    with show_search(console, quiet=True) as view:
        view.show(CANDIDATES)
        view.progress("raced", 1, 2)
    assert stream.read_lines() == []
