"""The tables that every output prints: order, alignment, and how numbers are written."""

from __future__ import annotations

import pytest

from racdeploy.report.tables import (
    ReportTable,
    format_number,
    format_points,
    list_next_steps,
    list_tables,
)
from racdeploy.results.checks import CheckResult, CheckVerdict
from racdeploy.results.report import Report


def _check(name: str, verdict: CheckVerdict, remedy: str = "") -> CheckResult:
    return CheckResult(name=name, verdict=verdict, summary=f"what {name} found", remedy=remedy)


def _with_checks(report: Report, *checks: CheckResult) -> Report:
    return report.model_copy(update={"checks": checks})


def _named(report: Report, title: str) -> ReportTable:
    (found,) = [table for table in list_tables(report) if table.title == title]
    return found


def test_checks_that_need_an_eye_come_first(report: Report) -> None:
    """And there is no column for a next step that most of them do not have."""
    verdicts: tuple[CheckVerdict, ...] = ("pass", "skipped", "measured", "inconclusive", "fail")
    checks = [_check(verdict, verdict, "do it") for verdict in verdicts]
    table = _named(_with_checks(report, *checks), "Checks")
    assert table.columns == ("check", "verdict", "result")
    assert [row[1] for row in table.rows] == ["fail", "inconclusive", "pass", "measured", "skipped"]


def test_an_advice_is_given_once(report: Report) -> None:
    """With the checks that give it; one that passed needs none."""
    spoiled = _with_checks(
        report,
        _check("thinking", "pass", "never said"),
        _check("speed", "skipped", "racdeploy bench"),
        _check("memory", "skipped", "racdeploy bench"),
        _check("accuracy", "fail", "lower the sparsity"),
    )
    assert list_next_steps(spoiled) == [
        "accuracy: lower the sparsity",
        "speed, memory: racdeploy bench",
    ]


def test_columns_of_numbers_are_told_from_columns_of_words(report: Report) -> None:
    """With units, counts and intervals; a cell that says more turns its column left."""
    arms = _named(report, "Dense and pruned")
    right = {name for name, is_right in zip(arms.columns, arms.numeric, strict=True) if is_right}
    assert right == set(arms.columns) - {"model", "quant"}

    mixed = ReportTable("", ("1", "2", "3"), (("7", "2,304 or so", "–"), ("8", "82.0%", "")))
    assert mixed.numeric == (False, False, False)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1024, "1,024"), (-1.5, "−1.5"), (0.1 + 0.2, "0.3"), (2_000_000, "2,000,000")],
)
def test_a_number_has_separators_and_a_true_minus(value: float, text: str) -> None:
    """As axes and tables show it."""
    assert format_number(value) == text


@pytest.mark.parametrize(("share", "text"), [(-0.0149, "−1.5"), (-0.0001, "0.0"), (0.77, "77.0")])
def test_points_have_no_negative_zero(share: float, text: str) -> None:
    assert format_points(share) == text


def test_every_number_of_a_table_is_in_one_format(report: Report) -> None:
    """Thousands have separators, and no hyphen is a minus sign."""
    arms = tuple(
        arm.model_copy(update={"tokens_per_s": 7056.1, "prompts": 2000, "unclosed": 1234})
        for arm in report.arms
    )
    cells = _named(report.model_copy(update={"arms": arms}), "Dense and pruned").rows[0]
    assert "7,056" in cells
    assert "1,234 of 2,000" in cells
    assert not any(cell.startswith("-") for cell in cells)
