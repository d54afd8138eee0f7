"""Write a decimal number in base 2 to 5 by repeated division, keeping the digits found so far."""

from __future__ import annotations

from random import Random

from racdeploy.tasks import Problem, column_arithmetic

LARGEST = {2: 127, 3: 400, 4: 999, 5: 999}


def draw(random: Random) -> Problem:
    """Draw a number with four to seven digits in its new base."""
    base = random.choice(tuple(LARGEST))
    number = random.randint(LARGEST[base] // 5, LARGEST[base])
    steps, digits, rest = [], "", number
    while rest:
        digits = f"{rest % base}{digits}"
        steps.append(f"{column_arithmetic.divide_digit(rest, base)}. Digits {digits}.")
        rest //= base

    question = f"Write the decimal number {number} in base {base}."
    return Problem(question, gold=digits, thinking="\n".join(steps))
