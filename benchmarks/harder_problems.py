"""Write problems longer than any that the SmolLM2 reasoner was taught, for ``--tasks jsonl:FILE``.

    python -m benchmarks.harder_problems build/harder.jsonl

A third each: word problems with five or six steps in place of three or four, divisors that take
ten to fourteen subtractions in place of four to nine, the largest of ten to twelve numbers in
place of six to nine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from racdeploy.tasks.sets import comparison, gcd, word_problem

PROBLEMS = 750  # about half of a file may be calibrated on, and is not asked


def main() -> None:
    """Draw the problems with the generators of the tasks."""
    word_problem.STEPS_MIN, word_problem.STEPS_MAX = 5, 6
    gcd.STEPS_MIN, gcd.STEPS_MAX = 10, 14
    comparison.NUMBERS_MIN, comparison.NUMBERS_MAX = 10, 12

    random = Random(0)
    lines: dict[str, str] = {}
    while len(lines) < PROBLEMS:
        draw = (word_problem, gcd, comparison)[len(lines) % 3].draw
        problem = draw(random)
        lines[problem.question] = json.dumps({"question": problem.question, "answer": problem.gold})

    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines.values()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
