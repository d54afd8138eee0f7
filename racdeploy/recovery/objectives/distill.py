"""Learn the dense model's distribution at every token of an answer."""

from __future__ import annotations

from racdeploy.recovery import Objective
from racdeploy.recovery.examples import Answers, Example


def _choose(answers: Answers) -> list[Example]:
    """Return every answer."""
    return [Example((trace,)) for trace in answers.all]


OBJECTIVE = Objective(
    choose=_choose,
    purpose="recover",
    held_out_figure="KL on held-out traces",
    learning_rate_scale=1.6,
)
