"""Operations of a sandbox that scores a model's answers against gold answers."""

from __future__ import annotations

from racdeploy import plugins
from racdeploy.processes import privileges
from racdeploy.processes.messages import Header
from racdeploy.sandbox.limits import close_files


def _prepare(request: Header) -> Header:
    """Import a scorer with its lazy imports; one without them opens no file from here on."""
    module = plugins.load("scorers", request["name"])
    if hasattr(module, "prepare"):
        module.prepare()
        privileges.give_up("reader")
    else:
        close_files()
    return {}


def _check(request: Header) -> Header:
    plugins.load("scorers", request["name"]).check(request["argument"])
    return {}


def _score(request: Header) -> Header:
    module = plugins.load("scorers", request["name"])
    score = module.score(request["answer"], request["gold"], request["argument"])
    return {"scored": [score.correct, score.extracted, score.extractor]}


OPERATIONS = {"prepare": _prepare, "check": _check, "score": _score}
