"""Loops, against a slow search over every start and period."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from racdeploy.runtime.loops import Loop, find_loop


def oracle(ids: list[int]) -> Loop | None:
    """Extend every n-gram at every place as far as it repeats."""
    found = []
    for period in range(1, len(ids) // 4 + 1):
        for start in range(len(ids) - period):
            stop = start + period
            while stop < len(ids) and ids[stop] == ids[start + (stop - start) % period]:
                stop += 1
            tokens = stop - start
            if tokens >= 64 and tokens >= 4 * period:
                found.append(Loop(start, tokens, period))
    return min(found, key=lambda loop: (-loop.tokens, loop.period, loop.start), default=None)


@given(
    before=st.lists(st.integers(0, 2), max_size=30),
    unit=st.lists(st.integers(0, 2), min_size=1, max_size=24),
    repeats=st.integers(0, 40),
    after=st.lists(st.integers(0, 2), max_size=30),
)
@settings(deadline=None, max_examples=150)
def test_loops_are_those_of_the_slow_search(
    before: list[int], unit: list[int], repeats: int, after: list[int]
) -> None:
    """Place, length and period."""
    ids = [*before, *(unit * repeats)[:120], *after]
    assert oracle(ids) == find_loop(ids)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        pytest.param([], None, id="nothing"),
        pytest.param([7] * 63, None, id="a ruler"),
        pytest.param([7] * 64, Loop(0, 64, 1), id="one token for ever"),
        pytest.param(list(range(100)) * 3, None, id="three times is no loop"),
        pytest.param(list(range(20)) * 4, Loop(0, 80, 20), id="four times is one"),
        pytest.param(
            [1, 2, *(list(range(5, 25)) * 5)[:93]], Loop(2, 93, 20), id="cut off in the fifth"
        ),
        pytest.param(
            [token for n in range(100) for token in (1, 2, 3, 4 + n)],
            None,
            id="other numbers each time",
        ),
    ],
)
def test_what_models_do(ids: list[int], expected: Loop | None) -> None:
    """Four repeats over 64 tokens."""
    assert find_loop(ids) == expected
