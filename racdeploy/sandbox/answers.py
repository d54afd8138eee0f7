"""Operations of a reading process that scores: a model's answers, and gold answers."""

from __future__ import annotations

from racdeploy import plugins
from racdeploy.processes.messages import Header, Message


def _prepare(header: Header, payload: bytes) -> Message:
    """Import a scorer, and what it imports late."""
    module = plugins.load("scorers", header["name"])
    if hasattr(module, "prepare"):
        module.prepare()
    return {}, b""


def _check(header: Header, payload: bytes) -> Message:
    plugins.load("scorers", header["name"]).check(header["argument"])
    return {}, b""


def _score(header: Header, payload: bytes) -> Message:
    module = plugins.load("scorers", header["name"])
    scored = module.score(header["answer"], header["gold"], header["argument"])
    return {"scored": [scored.correct, scored.extracted, scored.how]}, b""


OPERATIONS = {"prepare": _prepare, "check": _check, "score": _score}
