"""A search that runs: bars on a terminal, and a line where a candidate came further."""

from __future__ import annotations

import io
import re

from rich.console import Console

from racdeploy.cli.tune_view import show_search
from tests.support.sample_report import HOSTILE
from tests.support.sample_tuning import build_tuning

FIRST = build_tuning().candidates[0]


def test_a_log_gets_a_line_where_something_changed() -> None:
    """Once for each step, on one line, and text from elsewhere stays text."""
    stream = io.StringIO()
    counted = FIRST.model_copy(update={"reached": "counted", "prompts": 0})
    compared = FIRST.model_copy(update={"reached": "compared", "prompts": 0})
    with show_search(Console(file=stream, width=20)) as (_, show):
        for each in (counted, compared, compared, FIRST):
            show(each)
        show(FIRST.model_copy(update={"reason": HOSTILE}))

    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["Q8_0: compared, 145 MB, KL 0.2", "Q8_0: raced, 145 MB, 352/400 right"]
    assert lines[2].startswith("Q8_0: raced, 145 MB, 352/400 right, stops: <script>")
    assert len(lines) == 3
    assert not re.search(r"[\x1b\u202e]", stream.getvalue())


def test_a_terminal_keeps_the_lines_and_not_the_bars() -> None:
    """Steps stay above; the bars of stages that ended are gone."""
    stream = io.StringIO()
    console = Console(file=stream, width=80, height=24, force_terminal=True, no_color=True)
    with show_search(console) as (progress, show):
        progress("prune", 0, 2)
        progress("prune", 2, 2)
        progress("budget", 60, 900)
        show(FIRST)
    assert "352/400 right" in stream.getvalue()
    assert "60/900" in stream.getvalue()


def test_a_quiet_search_prints_nothing() -> None:
    stream = io.StringIO()
    with show_search(Console(file=stream), quiet=True) as (progress, show):
        show(FIRST)
        progress("race", 1, 2)
    assert stream.getvalue() == ""
