"""The report as data: the verdict rule, files that read back, and files that are refused."""

from __future__ import annotations

import itertools
import json
import math
from datetime import UTC, datetime
from typing import get_args

import pytest
from pydantic import ValidationError

from racdeploy.results.answers import AnswerRecord, ArmSummary, Comparison
from racdeploy.results.checks import CheckResult, CheckVerdict, overall_verdict
from racdeploy.results.report import Report
from tests.support.sample_report import build_records, build_report


def checks(*verdicts: CheckVerdict) -> list[CheckResult]:
    return [
        CheckResult(name=str(i), verdict=verdict, summary="") for i, verdict in enumerate(verdicts)
    ]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ((), "inconclusive"),
        (("skipped",), "inconclusive"),
        (("pass",), "pass"),
        (("pass", "skipped"), "pass"),
        (("measured", "skipped"), "inconclusive"),
        (("pass", "measured"), "pass"),
        (("pass", "inconclusive"), "inconclusive"),
        (("inconclusive", "fail"), "fail"),
        (("pass", "fail"), "fail"),
    ],
)
def test_the_verdict_follows_from_the_checks(
    verdicts: tuple[CheckVerdict, ...], expected: str
) -> None:
    """Missing data never passes."""
    assert overall_verdict(checks(*verdicts)) == expected


def test_only_a_pass_without_failure_or_doubt_passes() -> None:
    """All combinations of up to three checks, in any order."""
    for count in range(4):
        for verdicts in itertools.product(get_args(CheckVerdict), repeat=count):
            passes = "pass" in verdicts and set(verdicts) <= {"pass", "measured", "skipped"}
            assert (overall_verdict(checks(*verdicts)) == "pass") == passes


def test_a_report_reads_back_as_it_was() -> None:
    """Through JSON, verdict included."""
    report = build_report()
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert json.loads(report.model_dump_json())["verdict"] == "pass"


def test_a_record_reads_back_as_it_was() -> None:
    """One line each, whatever the thinking holds."""
    for record in build_records()[:60]:
        line = record.model_dump_json()
        assert "\n" not in line
        assert AnswerRecord.model_validate_json(line) == record


def test_an_unbounded_interval_is_valid_json() -> None:
    """Infinity is no JSON number, and null would lose it."""
    comparison = Comparison(
        drop=0, drop_lower=-1, drop_upper=1, verdict="inconclusive", margin=0.05, n10=0, n01=0, n=1,
        length_ratio=1.0, length_lower=0.0, length_upper=math.inf,
    )  # fmt: skip
    text = comparison.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Comparison.model_validate_json(text) == comparison


def test_a_forged_verdict_is_refused() -> None:
    """The stored verdict must be what the checks say."""
    stored = json.loads(build_report().model_dump_json())
    stored["checks"][0]["verdict"] = "fail"
    with pytest.raises(ValidationError, match="the verdict is 'pass' and the checks say 'fail'"):
        Report.model_validate(stored)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 1},
        {"verdikt": "pass"},
        {"created": "2026-11-24T12:00:00"},
        {"arms": [{"name": "dense", "prompts": 0}]},
    ],
)
def test_a_report_that_does_not_fit_the_schema_is_refused(change: dict[str, object]) -> None:
    """A later schema, an unknown key, a time without zone, an arm that answered nothing."""
    stored = json.loads(build_report().model_dump_json())
    with pytest.raises(ValidationError):
        Report.model_validate({**stored, **change})


def test_more_right_answers_than_prompts_are_refused() -> None:
    """An arm whose counts cannot be."""
    with pytest.raises(ValidationError, match="3 correct of 2 prompts"):
        ArmSummary(name="a", prompts=2, correct=3, accuracy=1, accuracy_lower=1, accuracy_upper=1)


def test_a_report_cannot_be_changed() -> None:
    """Frozen: what was judged is what is printed."""
    report = Report(created=datetime(2026, 1, 1, tzinfo=UTC), model="m", target="t")
    with pytest.raises(ValidationError):
        report.model = "other"  # type: ignore[misc]
