r"""MATH-500: competition problems, an expression in ``\boxed{}``, compared by Math-Verify.

The prompt is that of lighteval 0.13.0's ``aime24``, which asks for a box. lighteval's own
``math_500`` asks for "ANSWER: $ANSWER" without one, where Math-Verify finds formulas only between
dollars. The scorer is Math-Verify, the successor of lighteval's comparison. Calibration uses MATH's
training questions: MATH-500 is a part of its test questions. Source: arXiv 2305.20050; mean
thinking length: arXiv 2505.15612, table 4.
"""

from __future__ import annotations

from racdeploy.errors import UsageError
from racdeploy.tasks import HubSplit, Problem, PublicDataset, Row
from racdeploy.tasks.extraction import extract_boxed
from racdeploy.tasks.prompts import BOXED_PROMPT

DATASET = PublicDataset(
    title="MATH-500",
    evaluation=HubSplit(
        "HuggingFaceH4/MATH-500", "default", "test", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
    ),
    calibration=HubSplit(
        "DigitalLearningGmbH/MATH-lighteval",
        "default",
        "train",
        "0530c78699ea5e8eb5530600900e1f328b48acad",
    ),
    columns=("problem", "solution"),
    protocol="lighteval 0.13.0 (the prompt of aime24, Math-Verify)",
    thinking_tokens=4000,
)


def make_problem(row: Row) -> Problem:
    """Make a problem; without an answer column, the answer is the box of the solution."""
    gold = row.get("answer") or extract_boxed(row["solution"])
    if not gold:
        raise UsageError("no-final-answer", "it has no answer, and its solution has no box")

    return Problem(BOXED_PROMPT.format(problem=row["problem"]), gold=gold, scorer="math")
