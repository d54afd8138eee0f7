"""Count a letter in a list of made-up words, spelled one letter at a time."""

from __future__ import annotations

from random import Random

from racdeploy.tasks import Problem

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
WORDS_MIN, WORDS_MAX = 6, 9


def draw(random: Random) -> Problem:
    """Draw six to nine different words of two or three syllables."""
    count = random.randint(WORDS_MIN, WORDS_MAX)
    words = dict.fromkeys(_word(random) for _ in range(count))
    # All vowels are added, so that a letter may also occur zero times.
    wanted = random.choice("".join(words) + VOWELS)

    seen = 0
    steps = []
    for word in words:
        spelled = []
        for letter in word:
            seen += letter == wanted
            spelled.append(f"{letter}{seen}")

        steps.append(f"{word}: {' '.join(spelled)}.")

    return Problem(
        f"How often does the letter {wanted} occur in {', '.join(words)}?",
        gold=str(seen),
        thinking=f"Count {wanted}.\n" + "\n".join(steps),
    )


def _word(random: Random) -> str:
    """Draw a made-up word of two or three syllables."""
    word = ""
    for _ in range(random.randint(2, 3)):
        word += random.choice(CONSONANTS) + random.choice(VOWELS)
    return word
