"""Word problems with three or four additions and subtractions, solved in columns."""

from __future__ import annotations

from random import Random

from racdeploy.tasks import Problem, column_arithmetic

NAMES = ("Ann", "Ben", "Eva", "Tom", "Mia", "Leo", "Zoe", "Sam")
THINGS = ("apples", "books", "coins", "shells", "cards", "stamps", "pens", "nuts")
GAINS = ("buys {n} more", "finds {n} more", "gets {n} as a gift", "makes {n} more")
LOSSES = ("gives away {n}", "loses {n}", "sells {n}", "puts {n} in a box")
STEPS_MIN, STEPS_MAX = 3, 4


def draw(random: Random) -> Problem:
    """Draw one problem; amounts stay between 0 and 299."""
    name, thing = random.choice(NAMES), random.choice(THINGS)
    amount = random.randint(20, 150)
    sentences = [f"{name} has {amount} {thing}."]
    steps = [f"Start with {amount}."]

    for _ in range(random.randint(STEPS_MIN, STEPS_MAX)):
        change = random.randint(2, 99)
        # An amount never becomes negative: one that is too small can only grow.
        gains = amount < change or (amount + change < 300 and random.random() < 0.5)
        phrase = random.choice(GAINS if gains else LOSSES).format(n=change)
        sentences.append(f"{name} {phrase}.")

        if gains:
            spelled = column_arithmetic.add(amount, change)
            amount += change
        else:
            spelled = column_arithmetic.subtract(amount, change)
            amount -= change

        steps.append(f"{name} {phrase}:{spelled}.")

    sentences.append(f"How many {thing} does {name} have now?")
    return Problem(" ".join(sentences), gold=str(amount), thinking="\n".join(steps))
