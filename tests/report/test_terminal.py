"""The terminal: same content with and without one, and no markup from outside."""

from __future__ import annotations

import io

from rich.console import Console

from racdeploy.report import terminal
from racdeploy.report.model import Report


def printed(report: Report, *, is_terminal: bool, width: int = 100) -> str:
    stream = io.StringIO()
    terminal.print_report(
        report, Console(file=stream, force_terminal=is_terminal, width=width, color_system=None)
    )
    return stream.getvalue()


def test_a_pipe_gets_whole_lines_without_decoration(report: Report) -> None:
    """Words stay together however narrow the console claims to be."""
    text = printed(report, is_terminal=False, width=20)
    assert text.splitlines()[0] == "PASS: tiny-reasoner for gguf"
    assert "accuracy  pass     drop 0.8 points, at most 2.6 | margin 5.0" in text
    assert not set("┃│\x1b") & set(text)


def test_a_terminal_gets_tables(report: Report) -> None:
    """Six of them, with every figure of the plain form."""
    text = printed(report, is_terminal=True, width=200)
    assert text.count("┏") == 6
    assert "144.1" in text
    assert "5.31 MB" in text


def test_text_from_outside_is_neither_markup_nor_an_escape_sequence(report: Report) -> None:
    """A model called [red] is called that."""
    hostile = report.model_copy(update={"model": "[red]m[/red]\x1b[31m"})
    for is_terminal in (True, False):
        text = printed(hostile, is_terminal=is_terminal)
        assert "[red]m[/red]\N{REPLACEMENT CHARACTER}[31m" in text
        assert "\x1b[31m" not in text
