"""SparseGPT and Wanda against the semantics of their authors' code: equal masks, errors to 1e-5."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from racdeploy import plugins
from racdeploy.pruning.methods import PrunedWeights
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import NOfM, Pattern, Unstructured
from racdeploy.recipe import Pruning
from tests.references import ist_daslab

OUTPUTS, INPUTS, COLUMN_BLOCK = 32, 128, 32
PATTERNS = [Unstructured(0.5), Unstructured(0.75), NOfM(2, 4), NOfM(6, 8)]


def _problem(seed: int, dead: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and a correlated input, one column of which is never active."""
    generator = torch.Generator().manual_seed(seed)
    input_NI = torch.randn(6 * INPUTS, INPUTS, generator=generator) * torch.linspace(
        0.5, 2.0, INPUTS
    )
    input_NI[:, 1:] += 0.5 * input_NI[:, :-1]
    input_NI[:, dead] = 0
    return torch.randn(OUTPUTS, INPUTS, generator=generator), input_NI


def _ours(
    name: str, weight_OI: torch.Tensor, input_NI: torch.Tensor, pattern: Pattern
) -> PrunedWeights:
    hessian = Hessian(input_NI.T @ input_NI / len(input_NI), 0.01)
    settings = Pruning(column_block=COLUMN_BLOCK)
    pruned: PrunedWeights = plugins.load("prune_methods", name).prune(
        weight_OI * ~hessian.dead_I, hessian, pattern, settings
    )
    return pruned


def _theirs(
    weight_OI: torch.Tensor, input_NI: torch.Tensor, pattern: Pattern, one_too_many: bool
) -> tuple[np.ndarray, np.ndarray]:
    x = input_NI.double().numpy()
    pruned_of = (pattern.of - pattern.kept, pattern.of) if isinstance(pattern, NOfM) else (0, 0)
    sparsity = pattern.sparsity if isinstance(pattern, Unstructured) else 0.0
    return ist_daslab.sparsegpt(
        weight_OI.double().numpy(),
        x.T @ x,
        sparsity,
        pruned_of,
        COLUMN_BLOCK,
        one_too_many=one_too_many,
    )


def _error(found: np.ndarray, weight_OI: torch.Tensor, input_NI: torch.Tensor) -> float:
    return float(
        np.square((found - weight_OI.double().numpy()) @ input_NI.double().numpy().T).sum()
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_finds_the_masks_and_errors_of_its_authors(pattern: Pattern) -> None:
    """With as many zeros; float32 keeps 7 digits, of which a condition near 100 takes two: 1e-5 of
    the error.
    """
    weight_OI, input_NI = _problem(0)
    ours = _ours("sparsegpt", weight_OI, input_NI, pattern)
    theirs, gone = _theirs(weight_OI, input_NI, pattern, one_too_many=False)
    assert np.array_equal(gone, ~ours.keep_OI.numpy())
    found = _error(ours.weight_OI.double().numpy(), weight_OI, input_NI)
    assert found == pytest.approx(_error(theirs, weight_OI, input_NI), rel=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS[:2])
def test_the_authors_prune_one_weight_too_many_in_each_column_block(pattern: Pattern) -> None:
    """In the first block the masks differ in that weight alone; the count is off by one for each
    block.
    """
    weight_OI, input_NI = _problem(1)
    ours = ~_ours("sparsegpt", weight_OI, input_NI, pattern).keep_OI.numpy()
    _, gone = _theirs(weight_OI, input_NI, pattern, one_too_many=True)
    assert (gone ^ ours)[:, :COLUMN_BLOCK].sum() == 1
    assert gone.sum() - ours.sum() == INPUTS // COLUMN_BLOCK


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_finds_the_masks_of_its_authors(pattern: Pattern) -> None:
    """Its norms are of the input as it is: damping is no part of them."""
    weight_OI, input_NI = _problem(2)
    ours = _ours("wanda", weight_OI, input_NI, pattern)
    pruned_of = (pattern.of - pattern.kept, pattern.of) if isinstance(pattern, NOfM) else (0, 0)
    sparsity = pattern.sparsity if isinstance(pattern, Unstructured) else 0.0
    live = weight_OI.double().numpy() * (np.arange(INPUTS) != 3)
    gone = ist_daslab.wanda(live, input_NI.double().numpy(), sparsity, pruned_of)
    assert np.array_equal(gone, ~ours.keep_OI.numpy())


def test_the_comparison_notices_another_damping() -> None:
    """Spoiled once: with a tenth of the damping the errors are not the same to 1e-5."""
    weight_OI, input_NI = _problem(0)
    x = input_NI.double().numpy()
    spoiled, _ = ist_daslab.sparsegpt(
        weight_OI.double().numpy(),
        x.T @ x,
        0.5,
        (0, 0),
        COLUMN_BLOCK,
        percdamp=0.001,
        one_too_many=False,
    )
    ours = _ours("sparsegpt", weight_OI, input_NI, Unstructured(0.5)).weight_OI.double().numpy()
    assert _error(spoiled, weight_OI, input_NI) != pytest.approx(
        _error(ours, weight_OI, input_NI), rel=1e-5
    )
