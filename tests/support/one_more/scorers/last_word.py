"""The last word of the answer, without the punctuation behind it; capitals do not count."""

from __future__ import annotations

from racdeploy.tasks.scoring import Scored


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare the last words."""
    words = [word.strip(".,;:!?") for word in answer.split()]
    if not words:
        return Scored(False, None, "no text")
    return Scored(words[-1].casefold() == gold.casefold(), words[-1], "last word")
