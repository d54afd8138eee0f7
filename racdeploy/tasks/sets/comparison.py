"""Find the largest or smallest of several numbers by a chain of comparisons."""

from __future__ import annotations

from random import Random

from racdeploy.tasks import Problem

NUMBERS_MIN, NUMBERS_MAX = 6, 9


def draw(random: Random) -> Problem:
    """Draw six to nine three-digit numbers, some of which share leading digits."""
    count = random.randint(NUMBERS_MIN, NUMBERS_MAX)
    # Three leading digits for more numbers: some share one, so their later digits decide.
    leading = random.sample(range(1, 10), 3)

    numbers: list[int] = []
    while len(numbers) < count:
        number = random.choice(leading) * 100 + random.randint(0, 99)
        if number not in numbers:
            numbers.append(number)

    largest = random.random() < 0.5
    best = numbers[0]
    steps = [f"Start with {best}."]
    for number in numbers[1:]:
        best, line = _compare(number, best, largest)
        steps.append(line)

    word = "largest" if largest else "smallest"
    return Problem(
        f"Which number is the {word} of {', '.join(map(str, numbers))}?",
        gold=str(best),
        thinking="\n".join(steps),
    )


def _compare(number: int, best: int, largest: bool) -> tuple[int, str]:
    """Return the better number and a line that compares both digit by digit."""
    relations = []
    for a, b in zip(str(number), str(best), strict=True):
        if a != b:
            relations.append(f"{a}>{b}" if a > b else f"{a}<{b}")
            break

        relations.append(f"{a}={b}")

    better = max(number, best) if largest else min(number, best)
    return better, f"{number} and {best}:{','.join(relations)}, keep {better}."
