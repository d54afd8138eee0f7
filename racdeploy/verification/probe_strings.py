"""Strings on which tokenizers disagree, in NFC because llama.cpp has no Unicode normalizer.

Some are chosen, the others reproducible lines of scripts, digits, emoji, LaTeX, code and tags.
"""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from importlib.resources import files
from random import Random

_SCRIPTS = (
    (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x531, 0x556),
    (0x5D0, 0x5EA), (0x621, 0x64A), (0x905, 0x939), (0x985, 0x9B9),
    (0xE01, 0xE30), (0x10D0, 0x10F0),
    (0x1E00, 0x1EFF), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),
)  # fmt: skip
_DIGITS = ("0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９")
# Separated by "·", as some contain spaces.
_SIGNS = (
    "🚀·😀·👍🏽·👨‍👩‍👧·🇫🇷·✅·❤️·🏳️‍🌈·🦙"
    r"·\frac·\boxed·\sqrt·^{2}·_i·{·}·$·\\·\left(·\right)·≤·∑·→·α"
    """·def ·return·==·!=·->·();·[0]· += ·//·#·"·'·`·<b>·</b>·&&·::"""
    "·<think>·</think>·<|im_start|>·<|im_end|>·[INST]·</s>·<answer>"
)
_SPACES = " · · ·  ·    ·\t·\u00a0·\u3000· \t·        ·\r\n·\n·\n\n"
_MARKS = ".·,·!·?·…·—·-·:·;·(·)·'s·'ll·’t·“·”·。·、·…·/"
_WORDS = "the·The·answer·is·Wait·so·we·compute·step·hence·therefore·x·HTTP·iPhone"


@cache
def make_mixed_lines(count: int) -> tuple[str, ...]:
    """Return ``count`` different lines, in NFC because llama.cpp does not normalize Unicode."""
    random = Random("mixed text")
    lines: dict[str, None] = {}

    while len(lines) < count:
        text = "".join(_piece(random) for _ in range(random.randint(1, 24)))
        lines[unicodedata.normalize("NFC", text)] = None

    return tuple(lines)


def _piece(random: Random) -> str:
    """Draw a word, number, run of spaces, sign or punctuation mark."""
    kind = random.randrange(10)
    if kind < 2:
        first, last = random.choice(_SCRIPTS)
        letters = (chr(random.randint(first, last)) for _ in range(random.randint(1, 9)))
        return "".join(letter for letter in letters if unicodedata.category(letter)[0] == "L")
    if kind == 2:
        digits = random.choice(_DIGITS)
        return "".join(random.choice(digits) for _ in range(random.randint(1, 8)))
    if kind == 3:
        return random.choice(_SPACES.split("·")) * random.choice((1, 1, 1, 2, 5))

    chosen = {4: _SIGNS, 5: _MARKS, 6: _WORDS, 7: _WORDS}.get(kind, " ")
    return random.choice(chosen.split("·"))


_MIXED_LINES = 10_000


def read_probe_strings() -> list[str]:
    """Read a few hundred different strings that are hard to tokenize."""
    file = files("racdeploy.verification") / "probe_strings.json"
    strings: list[str] = json.loads(file.read_text(encoding="utf-8"))
    return strings


def choose_probe_strings(accepted: float) -> list[str]:
    """Return the strings on which token ids are compared.

    Args:
        accepted: share of the strings that may differ. If it is above 0, 10,000 lines of mixed text
            are added: of a few hundred strings, one alone would exceed the usual share.
    """
    lines = make_mixed_lines(_MIXED_LINES) if accepted else ()
    return [*read_probe_strings(), *lines]
