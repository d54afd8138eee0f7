"""Verdicts of checks, and the verdict of a report, which follows from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from pydantic import Field

from racdeploy.results.schema import FrozenModel

VerdictName = Literal["pass", "fail", "inconclusive"]
CheckVerdict = Literal["pass", "fail", "inconclusive", "measured", "skipped"]
JUDGED_BY_INTERVALS = ("accuracy", "thinking", "backends")
"""Checks that more prompts may make clear."""


class CheckResult(FrozenModel):
    """Result of one check of the gate.

    Args:
        name: plugin name of the check.
        verdict: ``measured`` has figures but no limit, ``skipped`` has neither; neither decides.
        summary: one sentence with the numbers that decided.
        figures: the same numbers by name; names end in their units.
        remedy: next step if the check did not pass.
    """

    name: str
    verdict: CheckVerdict
    summary: str
    figures: dict[str, float | int | str] = Field(default_factory=dict)
    remedy: str = ""


def is_clear(verdicts: Collection[CheckVerdict]) -> bool:
    """Return whether one of the verdicts is a failure, or none asks for more prompts."""
    return "fail" in verdicts or "inconclusive" not in verdicts


def overall_verdict(checks: Iterable[CheckResult]) -> VerdictName:
    """Return the verdict of a whole report.

    One failed check fails the report. Otherwise one inconclusive check makes it inconclusive, as do
    reports without a check that decides: missing data never passes.
    """
    verdicts = {check.verdict for check in checks}
    if "fail" in verdicts:
        return "fail"
    if "inconclusive" in verdicts or "pass" not in verdicts:
        return "inconclusive"
    return "pass"
