"""Learn the shortest right answer of several to a prompt; hold the other prompts still.

Source: best-of-N self-training, Munkhbat et al. 2025 (arXiv 2502.20122).
"""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.recovery.examples import Answers, Example


def choose_examples(answers: Sequence[Answers]) -> list[Example]:
    """Return the shortest right answer, or an answer to distill where a prompt is too hard."""
    return [
        Example(each.right[:1], learns_tokens=True) if each.can_shorten else Example(each.all[:1])
        for each in answers
    ]
