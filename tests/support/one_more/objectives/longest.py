"""Learn the longest right answer: no user wants that, but it is another objective."""

from __future__ import annotations

from racdeploy.recovery import Objective
from racdeploy.recovery.examples import Answers, Example


def _choose(answers: Answers) -> list[Example]:
    """Return it, or what is held still."""
    if answers.can_shorten:
        return [Example(answers.right[-1:], learns_tokens=True)]
    return [Example(answers.all[:1])]


OBJECTIVE = Objective(choose=_choose, min_samples=2)
