r"""The content of the last complete ``\boxed{...}``, compared as a number or as text."""

from __future__ import annotations

from racdeploy.tasks.extract import equal_answers, extract_boxed
from racdeploy.tasks.scoring import Scored


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare the last box with the gold answer."""
    found = extract_boxed(answer)
    if found is None:
        return Scored(False, None, "no complete box")
    return Scored(equal_answers(found, gold), found, "boxed")
