"""Check of every instruction of an IFEval prompt, by lm-evaluation-harness's own code.

The gold answer is JSON: the prompt, its instructions and their arguments. The harness's module
would download NLTK's punkt_tab if it is missing; here that is an error instead.
Source: lm-eval 0.4.13, ``lm_eval.tasks.ifeval``.
"""

from __future__ import annotations

import json

from racdeploy.errors import EnvironmentFailure
from racdeploy.plugins import require_package
from racdeploy.tasks.scoring import AnswerScore, refuse_argument

SECONDS = 10.0
MEMORY_BYTES = 4 * 2**30  # the harness imports many packages
FAILURE_IS_WRONG = True
_DATA = "tokenizers/punkt_tab"


def check(argument: str) -> None:
    """Refuse an argument, and a machine without the harness or NLTK's data."""
    refuse_argument("ifeval", argument)
    for package in ("lm_eval", "langdetect"):
        require_package(package)
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


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Check every instruction; the answer is right if all are followed strictly."""
    import langdetect
    from lm_eval.tasks.ifeval import utils

    # Without a seed, the language guessed for a short answer differs from run to run.
    langdetect.DetectorFactory.seed = 0

    instructions = json.loads(gold)
    if not isinstance(instructions, dict):
        return AnswerScore(False, None, "the gold answer lists no instructions")

    question = utils.InputExample(
        key=0,
        instruction_id_list=instructions["instruction_id_list"],
        prompt=instructions["prompt"],
        kwargs=instructions["kwargs"],
    )
    checked = utils.test_instruction_following_strict(question, answer)

    followed = checked.follow_instruction_list
    counted = f"{sum(followed)} of {len(followed)}"
    return AnswerScore(checked.follow_all_instructions, counted, "instructions followed")
