"""Whether an answer is right: one file per scorer.

A scorer has ``score(answer, gold, argument) -> Scored`` and, where it takes an argument or needs a
package, ``check(argument)``. ``answer`` is the text after the thinking, because a truncated thought
often mentions the right number. None runs code that a model wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

from racdeploy import plugins
from racdeploy.errors import UsageError

__all__ = ["DEFAULT", "Scored", "check", "score"]

DEFAULT = "auto"


@dataclass(frozen=True)
class Scored:
    """A scored answer."""

    correct: bool
    extracted: str | None  # what was compared with the gold answer
    how: str  # says where that was, or why it is None


def check(spec: str) -> None:
    """Refuse what is no scorer, ``NAME`` or ``NAME:ARGUMENT``, or cannot run here."""
    name, colon, argument = (spec or DEFAULT).partition(":")
    module = plugins.load("scorers", name)
    if hasattr(module, "check"):
        module.check(argument)
    elif colon:
        raise UsageError(f"scorer {name!r} takes no argument", remedy=f"write {name}")


def score(spec: str, answer: str, gold: str) -> Scored:
    """Score the text after the thinking."""
    name, _, argument = (spec or DEFAULT).partition(":")
    result: Scored = plugins.load("scorers", name).score(answer, gold, argument)
    return result
