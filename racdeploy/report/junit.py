"""Report as JUnit XML: one test case per check, for CI servers that show test results.

A failed check is a failure, an inconclusive one an error, one that decides nothing a skip. CI
servers take a file without failures as a success, so an inconclusive report without an inconclusive
check gets a test case ``verdict`` with an error. The figures are properties of the suite, named
``CHECK.FIGURE``: some servers refuse them in a test case, where pytest writes them.
Source: the XML schema of the Jenkins xUnit plugin, junit-10.xsd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from xml.etree import ElementTree

from racdeploy.report.summary import write_findings
from racdeploy.report.tables import to_single_line
from racdeploy.results.checks import CheckResult
from racdeploy.results.report import Report

_TAGS = {
    "fail": "failure",
    "inconclusive": "error",
    "measured": "skipped",
    "skipped": "skipped",
}


def render(report: Report) -> str:
    """Return the report as a JUnit XML document."""
    checks = list(report.checks)
    verdicts = Counter[str](check.verdict for check in checks)
    # Skipped checks alone would look like success to a CI server.
    if report.verdict == "inconclusive" and not verdicts["inconclusive"]:
        summary = write_findings(report)
        checks.append(CheckResult(name="verdict", verdict="inconclusive", summary=summary))
        verdicts["inconclusive"] = 1

    counts = {
        "tests": str(len(checks)),
        "failures": str(verdicts["fail"]),
        "errors": str(verdicts["inconclusive"]),
    }

    root = ElementTree.Element("testsuites", {"name": "racdeploy", **counts})

    created = report.created.isoformat(timespec="seconds")
    about = {"name": to_single_line(report.model), "timestamp": created, **counts}
    undecided = verdicts["skipped"] + verdicts["measured"]
    suite = ElementTree.SubElement(root, "testsuite", about, skipped=str(undecided))
    _add_properties(suite, checks)

    for check in checks:
        _add_case(suite, check, f"racdeploy.{to_single_line(report.target)}")

    ElementTree.indent(root)
    document = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{document}\n'


def _add_properties(suite: ElementTree.Element, checks: Iterable[CheckResult]) -> None:
    figures = {
        f"{check.name}.{name}": value for check in checks for name, value in check.figures.items()
    }
    if not figures:
        return

    properties = ElementTree.SubElement(suite, "properties")

    for name, value in figures.items():
        about = {"name": to_single_line(name), "value": to_single_line(str(value))}
        ElementTree.SubElement(properties, "property", about)


def _add_case(suite: ElementTree.Element, check: CheckResult, class_name: str) -> None:
    """Add a test case; its message is the summary, its text the remedy."""
    about = {"classname": class_name, "name": to_single_line(check.name)}
    case = ElementTree.SubElement(suite, "testcase", about)
    tag = _TAGS.get(check.verdict)
    if tag is None:
        ElementTree.SubElement(case, "system-out").text = to_single_line(check.summary)
        return

    outcome = ElementTree.SubElement(case, tag, {"message": to_single_line(check.summary)})
    if tag != "skipped":
        outcome.set("type", check.verdict)
    outcome.text = to_single_line(check.remedy) or None
