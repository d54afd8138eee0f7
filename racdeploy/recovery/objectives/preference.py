"""Prefer the shortest right answer to the longest one; hold the prompts that are too hard still.

Source: LCPO, Hong et al. 2025 (arXiv 2508.10164), the odds of the mean token probabilities.
"""

from __future__ import annotations

from racdeploy.recovery import Objective
from racdeploy.recovery.examples import Answers, Example


def _choose(answers: Answers) -> list[Example]:
    """Return the shortest and the longest right answer, or an answer to distill."""
    if answers.can_shorten:
        return [Example((answers.right[0], answers.right[-1]))]
    return [Example(answers.all[:1])]


OBJECTIVE = Objective(choose=_choose, min_samples=2)
