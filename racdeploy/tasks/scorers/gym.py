"""Scorer of a generator of reasoning-gym, as ``gym:gsm_symbolic@3000000000+17``.

The numbers are seed and index of the item, which is made again: many scorers need more of it than
its answer. Right is a score of 1; some give a little for any number. What a scorer fails on is
wrong: a few evaluate the answer, and all run in a process that starts no program and writes no
file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from racdeploy.errors import UsageError
from racdeploy.extras import installed_version
from racdeploy.plugins import require_package
from racdeploy.tasks.extraction import extract_boxed
from racdeploy.tasks.generators import GeneratorSpec, make_item, open_dataset
from racdeploy.tasks.scoring import AnswerScore

SECONDS = 30.0  # a few generators search for seconds until an item has one solution
MEMORY_BYTES = 4 * 2**30  # sympy, and tables of puzzles
FAILURE_IS_WRONG = True
_OPEN, _CLOSE = "<answer>", "</answer>"
_LEAD = re.compile(r"(?:.*\banswer\b(?:\s+is)?\s*:?|.*:)\s*", re.IGNORECASE)
_DECORATION = "*`$ "


def check(argument: str) -> None:
    """Refuse what names no item, and a machine without reasoning-gym."""
    require_package("reasoning_gym")
    _make_item(argument)


def prepare() -> None:
    """Import reasoning-gym with all generators."""
    require_package("reasoning_gym")
    import reasoning_gym  # noqa: F401


def score(answer: str, gold: str, argument: str) -> AnswerScore:
    """Score the answer by the item's own generator."""
    spec, seed, item = _make_item(argument)
    if (item["answer"] or "") != gold:
        raise UsageError(
            "generator-changed",
            f"reasoning-gym {installed_version('reasoning-gym')} makes another item of "
            f"{argument:.200}",
            remedy="install the version that the answers were made with",
        )

    extracted, how = extract_answer(answer)
    points = open_dataset(spec, seed).score_answer(extracted, item)
    return AnswerScore(points == 1, extracted, how)


def extract_answer(answer: str) -> tuple[str, str]:
    """Return the final answer in a text, and where it was found."""
    before, close, _ = answer.rpartition(_CLOSE)
    _, open_tag, tagged = before.rpartition(_OPEN)
    if close and open_tag:
        return tagged.strip(), f"between {_OPEN} and {_CLOSE}"
    if (boxed := extract_boxed(answer)) is not None:
        return boxed, "boxed"

    lines = answer.strip().splitlines() or [""]
    last = lines[-1].strip(_DECORATION)
    if lead := _LEAD.match(last):
        last = last[lead.end() :]
    return last.strip(_DECORATION).removesuffix("."), "last line"


def _make_item(argument: str) -> tuple[GeneratorSpec, int, Mapping[str, Any]]:
    """Return specification, seed and item of a scorer's argument."""
    name, _, number = argument.rpartition("@")
    seed, _, index = number.partition("+")
    if not (name and seed.isdecimal() and index.isdecimal()):
        raise UsageError(
            "generator-item",
            f"scorer gym: {argument!r:.200} is no item of a generator",
            remedy="write gym:NAME@SEED+INDEX",
        )
    spec = GeneratorSpec.parse(name)
    return spec, int(seed), make_item(spec, int(seed), int(index))
