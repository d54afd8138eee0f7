"""Prompts that several public datasets share, word for word those of lighteval 0.13.0."""

from __future__ import annotations

from racdeploy.errors import UsageError
from racdeploy.tasks.rows import Row
from racdeploy.tasks.task import Problem

BOXED_PROMPT = r"""
Solve the following math problem efficiently and clearly.  The last line of your response should be of the following format: 'Therefore, the final answer is: $\boxed{{ANSWER}}$. I hope it is correct' (without quotes) where ANSWER is just the final number or expression that solves the problem. Think step by step before answering.

{problem}
"""  # noqa: E501 - as it is published
_CHOICE = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. "
    "Think step by step before answering.\n\n{question}"
)


def make_choice_problem(question: str, letters: str, gold: str) -> Problem:
    """Make a problem that asks for one of the letters; ``question`` contains the options."""
    text = _CHOICE.format(letters=letters, question=question)
    return Problem(text, gold=gold, scorer="choice")


def make_contest_problem(row: Row) -> Problem:
    """Make a problem of AIME; its answer is a whole number from 0 to 999, without leading zeros."""
    answer = row["answer"]
    text = str(answer).strip()
    if not text.isdecimal() or int(text) > 999:
        raise UsageError(
            "answer-out-of-range", f"the answer {answer!r} is not a whole number from 0 to 999"
        )
    return Problem(BOXED_PROMPT.format(problem=row["problem"]), gold=str(int(text)))
