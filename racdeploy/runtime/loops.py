"""Detection of loops in a completion, by token ids.

A loop is a run of at least 64 tokens in which one n-gram repeats at least four times, the last
perhaps cut off. Repetition with changing numbers is not detected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MIN_TOKENS = 64  # a line of dashes or an indented table is shorter
_MIN_REPEATS = 4  # three repetitions may still be an argument
_MAX_PERIOD = 1024


def measure_loop(ids: Sequence[int]) -> int:
    """Return the length of the longest loop in tokens, its first n-gram included, or 0.

    Args:
        ids: a completion without its end-of-sequence token.
    """
    ids_T = np.asarray(ids, dtype=np.int64)
    longest = 0

    for period in range(1, min(len(ids_T) // _MIN_REPEATS, _MAX_PERIOD) + 1):
        # A loop of this period is a run of tokens equal to those one period before.
        same_T = ids_T[period:] == ids_T[:-period]
        if int(same_T.sum()) < period * (_MIN_REPEATS - 1):
            continue

        fenced = np.concatenate(([False], same_T, [False]))
        edges = np.flatnonzero(np.diff(fenced))  # starts and stops of runs alternate
        tokens = int((edges[1::2] - edges[::2]).max()) + period

        if tokens >= max(_MIN_TOKENS, _MIN_REPEATS * period):
            longest = max(longest, tokens)

    return longest
