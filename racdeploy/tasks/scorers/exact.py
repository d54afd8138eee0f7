"""The whole answer, letter by letter; only white space at its ends and runs of it do not count."""

from __future__ import annotations

from racdeploy.tasks.scoring import Scored


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare the whole text."""
    found = " ".join(answer.split())
    if not found:
        return Scored(False, None, "no text")
    return Scored(found == " ".join(gold.split()), found, "whole text")
