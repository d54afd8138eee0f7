"""JUnit XML: structure, counts and the traps of files that look green."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import xmlschema

from racdeploy.report import junit
from racdeploy.results.checks import CheckResult
from racdeploy.results.report import Report
from tests.support.sample_report import HOSTILE

SCHEMA = xmlschema.XMLSchema(Path(__file__).with_name("junit.xsd"))


def parse(report: Report) -> ElementTree.Element:
    # Bytes, so that the declared encoding is what counts.
    return ElementTree.fromstring(junit.render(report).encode("utf-8"))


def outcomes(report: Report) -> dict[str | None, str]:
    """Return the tag that decides each test case: failure, error, skipped or none."""
    return {
        case.get("name"): next(
            (e.tag for e in case if e.tag in ("failure", "error", "skipped")), "passed"
        )
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
    assert outcomes(report) == {"accuracy": "passed", "thinking": "passed", "speed": "skipped"}


def test_a_failure_fails_and_an_inconclusive_check_is_an_error(report: Report) -> None:
    """Counts agree with the cases, at both levels."""
    spoiled = with_checks(report, "pass", "fail", "inconclusive", "skipped")
    assert list(outcomes(spoiled).values()) == ["passed", "failure", "error", "skipped"]
    root = parse(spoiled)
    for element in (root, root[0]):
        assert [element.get(name) for name in ("tests", "failures", "errors")] == ["4", "1", "1"]
    assert root[0].get("skipped") == "1"
    failure = root.find(".//failure")
    assert failure is not None
    assert (failure.get("message"), failure.get("type"), failure.text) == (
        "found",
        "fail",
        "do this",
    )


def test_a_report_without_a_verdict_is_not_green(report: Report) -> None:
    """No check, or only skipped ones, would read as success: an error case is added."""
    assert outcomes(with_checks(report)) == {"verdict": "error"}
    assert outcomes(with_checks(report, "skipped")) == {"check_0": "skipped", "verdict": "error"}


def test_figures_become_properties(report: Report) -> None:
    """CI servers keep them over time."""
    found = {p.get("name"): p.get("value") for p in parse(report).iter("property")}
    assert found == {"accuracy.drop": "0.0078", "accuracy.n": "256", "accuracy.method": "tango"}


@pytest.mark.parametrize(
    "verdicts", [None, (), ("skipped",), ("pass", "fail", "inconclusive", "skipped")]
)
def test_the_file_keeps_the_schema(report: Report, verdicts: tuple[str, ...] | None) -> None:
    """With figures and without, hostile names included."""
    shown = report if verdicts is None else with_checks(report, *verdicts)
    hostile = shown.model_copy(update={"model": HOSTILE, "target": HOSTILE})
    SCHEMA.validate(parse(hostile))


def test_the_schema_refuses_a_spoiled_file(report: Report) -> None:
    """Properties in a test case, a count that is missing, two outcomes of one test."""
    for spoil in (
        lambda root: ElementTree.SubElement(root[0].find("testcase"), "properties"),
        lambda root: root[0].attrib.pop("failures"),
        lambda root: [
            ElementTree.SubElement(root[0][-1], "failure", {"message": "m"}) for _ in range(2)
        ],
    ):
        root = parse(report)
        spoil(root)
        assert not SCHEMA.is_valid(root)


def test_hostile_text_gives_valid_xml(report: Report) -> None:
    """Control characters are not XML, not even escaped."""
    check = CheckResult(
        name=HOSTILE, verdict="fail", summary=HOSTILE + "\x00\ud800", remedy=HOSTILE
    )
    root = parse(report.model_copy(update={"model": HOSTILE, "checks": (check,)}))
    failure = root.find(".//failure")
    assert failure is not None
    assert "<script>" in str(failure.get("message"))
    assert "\x1b" not in str(failure.get("message"))
