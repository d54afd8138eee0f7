"""Find where a completion repeats itself, by token ids.

A loop is a stretch of at least 64 tokens that is one n-gram at least four times in a row, the last
time perhaps cut off. A model that repeats itself with other numbers each time is not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TOKENS = 64  # a line of dashes or an indented table is shorter
_REPEATS = 4  # what is said three times may still be an argument
_LONGEST_PERIOD = 1024


@dataclass(frozen=True)
class Loop:
    """A stretch of tokens that repeats; ``tokens`` counts the first time too."""

    start: int
    tokens: int
    period: int


def find_loop(ids: Sequence[int]) -> Loop | None:
    """Return the longest loop of a completion without its end-of-sequence, or None.

    Of equal ones that of the shortest period, then the first.
    """
    ids_T = np.asarray(ids, dtype=np.int64)

    best: Loop | None = None

    for period in range(1, min(len(ids_T) // _REPEATS, _LONGEST_PERIOD) + 1):
        # Where a token is the one that came a period before it.
        same_T = ids_T[period:] == ids_T[:-period]
        if int(same_T.sum()) < period * (_REPEATS - 1):
            continue

        start, length = _longest_run(same_T)
        tokens = length + period
        is_longer = best is None or tokens > best.tokens

        if is_longer and tokens >= max(_TOKENS, _REPEATS * period):
            best = Loop(start, tokens, period)

    return best


def _longest_run(is_in_T: NDArray[np.bool_]) -> tuple[int, int]:
    fenced = np.concatenate(([False], is_in_T, [False]))
    edges = np.flatnonzero(np.diff(fenced))  # a run is between two of them
    starts = edges[::2]
    lengths = edges[1::2] - starts
    place = np.argmax(lengths)
    return int(starts[place]), int(lengths[place])
