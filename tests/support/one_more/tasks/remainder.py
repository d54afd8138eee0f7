"""Remainder of a division by repeated subtraction."""

from __future__ import annotations

from random import Random

from racdeploy.tasks import Problem


def draw(random: Random) -> Problem:
    """Draw a division in at most nine steps."""
    divisor = random.randint(11, 99)
    left = random.randint(divisor, 9 * divisor)
    question = f"What is the remainder of {left} divided by {divisor}?"

    steps = [str(left)]
    while left >= divisor:
        left -= divisor
        steps.append(f"minus {divisor} is {left}")
    return Problem(question=question, gold=str(left), thinking="\n".join(steps))
