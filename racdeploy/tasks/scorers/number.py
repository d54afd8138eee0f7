"""The last number of the answer, wherever it is."""

from __future__ import annotations

from racdeploy.tasks.extract import as_number, extract_last_number
from racdeploy.tasks.scoring import Scored


def score(answer: str, gold: str, argument: str) -> Scored:
    """Compare values: 1,234.50 is 1234.5, and 1/2 is 0.5."""
    found = extract_last_number(answer)
    if found is None:
        return Scored(False, None, "no number")
    value, wanted = as_number(found), as_number(gold)
    return Scored(value is not None and value == wanted, found, "last number")
