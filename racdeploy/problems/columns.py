"""Column arithmetic spelled out digit by digit, least significant digit first.

The procedural tasks share these lines, so that a small model learns one skill once. Every step is a
lookup over single digits and a carry.
"""

from __future__ import annotations


def _digits(number: int, width: int) -> list[int]:
    """Return ``width`` decimal digits of ``number``, least significant first."""
    return [number // 10**place % 10 for place in range(width)]


def add(left: int, right: int) -> str:
    """Spell out ``left + right``: ``45+38:5+8+0=13,4+3+1=8,83``."""
    width = max(len(str(left)), len(str(right)))
    steps, carry = [], 0
    for a, b in zip(_digits(left, width), _digits(right, width), strict=True):
        total = a + b + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        carry = total // 10
    return f"{left}+{right}:{','.join(steps)},{left + right}"


def subtract(left: int, right: int) -> str:
    """Spell out ``left - right`` for ``left >= right``: ``83-17:13-7-0=6,8-1-1=6,66``."""
    assert left >= right, "column subtraction needs a non-negative result"
    steps, borrow = [], 0
    for a, b in zip(_digits(left, len(str(left))), _digits(right, len(str(left))), strict=True):
        lent = 10 if a < b + borrow else 0
        steps.append(f"{a + lent}-{b}-{borrow}={a + lent - b - borrow}")
        borrow = lent // 10
    return f"{left}-{right}:{','.join(steps)},{left - right}"


def times_digit(left: int, digit: int) -> str:
    """Spell out ``left * digit`` for one digit: ``47*6:7*6+0=42,4*6+4=28,282``."""
    steps, carry = [], 0
    for a in _digits(left, len(str(left))):
        total = a * digit + carry
        steps.append(f"{a}*{digit}+{carry}={total}")
        carry = total // 10
    return f"{left}*{digit}:{','.join(steps)},{left * digit}"


def divide_digit(left: int, digit: int) -> str:
    """Spell out ``left`` divided by one digit: ``77/2:7/2=3r1,17/2=8r1,38r1``."""
    steps, remainder = [], 0
    for a in reversed(_digits(left, len(str(left)))):
        value = remainder * 10 + a
        steps.append(f"{value}/{digit}={value // digit}r{value % digit}")
        remainder = value % digit
    return f"{left}/{digit}:{','.join(steps)},{left // digit}r{remainder}"
