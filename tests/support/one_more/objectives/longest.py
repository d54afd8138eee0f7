"""Learn the longest right answer: no user wants that, but it is another objective."""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.recovery.examples import Answers, Example


def choose_examples(answers: Sequence[Answers]) -> list[Example]:
    """Return it, or what is held still."""
    return [
        Example(each.right[-1:], learns_tokens=True) if each.can_shorten else Example(each.all[:1])
        for each in answers
    ]
