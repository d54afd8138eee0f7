"""JUnit XML: structure, counts and the traps of files that look green."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from racdeploy.report import junit
from racdeploy.report_model import CheckResult, Report
from tests.report.sample_report import HOSTILE


def parse(report: Report) -> ElementTree.Element:
    # Bytes, so that the declared encoding is what counts.
    return ElementTree.fromstring(junit.render(report).encode("utf-8"))


def outcomes(report: Report) -> dict[str | None, str]:
    """Return the tag that decides each test case: failure, error, skipped or none."""
    return {
        case.get("name"): next((e.tag for e in case if e.tag in ("failure", "error", "skipped")), "passed")
        for case in parse(report).iter("testcase")
    }


def with_checks(report: Report, *verdicts: str) -> Report:
    checks = tuple(
        CheckResult(name=f"check_{i}", verdict=verdict, summary="found", remedy="do this")
        for i, verdict in enumerate(verdicts)
    )
    return report.model_copy(update={"checks": checks})


def test_there_is_one_test_case_per_check(report: Report) -> None:
    """A pass is empty of outcomes, a skip is a skip."""
    assert outcomes(report) == {"accuracy": "passed", "length": "passed", "speed": "skipped"}


def test_a_failure_fails_and_an_inconclusive_check_is_an_error(report: Report) -> None:
    """Counts agree with the cases, at both levels."""
    spoiled = with_checks(report, "pass", "fail", "inconclusive", "skipped")
    assert list(outcomes(spoiled).values()) == ["passed", "failure", "error", "skipped"]
    root = parse(spoiled)
    for element in (root, root[0]):
        counts = [element.get(name) for name in ("tests", "failures", "errors", "skipped")]
        assert counts == ["4", "1", "1", "1"]
    failure = root.find(".//failure")
    assert failure is not None
    assert (failure.get("message"), failure.get("type"), failure.text) == ("found", "fail", "do this")


def test_a_report_without_a_verdict_is_not_green(report: Report) -> None:
    """No check, or only skipped ones, would read as success: an error case is added."""
    assert outcomes(with_checks(report)) == {"verdict": "error"}
    assert outcomes(with_checks(report, "skipped")) == {"check_0": "skipped", "verdict": "error"}


def test_figures_become_properties(report: Report) -> None:
    """CI servers keep them over time."""
    found = {p.get("name"): p.get("value") for p in parse(report).iter("property")}
    assert found == {"drop": "0.0078", "n": "256", "method": "tango"}


def test_hostile_text_gives_valid_xml(report: Report) -> None:
    """Control characters are not XML, not even escaped."""
    check = CheckResult(name=HOSTILE, verdict="fail", summary=HOSTILE + "\x00\ud800", remedy=HOSTILE)
    root = parse(report.model_copy(update={"model": HOSTILE, "checks": (check,)}))
    failure = root.find(".//failure")
    assert failure is not None
    assert "<script>" in str(failure.get("message"))
    assert "\x1b" not in str(failure.get("message"))
