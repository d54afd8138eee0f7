"""Generators of reasoning-gym, as ``gym:gsm_symbolic``: over a hundred kinds of problems.

Problem ``index`` of a split and seed is a numbered item of reasoning-gym, so that anybody can make
it again. A scorer of the generator judges the answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from racdeploy.extras import installed_version
from racdeploy.tasks.generators import CHUNK_ITEMS, GeneratorSpec, make_item
from racdeploy.tasks.task import Generator, Problem, Split

_SPLIT_SEEDS: dict[Split, int] = {
    "training": 1_000_000_000,
    "calibration": 2_000_000_000,
    "evaluation": 3_000_000_000,
}
_MAX_SEED = 900_000_000  # then no two splits are nearer than 10⁸ seeds, whatever the recipe says
_INSTRUCTION = "\n\nWrite the final answer alone between <answer> and </answer>."


def open_generator(argument: str) -> Generator:
    """Return the generator of a specification; its first problem shows whether it can work.

    Raises:
        UsageError: a parameter has no value.
    """
    spec = GeneratorSpec.parse(argument)

    def draw(split: Split, seed: int) -> Iterator[Problem]:
        first = _SPLIT_SEEDS[split] + seed % _MAX_SEED
        for number in count():
            chunk, index = divmod(number, CHUNK_ITEMS)
            yield _make_problem(spec, first + chunk * CHUNK_ITEMS, index)

    release = installed_version("reasoning-gym")
    return Generator(draw, f"reasoning-gym {release}", f"gym:{spec}/{release}")


def _make_problem(spec: GeneratorSpec, seed: int, index: int) -> Problem:
    """Return a numbered item as a problem; some generators know no gold answer, only a scorer."""
    item = make_item(spec, seed, index)
    return Problem(
        item["question"] + _INSTRUCTION,
        gold=item["answer"] or "",
        thinking=item["metadata"].get("answer_cot"),
        scorer=f"gym:{spec}@{seed}+{index}",
    )
