"""The answer as models write it: in a box, after ``####``, the last number, or the last words."""

from __future__ import annotations

import re

from racdeploy.tasks import extract
from racdeploy.tasks.scoring import Scored

_EXTRACTORS = {
    "boxed": extract.extract_boxed,
    "after ####": extract.extract_hash_mark,
    "last number": extract.extract_last_number,
}


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare what is found first; a gold answer in words also counts as the last words."""
    found, how = _find(answer)
    if found is not None and extract.equal_answers(found, gold):
        return Scored(True, found, how)

    if extract.as_number(gold) is None and how != "boxed":
        lines = answer.strip().splitlines() or [""]
        said = re.findall(r"\w+", lines[-1].casefold())
        words = re.findall(r"\w+", gold.casefold())
        if words and said[-len(words) :] == words:
            return Scored(True, gold, "last words")

    return Scored(False, found, how)


def _find(answer: str) -> tuple[str | None, str]:
    for how, find in _EXTRACTORS.items():
        found = find(answer)
        if found is not None:
            return found, how

    return None, "no box, no ####, no number"
