"""Column multiplication of a two- or three-digit number by a two-digit number."""

from __future__ import annotations

from random import Random

from racdeploy.tasks import Problem, column_arithmetic


def draw(random: Random) -> Problem:
    """Draw one product of at most 999 * 99."""
    left, right = random.randint(11, 999), random.randint(11, 99)
    tens, ones = divmod(right, 10)
    steps = [
        f"{right} is {tens} tens and {ones} ones.",
        f"{column_arithmetic.multiply_digit(left, ones)}.",
        f"{column_arithmetic.multiply_digit(left, tens)}.",
        f"{column_arithmetic.add(left * tens * 10, left * ones)}.",
    ]

    return Problem(
        f"What is {left} times {right}?", gold=str(left * right), thinking="\n".join(steps)
    )
