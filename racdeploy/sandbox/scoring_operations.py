"""Operations of a sandbox that scores a model's answers against gold answers."""

from __future__ import annotations

from racdeploy import plugins
from racdeploy.processes import privileges
from racdeploy.processes.messages import Header, Message
from racdeploy.sandbox.limits import close_files


def _prepare(header: Header, payload: bytes) -> Message:
    """Import a scorer with its lazy imports; one without them opens no file from here on."""
    module = plugins.load("scorers", header["name"])
    if hasattr(module, "prepare"):
        module.prepare()
        privileges.give_up("reader")
    else:
        close_files()
    return {}, b""


def _check(header: Header, payload: bytes) -> Message:
    plugins.load("scorers", header["name"]).check(header["argument"])
    return {}, b""


def _score(header: Header, payload: bytes) -> Message:
    module = plugins.load("scorers", header["name"])
    score = module.score(header["answer"], header["gold"], header["argument"])
    return {"scored": [score.correct, score.extracted, score.extractor]}, b""


OPERATIONS = {"prepare": _prepare, "check": _check, "score": _score}
