"""The last word of the answer, without the punctuation behind it; capitals do not count."""

from __future__ import annotations

from racdeploy.tasks.scoring import AnswerScore


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Compare the last words."""
    words = [word.strip(".,;:!?") for word in answer.split()]
    if not words:
        return AnswerScore(False, None, "no text")
    return AnswerScore(words[-1].casefold() == gold.casefold(), words[-1], "last word")
