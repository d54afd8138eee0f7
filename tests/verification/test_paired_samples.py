"""Several samples per prompt: the prompt stays the unit, which simulation confirms."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from racdeploy.verification.stats.paired import (
    PairedCounts,
    drop_interval,
    paired_counts,
    tango_score,
)
from racdeploy.verification.stats.verdicts import judge

DRAWS = 20_000
MARGIN = 0.05


def test_one_sample_counts_as_before() -> None:
    """Whole counts, exactly; one column of samples is no column."""
    dense, pruned = [1, 1, 0, 1, 0], [1, 0, 1, 0, 0]
    assert paired_counts(dense, pruned) == PairedCounts(2, 1, 5)
    assert paired_counts(np.array(dense)[:, None], np.array(pruned)[:, None]) == PairedCounts(
        2, 1, 5
    )


def test_repeated_samples_are_no_new_prompts() -> None:
    """A model that answers a prompt the same way every time teaches nothing with eight samples."""
    dense, pruned = np.array([1, 1, 0, 1, 0] * 20), np.array([1, 0, 1, 1, 0] * 20)
    eight = paired_counts(
        np.repeat(dense[:, None], 8, axis=1), np.repeat(pruned[:, None], 8, axis=1)
    )
    assert eight == paired_counts(dense, pruned)


def test_independent_samples_count_for_more() -> None:
    """Where chance decides each sample, eight of them are worth more than one, and less than eight
    prompts.
    """
    generator = np.random.default_rng(2)
    dense, pruned = (generator.random((200, 8)) < 0.7 for _ in range(2))
    pairs = paired_counts(dense, pruned)
    assert 2 * 200 < pairs.n < 8 * 200
    assert (pairs.n10 - pairs.n01) / pairs.n == pytest.approx(dense.mean() - pruned.mean())


def test_the_order_of_the_samples_does_not_matter() -> None:
    """Samples of one prompt are not paired with each other."""
    generator = np.random.default_rng(4)
    dense, pruned = (generator.random((50, 4)) < 0.7 for _ in range(2))
    assert paired_counts(dense, pruned) == paired_counts(dense[:, ::-1], pruned)


def _cells(
    kind: str, n: int, generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the probabilities of a right answer by draw and prompt, whose mean drop is the
    margin.
    """
    size = (DRAWS, n)
    if kind == "a fifth of the prompts suffers":
        dense = np.full(size, 0.99)
        return dense, np.where(generator.random(size) < 0.2, 0.99 - MARGIN / 0.2, 0.99)
    if kind == "every prompt suffers alike":
        dense = MARGIN + (1 - MARGIN) * generator.beta(2, 1, size=size)
        return dense, dense - MARGIN
    if kind == "a few prompts break":
        dense = np.where(generator.random(size) < 0.8, 0.98, 0.6)
        return dense, np.where(generator.random(size) < MARGIN / 0.6, dense - 0.6, dense)
    assert kind == "each prompt has one answer"
    dense = (generator.random(size) < 0.9).astype(float)
    flip = generator.random(size)
    lost, won = (MARGIN + 0.02) / 0.9, 0.02 / 0.1
    return dense, np.where(dense == 1, flip >= lost, flip < won).astype(float)


def _passes(dense_RNS: NDArray[np.float64], pruned_RNS: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the verdicts of many verifications at once: the score test and the exact one."""
    net_RN = dense_RNS - pruned_RNS
    more_R, fewer_R = np.maximum(net_RN, 0).sum(1), np.maximum(-net_RN, 0).sum(1)
    scale_R = ((net_RN**2).sum(1) + 1) / (more_R + fewer_R + 1)
    n_R, n10_R, n01_R = (part / scale_R for part in (net_RN.shape[1], more_R, fewer_R))
    score_R = tango_score(n10_R, n01_R, n_R, MARGIN)
    exact_R = binom.cdf(np.ceil(n10_R - 1e-9), np.floor(n_R + 1e-9), MARGIN) < 0.05
    passes: NDArray[np.bool_] = (score_R < -1.6448536269514722) & (exact_R | (n01_R > 0))
    return passes


@pytest.mark.parametrize("samples", [1, 4, 8])
@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize(
    "kind",
    [
        "a fifth of the prompts suffers",
        "every prompt suffers alike",
        "a few prompts break",
        "each prompt has one answer",
    ],
)
def test_a_model_at_the_margin_passes_at_most_five_percent(kind: str, n: int, samples: int) -> None:
    """Type-I error over 20 000 draws, however the samples of a prompt hang together: 5.5 % is
    three standard errors.
    """
    generator = np.random.default_rng(1)
    dense, pruned = (
        generator.binomial(samples, part) / samples for part in _cells(kind, n, generator)
    )
    assert _passes(dense, pruned).mean() <= 0.055


def test_the_simulated_verdicts_are_the_real_ones() -> None:
    """The vectorised verdict above is ``judge`` on ``paired_counts``."""
    generator = np.random.default_rng(9)
    dense, pruned = (generator.binomial(4, p, size=(60, 120)) for p in (0.93, 0.92))
    expected = []
    for d, p in zip(dense, pruned, strict=True):
        dense_NS, pruned_NS = (np.arange(4) < part[:, None] for part in (d, p))
        expected.append(judge(drop_interval(*paired_counts(dense_NS, pruned_NS)), MARGIN) == "pass")
    assert expected == _passes(dense / 4, pruned / 4).tolist()
    assert 0 < sum(expected) < 60


def test_samples_taken_for_prompts_would_exceed_the_level() -> None:
    """The spoiled version: eight equal samples counted as eight prompts pass far too often."""
    generator = np.random.default_rng(1)
    dense, pruned = _cells("each prompt has one answer", 100, generator)
    repeated = (np.repeat(part, 8, axis=1) for part in (dense[:4000], pruned[:4000]))
    assert _passes(*repeated).mean() > 0.15


def test_answers_to_other_prompts_are_refused() -> None:
    """Their number differs."""
    with pytest.raises(ValueError, match="not the same ones"):
        paired_counts([1, 0], [1])
