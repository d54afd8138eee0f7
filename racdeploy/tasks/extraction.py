"""Extract an answer from the text after the thinking, and compare it with the gold answer."""

from __future__ import annotations

import re
from decimal import Decimal

_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_DECORATION = re.compile(r"^\s*[a-zA-Z][a-zA-Z+\- ]*=\s*|\\text\{[^{}]*\}")
_REVERSED_UNIT = re.compile(r"\n?\.?[a-zA-Z ]*[a-zA-Z]\s+")
"""Words at the end, read from there: from the front, each space of a long text would be tried."""
_BRACES = re.compile(r"\\boxed\{|[{}]")
_SEPARATORS = re.compile(r"\{,\}|\\[,!;: ]")
"""Separators of LaTeX between thousands and before units."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}``, with balanced braces, or None."""
    last = (0, 0)
    starts = []  # of the content of each open box; 0 for any other open brace

    # A regular expression cannot balance braces, so they are matched on a stack.
    for brace in _BRACES.finditer(text):
        if brace[0] != "}":
            starts.append(brace.end() if brace[0] != "{" else 0)
        elif starts:
            last = max(last, (starts.pop(), brace.start()))

    start, stop = last
    return text[start:stop].strip() if start else None


def extract_hash_mark(text: str) -> str | None:
    """Return the line after the last ``####``, which marks the answer in GSM8K, or None."""
    _, mark, tail = text.rpartition("####")
    lines = tail.strip().splitlines()
    return lines[0].strip() if mark and lines else None


def extract_last_number(text: str) -> str | None:
    """Return the last number written in digits, or None."""
    numbers = _NUMBER.findall(text)
    return str(numbers[-1]) if numbers else None


def is_same_answer(answer: str, gold: str) -> bool:
    """Compare as numbers if both are numbers, else as text without case or spaces."""
    left, right = parse_number(answer), parse_number(gold)
    if left is not None and right is not None:
        return left == right
    return _normalize(answer) == _normalize(gold)


def _normalize(text: str) -> str:
    without_spaces = re.sub(r"\s+", "", text)
    return without_spaces.strip("$.").casefold()


def parse_number(text: str) -> Decimal | None:
    """Return the value of a number, fraction, amount or percentage, or None."""
    bare = _FRACTION.sub(r"\1/\2", text)
    bare = _SEPARATORS.sub("", bare)
    bare = bare.replace(r"\$", "").replace(r"\%", "")
    bare = _DECORATION.sub("", bare)
    if unit := _REVERSED_UNIT.match(bare[::-1]):
        bare = bare[: -unit.end()]
    bare = bare.strip("$.%€£ ")
    bare = bare.replace(",", "").replace("$", "")

    # Decimal is exact: 0.1 equals 1/10, and no float rounding decides on an answer.
    numerator, slash, denominator = bare.partition("/")
    try:
        value = Decimal(numerator)
        if slash:
            value /= Decimal(denominator)
    except ArithmeticError:
        return None

    return value if value.is_finite() else None
