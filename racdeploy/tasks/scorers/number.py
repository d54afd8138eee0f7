"""Last number of the answer."""

from __future__ import annotations

from racdeploy.tasks.extraction import extract_last_number, parse_number
from racdeploy.tasks.scoring import AnswerScore


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Compare values: 1,234.50 is 1234.5, and 1/2 is 0.5."""
    last = extract_last_number(answer)
    if last is None:
        return AnswerScore(False, None, "no number")
    actual, expected = parse_number(last), parse_number(gold)
    return AnswerScore(actual is not None and actual == expected, last, "last number")
