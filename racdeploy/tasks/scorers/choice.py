r"""Letter of an option: ``\boxed{B}``, "the answer is (B)", or a lone letter in the last line."""

from __future__ import annotations

import re

from racdeploy.tasks.extraction import extract_boxed
from racdeploy.tasks.scoring import AnswerScore

# No two repeats of one character follow each other without another between them, and none begins a
# search: a long run would be divided in every way, or tried from each of its characters.
_LETTER = re.compile(r"^\W*+(?:(?<=\\)text(?:bf)?\{\W*+)?([A-Z])\b", re.IGNORECASE)
_STATED_CHOICE = re.compile(
    r"\b(?:answer|choice|option)\b\s*+(?:(?<=\s)is\s*+)?(?:[:=]\s*+)?[(\[*]*+([A-Z])\b(?!['’])",
    re.IGNORECASE,
)
_ALONE = re.compile(r"(?<![\w'’])([A-Z])[)\].:*]*+(?=\s|$)")


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Compare the letter without case; of several, the last one counts."""
    letter, how = _extract(answer)
    gold_letter = _LETTER.match(gold)
    correct = gold_letter is not None and letter == gold_letter[1].upper()
    return AnswerScore(correct, letter, how)


def _extract(answer: str) -> tuple[str | None, str]:
    """Return the letter in its most explicit form, and the name of that form."""
    boxed = extract_boxed(answer)
    if boxed is not None and (match := _LETTER.match(boxed)):
        return match[1].upper(), "boxed"
    if matches := _STATED_CHOICE.findall(answer):
        return matches[-1].upper(), "after the word answer, choice or option"

    lines = answer.strip().splitlines()
    if lines and (alone := _ALONE.findall(lines[-1])):
        return alone[-1].upper(), "letter in the last line"

    return None, "no letter"
