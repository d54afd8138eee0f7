"""Loops, against a slow search over every start and period."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from racdeploy.runtime.loops import measure_loop


def oracle(ids: list[int]) -> int:
    """Extend every n-gram at every place as far as it repeats."""
    found = [0]
    for period in range(1, len(ids) // 4 + 1):
        for start in range(len(ids) - period):
            stop = start + period
            while stop < len(ids) and ids[stop] == ids[start + (stop - start) % period]:
                stop += 1
            tokens = stop - start
            if tokens >= 64 and tokens >= 4 * period:
                found.append(tokens)
    return max(found)


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
    ids = [*before, *(unit * repeats)[:120], *after]
    assert oracle(ids) == measure_loop(ids)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        pytest.param([], 0, id="nothing"),
        pytest.param([7] * 63, 0, id="a ruler"),
        pytest.param([7] * 64, 64, id="one token for ever"),
        pytest.param(list(range(100)) * 3, 0, id="three times is no loop"),
        pytest.param(list(range(20)) * 4, 80, id="four times is one"),
        pytest.param([1, 2, *(list(range(5, 25)) * 5)[:93]], 93, id="cut off in the fifth"),
        pytest.param(
            [token for n in range(100) for token in (1, 2, 3, 4 + n)],
            0,
            id="other numbers each time",
        ),
    ],
)
def test_what_models_do(ids: list[int], expected: int) -> None:
    """Four repeats over 64 tokens."""
    assert measure_loop(ids) == expected
