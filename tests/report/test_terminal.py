"""The terminal: same content with and without one, and no markup from outside."""

from __future__ import annotations

import io

from rich.console import Console

from racdeploy.report import terminal
from racdeploy.report.tables import ReportTable, list_tables
from racdeploy.results.pruning import VECTORS_IN_F32, TensorRow
from racdeploy.results.report import Report

HEADLINE = (
    "PASS: tiny-reasoner for gguf, bytes 0.37 of dense F16, 1.00 of dense q4_k, 1.36 of dense q2_k"
)


def printed(report: Report, *, is_terminal: bool, width: int = 100) -> str:
    stream = io.StringIO()
    terminal.print_report(
        report, Console(file=stream, force_terminal=is_terminal, width=width, color_system=None)
    )
    return stream.getvalue()


def test_a_pipe_gets_whole_lines_without_decoration(report: Report) -> None:
    """Words stay together however narrow the console claims to be."""
    text = printed(report, is_terminal=False, width=20)
    assert text.splitlines()[0] == HEADLINE
    assert "accuracy  pass     drop 0.8 points, at most 2.6 | margin 5.0" in text
    assert not set("┃│\x1b") & set(text)


def test_a_terminal_gets_tables(report: Report) -> None:
    """Seven of them, with every figure of the plain form."""
    text = printed(report, is_terminal=True, width=200)
    assert text.count("┏") == 7
    assert "144.1" in text
    assert "5.31 MB" in text


def test_eighty_columns_break_no_word(report: Report) -> None:
    """The arms lie on their side, and every word of the tables is whole."""
    text = printed(report, is_terminal=True, width=80)
    assert max(map(len, text.splitlines())) <= 80
    for table in list_tables(report):
        if "\N{REPLACEMENT CHARACTER}" in str(table.rows):
            continue
        words = {word for row in table.rows for cell in row for word in cell.split()}
        assert words <= set(text.split())


def test_a_table_without_room_is_a_list() -> None:
    """Where even its longest words do not fit beside each other."""
    table = ReportTable("Wide", ("what", "where"), tuple((f"row{i}", "x" * 40) for i in range(6)))
    stream = io.StringIO()
    terminal.print_table(table, Console(file=stream, force_terminal=True, width=42))
    assert "row5" in stream.getvalue()
    assert "x" * 40 in stream.getvalue().splitlines()


def test_the_end_of_a_long_table_is_left_to_the_browser(report: Report) -> None:
    """A pipe gets every row."""
    tasks = tuple(report.tasks[0].model_copy(update={"task": f"task{i}"}) for i in range(25))
    long = report.model_copy(update={"tasks": tasks})
    on_screen = printed(long, is_terminal=True)
    assert "5 more rows are in report.html" in on_screen
    assert "task24" not in on_screen
    assert "task24" in printed(long, is_terminal=False)


def test_the_verdict_is_printed_alone(report: Report) -> None:
    """The same line as at the top."""
    stream = io.StringIO()
    terminal.print_verdict(report, Console(file=stream, width=80))
    assert " ".join(stream.getvalue().split()) == HEADLINE


def test_norms_in_f32_are_no_news(report: Report) -> None:
    """Every format stores them so; another reason is listed."""
    norm = TensorRow(
        name="norm",
        requested_quant="q8_0",
        actual_quant="f32",
        zeros=0,
        size_bytes=4,
        reason=VECTORS_IN_F32,
    )
    other = norm.model_copy(update={"name": "other", "reason": "rows are too short"})
    text = printed(report.model_copy(update={"tensors": (norm, other)}), is_terminal=False)
    assert VECTORS_IN_F32 not in text
    assert "rows are too short" in text


def test_text_from_outside_is_neither_markup_nor_an_escape_sequence(report: Report) -> None:
    """A model called [red] is called that."""
    hostile = report.model_copy(update={"model": "[red]m[/red]\x1b[31m"})
    for is_terminal in (True, False):
        text = printed(hostile, is_terminal=is_terminal)
        assert "[red]m[/red]\N{REPLACEMENT CHARACTER}[31m" in text
        assert "\x1b[31m" not in text
