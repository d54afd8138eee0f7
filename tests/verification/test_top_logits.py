"""The most likely tokens and their divergence are those of torch and scipy, at any width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr

from racdeploy.verification.top_logits import TOP_K, compare_top, take_top

POSITIONS = 70  # more than are computed at a time


def _make_logits(width: int, seed: int) -> np.ndarray:
    """Return logits of a model that is sure of some tokens and unsure of others."""
    generator = np.random.default_rng(seed)
    logits_TV = 2.5 * generator.standard_normal((POSITIONS, width))
    sure = generator.integers(0, width, POSITIONS)
    logits_TV[np.arange(POSITIONS), sure] += generator.uniform(0, 30, POSITIONS)
    return logits_TV.astype(np.float32)


@pytest.mark.parametrize("width", [20, TOP_K, 1_000, 64 * 64, 30_001])
def test_the_most_likely_tokens_are_those_of_torch(width: int) -> None:
    """A vocabulary narrower than what is kept, one of whole blocks, and one with a rest."""
    logits_TV = _make_logits(width, 0)
    top = take_top(logits_TV)
    values_TK, ids_TK = torch.from_numpy(logits_TV).topk(min(TOP_K, width), sorted=True)
    assert [set(row) for row in top.id_TK.tolist()] == [set(row) for row in ids_TK.tolist()]

    expected_TV = log_softmax(logits_TV.astype(np.float64), axis=1)
    expected_TK = np.take_along_axis(expected_TV, top.id_TK, 1)
    # float32 exponentials are off by half a step of 2^-23; their sum is of at most 1.
    np.testing.assert_allclose(top.log_p_TK, expected_TK, rtol=0, atol=1e-7)
    assert values_TK.shape == top.log_p_TK.shape


def test_equal_logits_are_kept_as_many_as_asked() -> None:
    """A floor that a whole vocabulary reaches."""
    top = take_top(np.zeros((2, 64 * 64), dtype=np.float32))
    assert [len(set(row)) for row in top.id_TK.tolist()] == [TOP_K, TOP_K]
    np.testing.assert_allclose(top.log_p_TK, -np.log(64 * 64), atol=1e-7)


def test_the_divergence_is_that_of_65_outcomes() -> None:
    """At most that of the whole distribution; none of equal models."""
    first_TV = _make_logits(30_001, 0)
    noise_TV = np.random.default_rng(1).standard_normal(first_TV.shape).astype(np.float32)
    second_TV = first_TV + np.float32(0.3) * noise_TV
    top = take_top(first_TV)
    compared = compare_top(top, second_TV)

    p_TV, q_TV = (
        np.exp(log_softmax(each.astype(np.float64), axis=1)) for each in (first_TV, second_TV)
    )
    p_TK, q_TK = (np.take_along_axis(each, top.id_TK, 1) for each in (p_TV, q_TV))
    rest_T = rel_entr(1 - p_TK.sum(1), 1 - q_TK.sum(1))
    np.testing.assert_allclose(compared.kl_T, rel_entr(p_TK, q_TK).sum(1) + rest_T, atol=1e-7)
    assert (compared.kl_T <= rel_entr(p_TV, q_TV).sum(1) + 1e-7).all()
    assert np.array_equal(compared.same_T, first_TV.argmax(1) == second_TV.argmax(1))
    assert compare_top(top, first_TV).kl_T.max() == 0


def test_a_position_that_is_no_number_stays_none() -> None:
    """A damaged file must not look near."""
    good_TV = _make_logits(30_001, 0)
    bad_TV = good_TV.copy()
    bad_TV[3, 7] = np.nan
    compared = compare_top(take_top(good_TV), bad_TV)
    assert np.flatnonzero(np.isnan(compared.kl_T)).tolist() == [3]
    assert np.isnan(compare_top(take_top(bad_TV), good_TV).kl_T[3])


def test_a_smaller_vocabulary_loses_the_mass_of_what_it_lacks() -> None:
    """The probabilities of what is left are those of these tokens alone."""
    logits_TV = _make_logits(30_001, 0)
    old_ids = np.arange(0, 30_001, 3)
    top = take_top(logits_TV, old_ids)
    whole_TV = log_softmax(logits_TV.astype(np.float64), axis=1)
    lost_T = 1 - np.exp(whole_TV[:, old_ids]).sum(1)
    np.testing.assert_allclose(top.lost_T, lost_T, atol=1e-12)
    kept_TK = np.take_along_axis(
        log_softmax(logits_TV[:, old_ids].astype(np.float64), 1), top.id_TK, 1
    )
    np.testing.assert_allclose(top.log_p_TK, kept_TK, rtol=0, atol=1e-7)
