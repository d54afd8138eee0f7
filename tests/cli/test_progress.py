"""Progress: a bar from a stage's beginning on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from racdeploy.cli import progress
from racdeploy.cli.progress import StageProgress, show_progress
from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion
from racdeploy.report.tables import format_duration
from tests.support.commands import command, environment


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the clock of the progress go forward."""
    now_s = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s[0])

    def forward(seconds: float) -> None:
        now_s[0] += seconds

    return forward


def test_a_log_gets_a_line_at_begin_and_end_and_every_ten_seconds(
    wait: Callable[[float], None],
) -> None:
    """With the rate and what is left, once enough answers are there."""
    stream = io.StringIO()
    with show_progress(Console(file=stream, width=20)) as advance:
        advance("traces", 0, 256)
        wait(30)  # the model is loaded
        advance("traces", 0, 256, 1)
        for done in range(1, 65):
            wait(1)
            advance("traces", done, 256, 1234 * done)
        wait(192)
        advance("traces", 256, 256, 1234 * 256)

    lines = stream.getvalue().splitlines()
    assert lines[0] == "traces 0/256"
    assert "traces 60/256, 1,234 tokens/s, about 3 min left" in lines
    assert lines[-1] == "traces 256/256, 1,234 tokens/s, took 4 min"
    assert len(lines) == 2 + 1 + 6


def test_stages_without_tokens_know_the_time_left_from_the_first_unit(
    wait: Callable[[float], None],
) -> None:
    """What an earlier run finished is not counted; bytes are shown as per cent."""
    track = StageProgress("prune", time.monotonic(), first=2, done=2, total=6)
    wait(40)
    track.update(3, 6, 0, time.monotonic())
    assert track.list_words(time.monotonic()) == ["3/6", "about 2 min left"]

    file = StageProgress("export", time.monotonic(), first=0, done=250_000, total=1_000_000)
    assert file.amount == "25%"


def test_a_stage_that_begins_again_is_a_stage_of_its_own() -> None:
    """Two phases of a recovery have two beginnings and two ends."""
    stream = io.StringIO()
    with show_progress(Console(file=stream)) as advance:
        for _ in range(2):
            advance("recover", 0, 8)
            advance("recover", 8, 8)
    assert stream.getvalue().count("recover 0/8") == 2
    assert stream.getvalue().count("recover 8/8") == 2


def test_a_terminal_has_the_bar_before_the_first_answer() -> None:
    """One row of at most 80 columns, drawn when the stage begins."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    with show_progress(console) as advance:
        advance("verify pruned", 0, 200)
        advance("verify pruned", 0, 200, 12)
    drawn = stream.getvalue()
    assert "verify pruned" in drawn
    assert "0/200" in drawn


def test_quiet_shows_nothing() -> None:
    """Neither bars nor lines."""
    stream = io.StringIO()
    with show_progress(Console(file=stream, force_terminal=True), quiet=True) as advance:
        advance("traces", 1, 2, 3)
    assert stream.getvalue() == ""


def test_answers_are_counted_while_they_grow() -> None:
    """From the first token on; a shard on disk replaces what was counted for it."""
    seen: list[tuple[int, int]] = []

    def show(label: str, done: int, total: int, tokens: int = 0) -> None:
        seen.append((done, tokens))

    counter = CompletionProgress(show, "traces", 4)
    counter.set_saved(0)
    counter.on_tokens(0, [5], None)
    counter.on_tokens(1, [5, 9], Completion((5, 9), "stop"))
    counter.set_saved(2)
    counter.on_tokens(2, [5, 5, 9], Completion((5, 5, 9), "stop"))
    assert seen == [(0, 0), (0, 1), (1, 3), (2, 3), (3, 6)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (95, "2 min"), (3600, "1 h"), (4000, "1 h 7 min")],
)
def test_durations_are_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    """Seconds, then minutes, then hours."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "./nowhere"],
        ["prune", "./nowhere"],
        ["traces", "./nowhere"],
        ["recover", "./nowhere", "./pruned", "--recover-tokens=9"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_first_line_comes_before_torch(arguments: list[str]) -> None:
    """Model and purpose are on stderr although the model cannot be found."""
    code = (
        "import sys\nfrom racdeploy.cli.app import app\n"
        f"try:\n    app({arguments!r})\nfinally:\n    print(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment()
    )
    first, *_ = done.stderr.splitlines()
    assert first.startswith(f"{arguments[0]}: ")
    assert "./nowhere" in first
    assert "torch" not in done.stdout.split()


def test_a_quiet_command_says_nothing_before_its_result() -> None:
    """The error stays."""
    arguments = command("build", "./nowhere", "--quiet")
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment())
    assert done.stderr.startswith("error: ")
