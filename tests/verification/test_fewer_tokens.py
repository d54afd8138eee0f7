"""Logits of a model with fewer tokens, beside those of the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from racdeploy.pipeline.evaluation import note_logits
from racdeploy.verification.top_logits import compare_checkpoints

TOKENS = 12
OLD_IDS = np.array([0, 2, 3, 5, 8, 11])


class Table:
    """An engine whose logits are a row of a table for each token."""

    def __init__(self, table_VV: np.ndarray) -> None:
        self.table_VV = table_VV

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        return self.table_VV[list(ids)]


def _compare(pruned_VV: np.ndarray, dense_VV: np.ndarray, traces: list[Any]) -> Any:
    models = [nullcontext(Table(each)) for each in (pruned_VV, dense_VV, pruned_VV)]
    return compare_checkpoints(*[lambda model=model: model for model in models], traces, OLD_IDS)


def test_the_dense_distribution_is_that_of_kept_tokens() -> None:
    """A model that only lost tokens has no divergence; what they had is the lost mass."""
    dense_VV = np.random.default_rng(0).normal(0, 2, (TOKENS, TOKENS)).astype(np.float32)
    same_VV = dense_VV[np.ix_(OLD_IDS, OLD_IDS)]
    trace = ((0, 2, 5), (8, 11, 3))
    found = _compare(same_VV, dense_VV, [trace, ((2,), (0, 0))])

    # float32 logits are equal, so float64 divergences are their own rounding.
    assert (found.tokens, found.traces) == (5, 2)
    assert found.pruning.kl == pytest.approx(0, abs=1e-12)
    assert found.export.kl == pytest.approx(0, abs=1e-12)
    asked = [5, 8, 11, 2, 0]
    mass_TV = softmax(dense_VV[asked].astype(np.float64), axis=1)
    assert found.lost_mass == pytest.approx(1 - mass_TV[:, OLD_IDS].sum(1).mean(), abs=1e-12)


def test_a_change_shows_in_the_renormalised_divergence() -> None:
    """The divergence is scipy's, of the dense distribution over the tokens that stay."""
    random = np.random.default_rng(1)
    dense_VV = random.normal(0, 2, (TOKENS, TOKENS)).astype(np.float32)
    other_VV = random.normal(0, 2, (len(OLD_IDS), len(OLD_IDS))).astype(np.float32)
    found = _compare(other_VV, dense_VV, [((0, 2, 5), (8, 11, 3))])

    own = [OLD_IDS.tolist().index(i) for i in (5, 8, 11)]
    dense_TV = softmax(dense_VV[np.ix_([5, 8, 11], OLD_IDS)].astype(np.float64), axis=1)
    other_TV = softmax(other_VV[own].astype(np.float64), axis=1)
    expected = rel_entr(dense_TV, other_TV).sum(1).mean()
    assert found.pruning.kl == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


def test_a_trace_with_a_token_that_is_gone_is_left_out() -> None:
    """The others are counted; where none is left, nothing was compared, and the notes say so."""
    dense_VV = np.zeros((TOKENS, TOKENS), np.float32)
    same_VV = dense_VV[np.ix_(OLD_IDS, OLD_IDS)]
    gone = ((0, 1), (2,)), ((0,), (4, 2))
    found = _compare(same_VV, dense_VV, [((0,), (2,)), *gone])
    assert found.traces == 1
    assert "2 of 3 dense answers" in note_logits(found, 3)[1]

    assert _compare(same_VV, dense_VV, list(gone)) is None
    (note,) = note_logits(None, 2)
    assert "2 of 2 dense answers have tokens that are gone" in note
    assert len(note_logits(found, 1)) == 1
