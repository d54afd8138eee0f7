"""Learn the distribution of the dense model that is told to be brief; no scorer is needed.

Source: CRISP, reverse KL on own answers (arXiv 2603.05433).
"""

from __future__ import annotations

from racdeploy.recovery import Objective
from racdeploy.recovery.examples import Answers, Example


def _choose(answers: Answers) -> list[Example]:
    """Return an answer, with the brief prompt for the dense model."""
    return [Example(answers.all[:1], teacher_prompt_ids=answers.brief_prompt_ids)]


OBJECTIVE = Objective(choose=_choose, needs_brief_prompts=True)
