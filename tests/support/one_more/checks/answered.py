"""Answered: the pruned model says something after its thinking, on every prompt."""

from __future__ import annotations

from racdeploy.verification.evidence import Evidence, Outcome


def check(evidence: Evidence) -> Outcome:
    """Pass if no answer is empty."""
    records = evidence.pruned.records
    empty = sum(not record.answer_text.strip() for record in records)
    summary = f"{empty} of {len(records)} answers are empty"
    return Outcome("fail" if empty else "pass", summary, {"empty": empty})
