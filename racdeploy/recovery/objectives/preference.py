"""Prefer the shortest right answer to the longest one; hold the prompts that are too hard still.

Source: LCPO, Hong et al. 2025 (arXiv 2508.10164), the odds of the mean token probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.recovery.examples import Answers, Example


def choose_examples(answers: Sequence[Answers]) -> list[Example]:
    """Return the shortest and the longest right answer, or an answer to distill."""
    return [
        Example((each.right[0], each.right[-1])) if each.can_shorten else Example(each.all[:1])
        for each in answers
    ]
