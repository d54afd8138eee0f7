"""The answer as models write it: in a box, else after ``####``, else the last number, else the last words."""

from __future__ import annotations

import re

from racdeploy.problems.extract import (
    as_number,
    equal_answers,
    extract_boxed,
    extract_hash_mark,
    extract_last_number,
)
from racdeploy.scorers import Scored


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare what is found first; a gold answer that is no number also counts as the last words of the last line."""
    found, how = _find(answer)
    if found is not None and equal_answers(found, gold):
        return Scored(True, found, how)
    if as_number(gold) is None and how != "boxed":
        lines, words = answer.strip().splitlines(), re.findall(r"\w+", gold.casefold())
        if lines and words and re.findall(r"\w+", lines[-1].casefold())[-len(words) :] == words:
            return Scored(True, gold, "last words")
    return Scored(False, found, how)


def _find(answer: str) -> tuple[str | None, str]:
    for how, extract in (
        ("boxed", extract_boxed),
        ("after ####", extract_hash_mark),
        ("last number", extract_last_number),
    ):
        if (found := extract(answer)) is not None:
            return found, how
    return None, "no box, no ####, no number"
