"""Greatest common divisor of two numbers below 100 by Euclid's repeated subtraction."""

from __future__ import annotations

from random import Random

from racdeploy.tasks import Problem, column_arithmetic

STEPS_MIN, STEPS_MAX = 4, 9


def draw(random: Random) -> Problem:
    """Draw a pair that Euclid's subtraction solves in four to nine steps."""
    while True:
        divisor = random.randint(1, 16)
        limit = 99 // divisor
        left = divisor * random.randint(1, limit)
        right = divisor * random.randint(1, limit)
        steps, gold = _euclid(left, right)

        if STEPS_MIN <= len(steps) - 1 <= STEPS_MAX:
            question = f"What is the greatest common divisor of {left} and {right}?"
            return Problem(question, gold=str(gold), thinking="\n".join(steps))


def _euclid(left: int, right: int) -> tuple[list[str], int]:
    """Return the steps in words, the last of which is the equal pair, and the divisor."""
    steps = []
    high, low = max(left, right), min(left, right)

    while high != low:
        steps.append(f"{column_arithmetic.subtract(high, low)}.")
        difference = high - low
        high, low = max(difference, low), min(difference, low)

    steps.append(f"{high} and {low} are equal.")
    return steps, high
