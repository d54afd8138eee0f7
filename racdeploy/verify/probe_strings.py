"""Strings on which tokenizers disagree: the probe of token parity.

A pre-tokenizer is proven by equal ids on these. All are in NFC, because llama.cpp has no Unicode
normalizer and a tokenizer with one would differ on the rest for that reason alone. The list is the
same everywhere.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Iterator
from importlib.resources import files
from random import Random

_PARTS: dict[str, list[str]] = json.loads(
    (files("racdeploy.verify") / "probe_strings.json").read_text(encoding="utf-8")
)
_TAGS = _PARTS["tags"]


def probe_strings() -> list[str]:
    """Return a few hundred different hard strings, always the same ones."""
    strings = dict.fromkeys(unicodedata.normalize("NFC", text) for text in _strings())
    return list(strings)


def _strings() -> Iterator[str]:
    yield from _PARTS["lines"]
    yield from _TAGS
    yield from _PARTS["emoji"] + _PARTS["marks"] + _PARTS["words"]

    for count in (1, 2, 3, 4, 5, 7, 10, 31):
        yield "1234567890"[:count] * (1 if count <= 10 else 4)
        yield f"a{'7' * count}b {'9' * count}.{'0' * count}"
        yield " " * count + "x"
        yield "x" + " " * count
        yield "\n" * count + " x\t" * count

    yield from ("١٢٣٤٥", "१२३४५६", "１２３４", "Ⅳ𝟜𝟝", "৪৫ ৬")
    yield from _contractions()

    for left, right in itertools.pairwise(_PARTS["spaces"]):
        yield f"word{left}{right}word{right}{left}"
        yield f"{left}{right}"

    yield from (
        "a" * 300,
        "Supercalifragilistic" * 20,
        "東" * 100,
        "-" * 200,
        "👍" * 40,
        "ab1" * 100,
    )

    for tag in _TAGS:
        yield f"text{tag}text {tag} {tag}\n{tag}{tag}"

    yield from _mixtures()


def _contractions() -> Iterator[str]:
    for ending in _PARTS["contractions"]:
        yield f"I{ending} you{ending.upper()} We{ending.title()} 5{ending} {ending}x ’{ending[1:]}"
    yield "'ſ 'S'T'RE'vE'Ll it''s o'clock rock'n'roll dogs' 'tis 'D'd"


def _mixtures() -> Iterator[str]:
    """Yield random sequences of everything above."""
    random = Random("racdeploy probe")
    pieces = []
    for name in ("words", "contractions", "spaces", "emoji", "marks"):
        pieces += _PARTS[name]
    pieces += [*_TAGS[:2], "12", "345", "6789", ".", ",", "(", "—"]

    for _ in range(200):
        count = random.randint(2, 12)
        yield "".join(random.choice(pieces) for _ in range(count))
