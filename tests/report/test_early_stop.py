"""Questions that ended when the verdict was clear: every report says after how many of them."""

from __future__ import annotations

import io
from html import unescape

import pytest
from rich.console import Console

from racdeploy.report import terminal
from racdeploy.report.files import render_reports
from racdeploy.report.summary import describe_stop, write_findings
from racdeploy.results.checks import CheckVerdict, is_clear
from racdeploy.results.report import Report
from racdeploy.results.units import format_confidence

SENTENCE = "Clear after 256 of 1,000 prompts: the intervals are those of this analysis (99.994%)."


@pytest.fixture
def stopped(report: Report) -> Report:
    """A report of which 256 of 1,000 prompts were asked."""
    assert report.comparison
    changes = {"planned": 1000, "confidence": 0.99994}
    comparison = report.comparison.model_copy(update=changes)
    return report.model_copy(update={"comparison": comparison})


def test_every_report_says_when_the_questions_ended(stopped: Report) -> None:
    """In one sentence; the JSON has both numbers."""
    stream = io.StringIO()
    terminal.print_report(stopped, Console(file=stream, width=10_000))
    assert SENTENCE in stream.getvalue()

    texts = render_reports(stopped, [], "bundle")
    assert SENTENCE in texts["report.md"].replace("\\", "")
    assert SENTENCE in unescape(texts["report.html"])
    read = Report.model_validate_json(texts["report.json"])
    assert read.comparison
    assert (read.comparison.n, read.comparison.planned) == (256, 1000)


def test_a_report_of_one_analysis_says_nothing(report: Report) -> None:
    assert describe_stop(report) == ""
    assert "Clear after" not in write_findings(report)


def test_an_open_verdict_is_not_called_clear(stopped: Report) -> None:
    """Where the last analysis could not decide either."""
    undecided = [
        check.model_copy(update={"verdict": "inconclusive"}) if check.name == "accuracy" else check
        for check in stopped.checks
    ]
    found = stopped.model_copy(update={"checks": tuple(undecided)})
    assert describe_stop(found).startswith("Not clear after 256 of 1,000 prompts")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["pass", "pass"], True),
        (["pass", "skipped"], True),
        (["pass", "inconclusive"], False),
        (["fail", "inconclusive"], True),
    ],
)
def test_one_failure_is_clear_and_one_open_check_is_not(
    verdicts: list[CheckVerdict], expected: bool
) -> None:
    assert is_clear(verdicts) is expected


@pytest.mark.parametrize(
    ("confidence", "expected"),
    [(0.9, "90%"), (0.967, "97%"), (0.99185, "99%"), (0.9987, "99.9%"), (0.99998, "99.998%")],
)
def test_no_confidence_looks_like_certainty(confidence: float, expected: str) -> None:
    assert format_confidence(confidence) == expected
