"""MMLU-Pro: questions of 14 fields with up to ten options; the answer is a letter.

The prompt is lighteval 0.13.0's ``mmlu_pro``, except for the allowed letters: lighteval writes ABCD
for every question, here they are those of its options. Calibration uses the 70 questions of the
validation split. Source: arXiv 2406.01574.
"""

from __future__ import annotations

from string import ascii_uppercase

from racdeploy.errors import UsageError
from racdeploy.tasks import HubSplit, Problem, PublicDataset, Row
from racdeploy.tasks.prompts import make_choice_problem

_REVISION = "3373e0b32277875b8db2aa555a333b78a08477ea"
DATASET = PublicDataset(
    title="MMLU-Pro",
    evaluation=HubSplit("TIGER-Lab/MMLU-Pro", "default", "test", _REVISION),
    calibration=HubSplit("TIGER-Lab/MMLU-Pro", "default", "validation", _REVISION),
    columns=("question", "options", "answer"),
    protocol="lighteval 0.13.0 (mmlu_pro)",
)


def make_problem(row: Row) -> Problem:
    """Make a problem with its options in their published order."""
    options, answer = row["options"], row["answer"]
    if not isinstance(options, list):
        raise UsageError(
            "options-not-a-list",
            f"its options are not a list but {options!r}; CSV has no lists: give parquet",
        )

    letters = ascii_uppercase[: len(options)]
    if answer not in [*letters]:
        raise UsageError("answer-not-an-option", f"the answer {answer!r} is none of {letters}")

    listed = "\n".join(
        f"{letter}: {option}" for letter, option in zip(letters, options, strict=True)
    )
    return make_choice_problem(f"{row['question']}\n\n{listed}\n\nAnswer:", letters, answer)
