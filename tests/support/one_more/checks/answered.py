"""Answered: the pruned model says something after its thinking, on every prompt."""

from __future__ import annotations

from racdeploy.results.checks import CheckResult
from racdeploy.verification.evidence import Evidence


def check(evidence: Evidence) -> CheckResult:
    """Pass if no answer is empty."""
    records = evidence.pruned.records
    empty = sum(not record.answer_text.strip() for record in records)
    return CheckResult(
        name="answered",
        verdict="fail" if empty else "pass",
        summary=f"{empty} of {len(records)} answers are empty",
        figures={"empty": empty},
    )
