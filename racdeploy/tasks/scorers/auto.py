"""Answer in any usual form: in a box, after ``####``, the last number, or the last words."""

from __future__ import annotations

import re

from racdeploy.tasks import extraction
from racdeploy.tasks.scoring import AnswerScore

_EXTRACTORS = {
    "boxed": extraction.extract_boxed,
    "after ####": extraction.extract_hash_mark,
    "last number": extraction.extract_last_number,
}


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Compare the first form that occurs; a gold answer in words may also be the last words."""
    extracted, how = _extract(answer)
    if extracted is not None and extraction.is_same_answer(extracted, gold):
        return AnswerScore(True, extracted, how)

    # A box is final; without one, "… so the answer is Thursday" is right as well.
    if extraction.parse_number(gold) is None and how != "boxed":
        lines = answer.strip().splitlines() or [""]
        answer_words = re.findall(r"\w+", lines[-1].casefold())
        words = re.findall(r"\w+", gold.casefold())
        if words and answer_words[-len(words) :] == words:
            return AnswerScore(True, gold, "last words")

    return AnswerScore(False, extracted, how)


def _extract(answer: str) -> tuple[str | None, str]:
    """Return the first form that occurs, and its name."""
    for how, extractor in _EXTRACTORS.items():
        extracted = extractor(answer)
        if extracted is not None:
            return extracted, how

    return None, "no box, no ####, no number"
