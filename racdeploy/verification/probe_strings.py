"""Strings on which tokenizers disagree, in NFC because llama.cpp has no Unicode normalizer.

Some are chosen, the others reproducible lines of scripts, digits, emoji, LaTeX, code and tags.
"""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

_MIXED_LINES = 10_000


@cache
def make_mixed_lines(count: int) -> tuple[str, ...]:
    """Return ``count`` different lines, in NFC because llama.cpp does not normalize Unicode."""
    parts: dict[str, list[str]] = _read("mixed_text.json")
    random = Random("mixed text")
    lines: dict[str, None] = {}

    while len(lines) < count:
        text = "".join(_piece(random, parts) for _ in range(random.randint(1, 24)))
        lines[unicodedata.normalize("NFC", text)] = None

    return tuple(lines)


def _piece(random: Random, parts: dict[str, list[str]]) -> str:
    """Draw a word, number, run of spaces, sign or punctuation mark."""
    kind = random.randrange(10)
    if kind < 2:
        first, last = map(ord, random.choice(parts["scripts"]))
        letters = (chr(random.randint(first, last)) for _ in range(random.randint(1, 9)))
        return "".join(letter for letter in letters if unicodedata.category(letter)[0] == "L")
    if kind == 2:
        digits = random.choice(parts["digits"])
        return "".join(random.choice(digits) for _ in range(random.randint(1, 8)))
    if kind == 3:
        return random.choice(parts["spaces"]) * random.choice((1, 1, 1, 2, 5))

    name = {4: "signs", 5: "marks", 6: "words", 7: "words"}.get(kind, "blank")
    return random.choice(parts[name])


def read_probe_strings() -> list[str]:
    """Read a few hundred different strings that are hard to tokenize."""
    strings: list[str] = _read("probe_strings.json")
    return strings


def _read(name: str) -> Any:
    return json.loads((files("racdeploy.verification") / name).read_text(encoding="utf-8"))


def choose_probe_strings(accepted: float) -> list[str]:
    """Return the strings on which token ids are compared.

    Args:
        accepted: share of the strings that may differ. If it is above 0, 10,000 lines of mixed text
            are added: of a few hundred strings, one alone would exceed the usual share.
    """
    lines = make_mixed_lines(_MIXED_LINES) if accepted else ()
    return [*read_probe_strings(), *lines]
