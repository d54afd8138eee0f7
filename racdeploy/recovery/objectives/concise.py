"""Learn the distribution of the dense model that is told to be brief; no scorer is needed.

Source: CRISP, reverse KL on own answers (arXiv 2603.05433).
"""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.recovery.examples import Answers, Example


def choose_examples(answers: Sequence[Answers]) -> list[Example]:
    """Return an answer to each prompt, with the brief prompt for the dense model."""
    return [Example(each.all[:1], teacher_prompt_ids=each.brief_prompt_ids) for each in answers]
