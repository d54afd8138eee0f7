"""Whether every instruction of an IFEval prompt is followed, by lm-evaluation-harness's own code.

The gold answer is JSON: the prompt, its instructions and their arguments. The harness's module
downloads NLTK's punkt_tab where that is missing; here it is refused first.
Source: lm-eval 0.4.13, ``lm_eval.tasks.ifeval``.
"""

from __future__ import annotations

import json

from racdeploy.errors import EnvironmentFailure
from racdeploy.plugins import require
from racdeploy.tasks.scoring import Scored, refuse_argument

SECONDS = 10.0
MEMORY_BYTES = 4 * 2**30  # the harness imports much
GIVES_UP = True
_DATA = "tokenizers/punkt_tab"


def check(argument: str) -> None:
    """Refuse an argument, and a machine without the harness or NLTK's data."""
    refuse_argument("ifeval", argument)
    for package in ("lm_eval", "langdetect"):
        require(package)
    import nltk

    try:
        nltk.data.find(_DATA)
    except LookupError as error:
        raise EnvironmentFailure(
            "missing-nltk-data",
            "IFEval counts sentences with NLTK's punkt_tab, which is not on this machine",
            remedy="python -m nltk.downloader punkt_tab",
        ) from error


def prepare() -> None:
    """Import the harness's module."""
    import lm_eval.tasks.ifeval.utils  # noqa: F401


def score(answer: str, gold: str, argument: str) -> Scored:
    """Check every instruction; the answer is right if all are followed as they are written."""
    import langdetect
    from lm_eval.tasks.ifeval import utils

    # Without a seed it guesses the language of a short answer differently each time.
    langdetect.DetectorFactory.seed = 0

    asked = json.loads(gold)
    if not isinstance(asked, dict):
        return Scored(False, None, "the gold answer lists no instructions")

    question = utils.InputExample(
        key=0,
        instruction_id_list=asked["instruction_id_list"],
        prompt=asked["prompt"],
        kwargs=asked["kwargs"],
    )
    checked = utils.test_instruction_following_strict(question, answer)

    followed = checked.follow_instruction_list
    found = f"{sum(followed)} of {len(followed)}"
    return Scored(checked.follow_all_instructions, found, "instructions followed")
