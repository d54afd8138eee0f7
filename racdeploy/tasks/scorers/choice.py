r"""One letter of several: ``\boxed{B}``, "the answer is (B)", or a lone letter in the last line."""

from __future__ import annotations

import re

from racdeploy.tasks.extract import extract_boxed
from racdeploy.tasks.scoring import Scored

_LETTER = re.compile(r"^\W*(?:\\text(?:bf)?\{)?\W*([A-Z])\b\W*", re.IGNORECASE)
_SAID = re.compile(
    r"\b(?:answer|choice|option)\b(?:\s+is)?\s*[:=]?\s*[(\[*]*([A-Z])\b(?!['’])", re.IGNORECASE
)
_ALONE = re.compile(r"(?<![\w'’])[(\[*]*([A-Z])[)\].:*]*(?=\s|$)")


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare the letter, whatever its case; of several, the last one counts."""
    found, how = _find(answer)
    wanted = _LETTER.match(gold)
    correct = wanted is not None and found == wanted[1].upper()
    return Scored(correct, found, how)


def _find(answer: str) -> tuple[str | None, str]:
    boxed = extract_boxed(answer)
    if boxed is not None and (match := _LETTER.match(boxed)):
        return match[1].upper(), "boxed"
    if said := _SAID.findall(answer):
        return said[-1].upper(), "after the word answer, choice or option"

    lines = answer.strip().splitlines()
    if lines and (alone := _ALONE.findall(lines[-1])):
        return alone[-1].upper(), "letter in the last line"

    return None, "no letter"
