"""The pictures of the documents: as a terminal shows it, and of the sessions that are said."""

from __future__ import annotations

import html
import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.text import Text

from tests.support.animation import animate
from tests.support.drawing import draw, read_screen
from tests.support.recordings import PICTURES, SESSIONS

ROOT = Path(__file__).parents[2]
_BAR = "\x1b[2K\rtraces {}/4\r\n\x1b[1A"


def _words(svg: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", svg)).replace("\xa0", " "))


def test_a_recording_is_read_as_a_terminal_shows_it() -> None:
    """What was written over is gone; colours, bold and dim stay."""
    recorded = (
        "thinking … 7\r\x1b[K\x1b[1mbold\x1b[0m and \x1b[2mdim\x1b[0m\r\n\x1b[32mgreen\x1b[m\r\n"
    )
    first, second = read_screen(recorded, 80)
    assert (first.plain, second.plain) == ("bold and dim", "green")

    def styled(line: Text) -> list[tuple[str, str]]:
        return [(line.plain[start:stop], str(style)) for start, stop, style in line.spans]

    assert styled(first) == [("bold", "bold"), ("dim", "bright_black")]
    assert styled(second) == [("green", "green")]
    assert "bold and dim" in _words(draw([first, second], 80, "sample"))


def test_a_moving_picture_ends_where_the_recording_ends() -> None:
    """Frames in their order, each line drawn once, and the last frame where nothing moves."""
    recorded = [(float(i), _BAR.format(i)) for i in range(5)] + [(5.0, "\r\na < b\r\n")]
    svg = animate([(0.0, "$ racdeploy\r\n"), *recorded], 40, 6)

    moves = [float(each) for each in re.findall(r"translateY\((-?\d+)px\)\}", svg)]
    assert len(moves) == 6
    assert all(later < earlier for earlier, later in pairwise(moves))
    still, _ = svg.split("@media (prefers-reduced-motion: no-preference)")
    assert f"translateY({moves[-1]:.0f}px)" in still

    assert svg.count("$ racdeploy</text>") == 1
    assert svg.count('href="#l0"') == 6
    assert svg.count("a &lt; b") == 1


def test_a_moving_picture_waits_no_longer_than_seconds() -> None:
    """A stall of an hour takes as long as one of three seconds."""
    recorded = [(0.0, "a"), (3.0, "b"), (3600.0, "c")]
    shares = re.findall(r"([\d.]+)%\{", animate(recorded, 40, 6))
    assert shares == ["0.00", "33.33", "66.67"]


def test_a_moving_picture_leaves_out_what_does_not_change() -> None:
    svg = animate([(float(i), "\r" if i else "same") for i in range(50)], 40, 6)
    assert svg.count("<use ") == 1


@pytest.mark.parametrize("name", SESSIONS)
def test_a_picture_is_of_its_session(name: str) -> None:
    """Every line that is typed is on it, at 80 columns, and a guide shows it."""
    shown = _words((PICTURES / f"{name}.svg").read_text(encoding="utf-8"))
    run_on = shown.replace(" ", "")
    for shell in SESSIONS[name].shells:
        for step in shell:
            assert step.typed.replace(" ", "") in run_on

    guides = [file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md")]
    assert sum(f"](pictures/{name}.svg)" in guide for guide in guides) == 1
