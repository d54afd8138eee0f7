"""Measure how long a completion repeats itself, by token ids.

A loop is a stretch of at least 64 tokens that is one n-gram at least four times in a row, the last
time perhaps cut off. A model that repeats itself with other numbers each time is not found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TOKENS = 64  # a line of dashes or an indented table is shorter
_REPEATS = 4  # what is said three times may still be an argument
_LONGEST_PERIOD = 1024


def measure_loop(ids: Sequence[int]) -> int:
    """Return the tokens of the longest loop of a completion without its end-of-sequence, or 0.

    The first time counts too.
    """
    ids_T = np.asarray(ids, dtype=np.int64)
    longest = 0

    for period in range(1, min(len(ids_T) // _REPEATS, _LONGEST_PERIOD) + 1):
        # Where a token is the one that came a period before it.
        same_T = ids_T[period:] == ids_T[:-period]
        if int(same_T.sum()) < period * (_REPEATS - 1):
            continue

        tokens = _measure_run(same_T) + period
        if tokens >= max(_TOKENS, _REPEATS * period):
            longest = max(longest, tokens)

    return longest


def _measure_run(is_in_T: NDArray[np.bool_]) -> int:
    """Return the length of the longest run."""
    fenced = np.concatenate(([False], is_in_T, [False]))
    edges = np.flatnonzero(np.diff(fenced))  # a run is between two of them
    return int((edges[1::2] - edges[::2]).max())
