"""What an evaluation harness found, in every form of a report; reports without it have no trace."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from racdeploy.report import html, markdown, terminal
from racdeploy.report.tables import HARNESS_TITLE, list_tables
from racdeploy.results.answers import HarnessRow, HarnessRun
from racdeploy.results.report import Report
from tests.support.sample_report import HOSTILE

PAIRED = HarnessRow(
    task="gsm8k",
    metric="exact_match,flexible-extract",
    documents=1319,
    dense=0.8,
    pruned=0.78125,
    difference=-0.01875,
    dense_stderr=0.011,
    pruned_stderr=0.0114,
    lower=-0.031,
    upper=-0.0065,
    lost=61,
    won=36,
)
UNPAIRED = HarnessRow(
    task=HOSTILE,
    metric="f1",
    documents=7,
    dense=12.5,
    pruned=12.49999,
    difference=-0.00001,
    unpaired_reason="no figure of every document was logged",
)


@pytest.fixture
def asked(report: Report) -> Report:
    """The sample report, with a harness."""
    run = HarnessRun(name="lm-eval", version="0.4.13", rows=(PAIRED, UNPAIRED))
    return report.model_copy(update={"harness": run})


def test_figures_are_as_the_harness_prints_them(asked: Report) -> None:
    """With its standard errors, the interval of the difference, and what changed sides."""
    (table,) = [table for table in list_tables(asked) if table.title == HARNESS_TITLE]
    assert table.columns[0] == "lm-eval 0.4.13"
    assert table.columns[4] == "difference (90%)"
    assert table.rows[0] == (
        "gsm8k, exact_match,flexible-extract",
        "1,319",
        "0.8000 (± 0.0110)",
        "0.7812 (± 0.0114)",
        "−0.0187 (−0.0310 to −0.0065)",
        "61",
        "36",
    )
    assert table.rows[1][2:] == (
        "12.5000",
        "12.5000",
        "0.0000, no figure of every document was logged",
        "–",
        "–",
    )


def test_every_form_shows_it(asked: Report, report: Report) -> None:
    """Markdown in the open, a part of the page, a table or a list on 80 columns."""
    text = markdown.render(asked)
    assert "#### Evaluation harness" in text.partition("<details>")[0]
    page = html.render(asked)
    assert 'id="harness"' in page
    assert "0.8000 (± 0.0110)" in page
    assert "<script>alert" not in text + page

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    terminal.print_report(asked, console)
    printed = stream.getvalue()
    assert "exact_match,flexible-extract" in printed
    assert "(−0.0310 to −0.0065)" in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 80

    for without in (markdown.render(report), html.render(report)):
        assert HARNESS_TITLE not in without


def test_it_is_read_back(asked: Report) -> None:
    """Nothing of it is lost in report.json."""
    assert Report.model_validate_json(asked.model_dump_json()) == asked
