"""Score answers: by a plugin of ``scorers/``, in a process with limits.

A scorer has ``score(answer, gold, argument) -> Scored`` and, where it takes an argument or needs a
package, ``check(argument)``. ``answer`` is the text after the thinking, because a truncated thought
often mentions the right number. None runs code that a model wrote.

Answers are a model's, and gold answers and arguments whoever's: a process with limits scores them.
A scorer may say what it takes there: ``SECONDS`` and ``MEMORY_BYTES`` of a call, ``prepare()`` that
imports a large package before the first, and ``GIVES_UP = True`` if an answer that it fails on is
wrong; without it, that is an ArtifactError.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from racdeploy import plugins
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.sandbox.reader import MEMORY_BYTES, SECONDS, Reader, Request

__all__ = ["DEFAULT", "Scored", "check", "refuse_argument", "score"]

DEFAULT = "auto"
_PREPARING_SECONDS = 60.0


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

    if not hasattr(module, "check"):
        refuse_argument(name, colon)
    elif not argument or hasattr(module, "prepare"):
        module.check(argument)  # whether there is a package must be known without it
    else:
        _reader(name).ask(_request(module, name, "check", argument=argument))


def refuse_argument(name: str, argument: str) -> None:
    """Refuse an argument of a scorer that takes none."""
    if argument:
        raise UsageError(
            "takes-no-argument", f"scorer {name!r} takes no argument", remedy=f"write {name}"
        )


def score(spec: str, answer: str, gold: str) -> Scored:
    """Score the text after the thinking.

    Raises:
        ArtifactError: the scorer's argument or the gold answer takes more than it may.
    """
    name, _, argument = (spec or DEFAULT).partition(":")
    module = plugins.load("scorers", name)
    request = _request(module, name, "score", argument=argument, answer=answer, gold=gold)

    try:
        header, _ = _reader(name).ask(request)
    except ArtifactError as error:
        if getattr(module, "GIVES_UP", False):
            return Scored(False, None, error.message)
        raise

    correct, extracted, how = header["scored"]
    return Scored(correct, extracted, how)


@cache
def _reader(name: str) -> Reader:
    """Return the process of a scorer."""
    module = plugins.load("scorers", name)
    memory_bytes = getattr(module, "MEMORY_BYTES", MEMORY_BYTES)

    reader = Reader("racdeploy.sandbox.answers", memory_bytes, opens_files=True)
    what = f"scorer {name!r} cannot be prepared"
    preparing = Request(
        "prepare", {"name": name}, code="scorer-failed", what=what, seconds=_PREPARING_SECONDS
    )
    reader.keep("scorer", preparing)
    return reader


def _request(module: ModuleType, name: str, op: str, argument: str, **texts: Any) -> Request:
    values = {"name": name, "argument": argument, **texts}
    seconds = getattr(module, "SECONDS", SECONDS)
    spec = f"{name}:{argument}" if argument else name
    return Request(
        op,
        values,
        code="scorer-failed",
        what=f"scorer {spec[:200]!r} failed",
        remedy="correct the expression, or the gold answer" if argument else "",
        seconds=seconds,
    )
