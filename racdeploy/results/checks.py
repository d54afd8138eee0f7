"""Verdicts: of each check, and of a whole report, which follows from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from racdeploy.results.part import Part

Verdict = Literal["pass", "fail", "inconclusive"]
CheckVerdict = Literal["pass", "fail", "inconclusive", "measured", "skipped"]


class CheckResult(Part):
    """What one check of the gate found.

    Args:
        name: the check's plugin name.
        verdict: ``measured`` has figures and no limit, ``skipped`` has none; neither decides.
        summary: one sentence with the numbers that decided; ``figures`` has units in the names.
        remedy: the next thing to do where it did not pass.
    """

    name: str
    verdict: CheckVerdict
    summary: str
    figures: dict[str, float | int | str] = Field(default_factory=dict)
    remedy: str = ""


def overall_verdict(checks: Iterable[CheckResult]) -> Verdict:
    """Return the verdict of a whole report.

    One failed check fails it. Otherwise one inconclusive check makes it inconclusive, and so do no
    checks at all or only ones that decide nothing: missing data never passes.
    """
    verdicts = {check.verdict for check in checks}
    if "fail" in verdicts:
        return "fail"
    if "inconclusive" in verdicts or "pass" not in verdicts:
        return "inconclusive"
    return "pass"
