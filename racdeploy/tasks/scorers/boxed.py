r"""Content of the last complete ``\boxed{...}``, compared as a number or as text."""

from __future__ import annotations

from racdeploy.tasks.extraction import extract_boxed, is_same_answer
from racdeploy.tasks.scoring import AnswerScore


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Compare the last box with the gold answer."""
    extracted = extract_boxed(answer)
    if extracted is None:
        return AnswerScore(False, None, "no complete box")
    return AnswerScore(is_same_answer(extracted, gold), extracted, "boxed")
