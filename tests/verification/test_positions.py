"""Divergence along the trace: stretches of equal width that lose no token."""

from __future__ import annotations

import numpy as np
import pytest

from racdeploy.verification.measurements import MAX_POSITION_BINS, average_by_position


@pytest.mark.parametrize("longest", [1, 47, 48, 49, 1000])
def test_every_token_is_in_one_stretch(longest: int) -> None:
    """Traces of different lengths: weighted by their tokens, the stretches give the mean over all
    positions.
    """
    generator = np.random.default_rng(longest)
    lengths = [longest, max(1, longest // 3), 1]
    export, pruning = ([generator.random(length) for length in lengths] for _ in range(2))
    rows = average_by_position(export, pruning)
    assert len(rows) <= MAX_POSITION_BINS
    assert sum(row.tokens for row in rows) == sum(lengths)
    assert [rows[0].start_token, *(row.stop_token for row in rows)] == [
        *(row.start_token for row in rows),
        longest,
    ]
    for arm, name in ((export, "export_kl_nats"), (pruning, "pruning_kl_nats")):
        # Means of at most 1 334 numbers below 1: float64 sums differ by less than 1e-12.
        mean = sum(getattr(row, name) * row.tokens for row in rows) / sum(lengths)
        assert mean == pytest.approx(np.concatenate(arm).mean(), abs=1e-12)


def test_a_jump_is_where_it_happened() -> None:
    """Only the tokens after the 60th diverge."""
    kl = np.repeat([0.0, 2.0], [60, 36])
    rows = average_by_position([kl], [kl])
    assert {row.export_kl_nats for row in rows if row.stop_token <= 60} == {0.0}
    assert {row.export_kl_nats for row in rows if row.start_token >= 60} == {2.0}
