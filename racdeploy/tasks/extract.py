"""Find an answer in the text after the thinking, and compare it with the gold answer."""

from __future__ import annotations

import re
from decimal import Decimal

_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_DECORATION = re.compile(
    r"^\s*[a-zA-Z][a-zA-Z+\- ]*=\s*|\\text\{[^{}]*\}|\s+[a-zA-Z][a-zA-Z ]*\.?$"
)
_BRACES = re.compile(r"\\boxed\{|[{}]")
_SEPARATORS = re.compile(r"\{,\}|\\[,!;: ]")
"""What LaTeX has between thousands, and before units."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def extract_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}``, braces balanced, or None."""
    last = (0, 0)
    opened: list[int] = []  # where the content of each open brace begins, 0 of one that is no box

    for found in _BRACES.finditer(text):
        if found[0] != "}":
            opened.append(found.end() if found[0] != "{" else 0)
        elif opened:
            last = max(last, (opened.pop(), found.start()))

    start, stop = last
    return text[start:stop].strip() if start else None


def extract_hash_mark(text: str) -> str | None:
    """Return what follows the last ``####``, as GSM8K writes its answers, or None."""
    _, mark, tail = text.rpartition("####")
    lines = tail.strip().splitlines()
    return lines[0].strip() if mark and lines else None


def extract_last_number(text: str) -> str | None:
    """Return the last number written in digits, or None."""
    numbers = _NUMBER.findall(text)
    return str(numbers[-1]) if numbers else None


def equal_answers(answer: str, gold: str) -> bool:
    """Compare as numbers where both are numbers, otherwise as text without case or spaces."""
    left, right = as_number(answer), as_number(gold)
    if left is not None and right is not None:
        return left == right
    return _normalize(answer) == _normalize(gold)


def _normalize(text: str) -> str:
    without_spaces = re.sub(r"\s+", "", text)
    return without_spaces.strip("$.").casefold()


def as_number(text: str) -> Decimal | None:
    """Return the value of a number, fraction, amount or percentage, or None."""
    bare = _FRACTION.sub(r"\1/\2", text)
    bare = _SEPARATORS.sub("", bare)
    bare = bare.replace(r"\$", "").replace(r"\%", "")
    bare = _DECORATION.sub("", bare).strip("$.%€£ ")
    bare = bare.replace(",", "").replace("$", "")

    numerator, slash, denominator = bare.partition("/")

    try:
        value = Decimal(numerator)
        if slash:
            value /= Decimal(denominator)
    except ArithmeticError:
        return None

    return value if value.is_finite() else None
