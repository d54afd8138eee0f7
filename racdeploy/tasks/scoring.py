"""Scoring of answers by a plugin of ``scorers/``, in a process with limits.

A scorer has ``score(answer, gold, argument) -> AnswerScore`` and, if it takes an argument or needs
a package, ``check(argument)``. ``answer`` is the text after the thinking, because a truncated
thought often mentions the right number. No scorer runs code that a model wrote.

Answers, gold answers and arguments are untrusted, so a process with limits scores them. A scorer
may set ``SECONDS`` and ``MEMORY_BYTES`` of a call there, ``prepare()`` to import a large package
before the first, and ``FAILURE_IS_WRONG = True`` if an answer that it fails on counts as wrong;
without it, that is an ArtifactError.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from racdeploy import plugins
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.sandbox.client import DEFAULT_MEMORY_BYTES, DEFAULT_SECONDS, Sandbox, SandboxRequest

DEFAULT_SCORER = "auto"
_PREPARING_SECONDS = 60.0


@dataclass(frozen=True)
class AnswerScore:
    """Score of an answer."""

    correct: bool
    extracted: str | None  # text that was compared with the gold answer
    extractor: str  # place where it was found, or the reason why it is None


def check(spec: str) -> None:
    """Refuse a scorer, ``NAME`` or ``NAME:ARGUMENT``, that is unknown or cannot run here."""
    name, colon, argument = (spec or DEFAULT_SCORER).partition(":")
    module = plugins.load("scorers", name)

    if not hasattr(module, "check"):
        refuse_argument(name, colon)
    elif not argument or hasattr(module, "prepare"):
        module.check(argument)  # a missing package is reported before a process is prepared
    else:
        _reader(name).ask(_request(module, name, "check", argument=argument))


def refuse_argument(name: str, argument: str) -> None:
    """Refuse an argument for a scorer that takes none."""
    if argument:
        raise UsageError(
            "takes-no-argument", f"scorer {name!r} takes no argument", remedy=f"write {name}"
        )


def score(spec: str, answer: str, gold: str) -> AnswerScore:
    """Score the text after the thinking.

    Raises:
        ArtifactError: the scorer exceeds its time or memory.
    """
    name, _, argument = (spec or DEFAULT_SCORER).partition(":")
    module = plugins.load("scorers", name)
    request = _request(module, name, "score", argument=argument, answer=answer, gold=gold)

    try:
        scored = _reader(name).ask(request)["scored"]
    except ArtifactError as error:
        if getattr(module, "FAILURE_IS_WRONG", False):
            return AnswerScore(False, None, error.message)
        raise

    return AnswerScore(*scored)


@cache
def _reader(name: str) -> Sandbox:
    """Return the process of a scorer, started once."""
    module = plugins.load("scorers", name)
    memory_bytes = getattr(module, "MEMORY_BYTES", DEFAULT_MEMORY_BYTES)

    reader = Sandbox("racdeploy.sandbox.scoring_operations", memory_bytes, opens_files=True)
    failure = f"scorer {name!r} cannot be prepared"
    preparing = SandboxRequest(
        "prepare", {"name": name}, code="scorer-failed", failure=failure, seconds=_PREPARING_SECONDS
    )
    reader.add_setup("scorer", preparing)
    return reader


def _request(module: ModuleType, name: str, op: str, argument: str, **texts: Any) -> SandboxRequest:
    """Return the request for an operation of a scorer, with its time limit and its error."""
    values = {"name": name, "argument": argument, **texts}
    seconds = getattr(module, "SECONDS", DEFAULT_SECONDS)
    spec = f"{name}:{argument}" if argument else name
    return SandboxRequest(
        op,
        values,
        code="scorer-failed",
        failure=f"scorer {spec[:200]!r} failed",
        remedy="correct the expression, or the gold answer" if argument else "",
        seconds=seconds,
    )
