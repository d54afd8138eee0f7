"""Learn the dense model's distribution at every token of an answer."""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.recovery.examples import Answers, Example


def choose_examples(answers: Sequence[Answers]) -> list[Example]:
    """Return every answer."""
    return [Example((trace,)) for each in answers for trace in each.all]
