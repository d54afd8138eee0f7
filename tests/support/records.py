"""Records and arms for tests of the checks."""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.results.answers import AnswerRecord
from racdeploy.verification.evidence import ArmResult


def record(prompt: int, *, correct: bool = True, **values: object) -> AnswerRecord:
    """Return a record that thought for a hundred tokens and closed."""
    defaults = {
        "task": "sums",
        "question": f"{prompt} + 1?",
        "gold": str(prompt + 1),
        "arm": "dense",
        "thinking_tokens": 100,
        "answer_tokens": 4,
        "state": "closed",
        "finish_reason": "stop",
        "extracted": str(prompt + 1),
        "answer_text": str(prompt + 1),
        "thinking_text": "",
    }
    return AnswerRecord(prompt=prompt, correct=correct, **(defaults | values))  # type: ignore[arg-type]


def arm_of(records: Sequence[AnswerRecord]) -> ArmResult:
    """Return an arm that gave these answers."""
    return ArmResult("dense", tuple(records), 1000, "q8_0", 0.5)
