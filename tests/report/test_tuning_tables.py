"""The tables of a search, on a terminal, in Markdown and while it runs."""

from __future__ import annotations

import io
import re
import shlex

from rich.console import Console

from racdeploy.report import markdown
from racdeploy.report.tables import Table
from racdeploy.report.terminal import print_tuning
from racdeploy.report.tuning import ShareInterval, Tuning
from racdeploy.report.tuning_tables import (
    ANSWERED,
    OTHERS,
    STAGES,
    WISHES,
    describe_device,
    keeps_wishes,
    live_table,
    tuning_tables,
    write_build,
)
from tests.support.sample_report import HOSTILE
from tests.support.sample_tuning import build_tuning


def _tables(tuning: Tuning, brief: bool = False) -> dict[str, Table]:
    return {table.title: table for table in tuning_tables(tuning, brief)}


def test_candidates_are_in_one_of_two_tables() -> None:
    """Who answered with the winner and its rival first, and who did not with the reason."""
    tuning = build_tuning()
    found = _tables(tuning)
    answered, others = found[ANSWERED], found[OTHERS]
    assert len(answered.rows) + len(others.rows) == len(tuning.candidates) == 22
    assert [row[0] for row in answered.rows[:3]] == [
        "50% Q4_0 joint, winner",
        "Q4_0 (dense), beside it",
        "Q2_K joint (dense)",
    ]
    assert others.columns[-1] == "why it went no further"
    assert all(row[-1] for row in others.rows)
    assert all(answered.numeric[place] for place in range(1, 9))


def test_the_wishes_have_what_the_winner_has() -> None:
    """Accuracy is a share of that of the named dense model; what is unknown is not kept."""
    tuning = build_tuning()
    rows = {row[0]: row[1:] for row in _tables(tuning)[WISHES].rows}
    assert rows["size"] == ("at most 100 MB", "82.9 MB", "yes")
    assert rows["accuracy, 95% of Q8_0"] == ("at least 83.6%", "89.0%", "yes")
    assert keeps_wishes(tuning)

    unknown = tuning.model_copy(update={"reference": ""})
    rows = {row[0]: row[1:] for row in _tables(unknown)[WISHES].rows}
    expected = ("a share of what is unknown", "89.0%", "unknown")
    assert rows["accuracy, 95% of dense"] == expected
    assert not keeps_wishes(unknown)


def test_stages_count_who_came_and_who_went_on() -> None:
    """In the order in which they were; a stage that is no step of the race has its time alone."""
    rows = _tables(build_tuning())[STAGES].rows
    assert [row[0] for row in rows] == [
        "traces", "count", "survey", "compare", "race", "verify"
    ]  # fmt: skip
    assert [row[2:4] for row in rows[1:]] == [
        ("22", "20"), ("20", "17"), ("17", "13"), ("13", "2"), ("2", "1")
    ]  # fmt: skip
    assert rows[4][5] == "412,300 asked; 811,200 (66%) saved by stopping"
    assert rows[1][4] == "0.4 s"
    assert rows[4][4] == "24.8 min"


def test_a_device_says_whether_its_figures_are_measured() -> None:
    device = build_tuning().device
    assert describe_device(device).endswith("figures estimated: 11.4 GB/s by published figures")
    measured = device.model_copy(update={"measured": True, "source": "", "cores": 1})
    assert describe_device(measured) == "Raspberry Pi 5, 8 GB, 1 core; figures measured on it"


def test_a_terminal_of_80_columns_breaks_no_word() -> None:
    """The brief tables fit, and the verdict comes last, where it is seen."""
    stream = io.StringIO()
    tuning = build_tuning()
    print_tuning(tuning, Console(file=stream, width=80, force_terminal=True, no_color=True))
    lines = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert "right answers (90 % interval −0.4 to 4.7)." in " ".join(lines[-3:])

    stream = io.StringIO()
    print_tuning(tuning, Console(file=stream))
    assert "tokens/s, measured" in stream.getvalue()
    assert tuning.verdict in stream.getvalue()


def test_markdown_has_the_verdict_the_tables_and_the_command() -> None:
    """Those that did not answer are folded; hostile names stay text."""
    tuning = build_tuning()
    text = markdown.render_tuning(tuning)
    assert text.startswith("### 50% Q4_0 joint wins: 5.31 seconds")
    assert "racdeploy build SmolLM2-135M-reasoner --target raspberry-pi5" in text
    assert f"#### {WISHES}" in text
    assert text.index("<details>") < text.index(f"#### {OTHERS}")

    first = tuning.candidates[0].model_copy(update={"name": HOSTILE, "why": HOSTILE})
    spoiled = tuning.model_copy(
        update={
            "candidates": (first, *tuning.candidates[1:]),
            "verdict": HOSTILE,
            "reference": "",
            "model": "```\n<script>",
        }
    )
    text = markdown.render_tuning(spoiled)
    assert "<script>alert" not in text
    assert "@octocat" not in text
    assert [line for line in text.splitlines() if line.startswith("```")] == ["```sh", "```"]


def test_the_live_table_shows_who_is_still_in_first() -> None:
    """At most as many as there is room for; a further line counts the others."""
    candidates = build_tuning().candidates
    table = live_table(candidates, 6)
    assert len(table.rows) == 7
    assert table.rows[0][0] == "50% Q4_0 joint"
    assert table.rows[0][6] == "356/400"
    assert table.rows[-1][0] == "… 16 more"
    assert not any(row[-1] for row in table.rows[:5])
    assert len(live_table(candidates, 22).rows) == 22
    assert live_table([], 5).rows == ()


def test_a_whole_count_of_nothing_is_no_table() -> None:
    """Nobody answered: an interval is needed for that."""
    tuning = build_tuning()
    nobody = [each.model_copy(update={"accuracy": None}) for each in tuning.candidates]
    found = _tables(tuning.model_copy(update={"candidates": tuple(nobody)}))
    assert ANSWERED not in found
    assert len(found[OTHERS].rows) == 22
    one = nobody[0].model_copy(update={"accuracy": ShareInterval(value=1, lower=0.5, upper=1)})
    single = tuning.model_copy(update={"candidates": (one, *nobody[1:])})
    assert len(_tables(single)[ANSWERED].rows) == 1


def test_a_setting_that_is_no_list_is_written_as_toml() -> None:
    """A damaged file, or one by hand, is shown with the command that the recipe would refuse."""
    tuning = build_tuning()
    first = tuning.candidates[0]
    damaged = tuning.model_copy(update={"recipe": {"tasks": 7, "also": "onnx"}})
    words = shlex.split(write_build(damaged, first))
    assert "tasks=7" in words
    assert 'also="onnx"' in words

    other = first.model_copy(update={"settings": {"tasks": "gcd"}})
    assert 'tasks="gcd"' in shlex.split(write_build(tuning, other))
    assert "--task" in shlex.split(write_build(tuning, first))
