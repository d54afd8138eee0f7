"""A report as JUnit XML: one test case per check, for CI servers that draw test results.

A failed check is a failure, an inconclusive one an error, a skipped one a skip. CI servers take a file
without failures for a success, so an inconclusive report in which no check says so gets a test case
``verdict`` with an error. The figures are properties of the suite, as ``CHECK.FIGURE``: in a test case, where pytest
writes them, some servers refuse them. Source: the XML schema of the Jenkins xUnit plugin, junit-10.xsd.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable

from racdeploy.report.model import CheckResult, Report
from racdeploy.report.tables import explanation, plain

_TAGS = {"fail": "failure", "inconclusive": "error", "skipped": "skipped"}


def render(report: Report) -> str:
    """Return the report as a JUnit XML document."""
    checks = list(report.checks)
    if report.verdict == "inconclusive" and all(
        check.verdict != "inconclusive" for check in checks
    ):
        checks.append(
            CheckResult(name="verdict", verdict="inconclusive", summary=explanation(report))
        )
    counts = {
        "tests": str(len(checks)),
        "failures": str(sum(check.verdict == "fail" for check in checks)),
        "errors": str(sum(check.verdict == "inconclusive" for check in checks)),
    }
    skipped = str(sum(check.verdict == "skipped" for check in checks))
    root = ElementTree.Element("testsuites", {"name": "racdeploy", **counts})
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": plain(report.model),
            "timestamp": report.created.isoformat(timespec="seconds"),
            **counts,
            "skipped": skipped,
        },
    )
    _add_properties(suite, checks)
    for check in checks:
        _add_case(suite, check, f"racdeploy.{plain(report.target)}")
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _add_properties(suite: ElementTree.Element, checks: Iterable[CheckResult]) -> None:
    figures = {
        f"{check.name}.{name}": value for check in checks for name, value in check.figures.items()
    }
    if not figures:
        return
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in figures.items():
        ElementTree.SubElement(
            properties, "property", {"name": plain(name), "value": plain(str(value))}
        )


def _add_case(suite: ElementTree.Element, check: CheckResult, class_name: str) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", {"classname": class_name, "name": plain(check.name)}
    )
    if tag := _TAGS.get(check.verdict):
        outcome = ElementTree.SubElement(case, tag, {"message": plain(check.summary)})
        if tag != "skipped":
            outcome.set("type", check.verdict)
        outcome.text = plain(check.remedy) or None
    else:
        ElementTree.SubElement(case, "system-out").text = plain(check.summary)
