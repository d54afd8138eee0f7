r"""What a regular expression finds, as ``regex:answer=(\d+)``: its first group, or all of it."""

from __future__ import annotations

import re

from racdeploy.errors import UsageError
from racdeploy.tasks.extract import equal_answers
from racdeploy.tasks.scoring import Scored


def check(argument: str) -> None:
    """Refuse an expression that does not compile, or that an empty answer matches."""
    try:
        compiled = re.compile(argument)
    except re.error as error:
        reason = f"scorer regex: {argument!r} is not a regular expression: {error}"
        raise UsageError("invalid-regex", reason) from error

    if not argument or compiled.match(""):
        raise UsageError(
            "regex-matches-empty",
            f"scorer regex: {argument!r} matches an answer that says nothing",
            remedy=r"write regex:answer=(\d+)",
        )


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare the last match, as a number or as text."""
    matches = list(re.finditer(argument, answer))
    if not matches:
        return Scored(False, None, "no match")

    last = matches[-1]
    found = last[1] if last.re.groups else last[0]
    return Scored(found is not None and equal_answers(found, gold), found, "last match")
