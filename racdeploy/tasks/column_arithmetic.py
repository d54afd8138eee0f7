"""Column arithmetic spelled out digit by digit, least significant digit first.

The procedural tasks share these lines, so that a small model learns one skill once.
"""

from __future__ import annotations

import itertools


def add(left: int, right: int) -> str:
    """Spell out ``left + right``: ``45+38:5+8+0=13,4+3+1=8,83``."""
    steps = []
    carry = 0
    for a, b in _columns(left, right):
        total = a + b + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        carry = total // 10
    return _join(f"{left}+{right}", steps, left + right)


def subtract(left: int, right: int) -> str:
    """Spell out ``left - right`` for ``left >= right``: ``83-17:13-7-0=6,8-1-1=6,66``."""
    assert left >= right, "column subtraction needs a non-negative result"

    steps = []
    borrow = 0
    for a, b in _columns(left, right):
        lent = 10 if a < b + borrow else 0
        rest = a + lent - b - borrow
        steps.append(f"{a + lent}-{b}-{borrow}={rest}")
        borrow = lent // 10

    return _join(f"{left}-{right}", steps, left - right)


def multiply_digit(left: int, digit: int) -> str:
    """Spell out ``left * digit`` for one digit: ``47*6:7*6+0=42,4*6+4=28,282``."""
    steps = []
    carry = 0
    for a, _ in _columns(left):
        total = a * digit + carry
        steps.append(f"{a}*{digit}+{carry}={total}")
        carry = total // 10
    return _join(f"{left}*{digit}", steps, left * digit)


def divide_digit(left: int, digit: int) -> str:
    """Spell out ``left / digit`` for one digit: ``77/2:7/2=3r1,17/2=8r1,38r1``."""
    steps = []
    rest = 0
    for figure in str(left):
        value = rest * 10 + int(figure)
        quotient, rest = divmod(value, digit)
        steps.append(f"{value}/{digit}={quotient}r{rest}")
    return _join(f"{left}/{digit}", steps, f"{left // digit}r{rest}")


def _join(expression: str, steps: list[str], result: object) -> str:
    return f"{expression}:{','.join(steps)},{result}"


def _columns(left: int, right: int = 0) -> list[tuple[int, int]]:
    """Return the digits of both numbers in pairs, least significant first, padded with zeros."""
    backwards = (str(left)[::-1], str(right)[::-1])
    pairs = itertools.zip_longest(*backwards, fillvalue="0")
    return [(int(a), int(b)) for a, b in pairs]
