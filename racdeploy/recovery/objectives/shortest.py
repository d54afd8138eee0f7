"""Learn the shortest right answer of several to a prompt; hold the other prompts still.

Source: best-of-N self-training, Munkhbat et al. 2025 (arXiv 2502.20122).
"""

from __future__ import annotations

from racdeploy.recovery import Objective
from racdeploy.recovery.examples import Answers, Example


def _choose(answers: Answers) -> list[Example]:
    """Return the shortest right answer, or an answer to distill where a prompt is too hard."""
    if answers.can_shorten:
        return [Example(answers.right[:1], learns_tokens=True)]
    return [Example(answers.all[:1])]


OBJECTIVE = Objective(choose=_choose, min_samples=2)
