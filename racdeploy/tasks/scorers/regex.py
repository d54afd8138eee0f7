r"""Match of a regular expression, as ``regex:answer=(\d+)``: its first group, or all of it."""

from __future__ import annotations

import re

from racdeploy.errors import UsageError
from racdeploy.tasks.extraction import is_same_answer
from racdeploy.tasks.scoring import AnswerScore


def check(argument: str) -> None:
    """Refuse an expression that does not compile, or that matches an empty answer."""
    try:
        compiled = re.compile(argument)
    except re.error as error:
        raise UsageError(
            "invalid-regex", f"scorer regex: {argument!r} is not a regular expression: {error}"
        ) from error

    if not argument or compiled.match(""):
        raise UsageError(
            "regex-matches-empty",
            f"scorer regex: {argument!r} matches an empty answer",
            remedy=r"write regex:answer=(\d+)",
        )


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Compare the last match, as a number or as text."""
    matches = list(re.finditer(argument, answer))
    if not matches:
        return AnswerScore(False, None, "no match")

    last = matches[-1]
    extracted = last[1] if last.re.groups else last[0]
    return AnswerScore(
        extracted is not None and is_same_answer(extracted, gold), extracted, "last match"
    )
