"""SparseGPT against an explicit solve, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from racdeploy.pruning.methods import sparsegpt
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import NOfM, Pattern, Unstructured
from racdeploy.recipe import Pruning
from tests.references import obs

OUTPUTS, INPUTS = 24, 64


def _problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and a correlated, well-conditioned Hessian."""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(INPUTS, INPUTS, generator=generator) / INPUTS**0.5 + torch.eye(INPUTS)
    input_NI = torch.randn(4 * INPUTS, INPUTS, generator=generator) @ mix_II
    return torch.randn(OUTPUTS, INPUTS, generator=generator), input_NI.T @ input_NI / len(input_NI)


def _oracle(
    weight_OI: torch.Tensor, hessian_II: torch.Tensor, pattern: Pattern, group: int, damping: float
):
    damped = hessian_II.double().numpy() + damping * float(hessian_II.diagonal().mean()) * np.eye(
        INPUTS
    )

    def choose(score: np.ndarray, column: int, pruned: int) -> np.ndarray:
        flat = score.ravel()
        keep = np.ones(flat.size, dtype=bool)
        if isinstance(pattern, NOfM):
            order = np.argsort(-score.reshape(len(score), -1), axis=1)
            keep = np.zeros_like(score, dtype=bool)
            np.put_along_axis(keep, order[:, : pattern.kept], True, axis=1)
            return keep
        target = round(pattern.sparsity * (column * len(score) + score.size)) - pruned
        keep[np.argsort(flat)[:target]] = False
        return keep.reshape(score.shape)

    return obs.prune(weight_OI.double().numpy(), damped, choose, group)


@pytest.mark.parametrize("column_block", [16, 64])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NOfM(2, 4), NOfM(4, 8)])
def test_equals_the_textbook_solve(pattern: Pattern, column_block: int) -> None:
    """Same masks, and weights to 1e-4: float32 keeps 7 digits, a condition near 1e2 and 64 steps
    cost three.
    """
    weight_OI, hessian_II = _problem(0)
    settings = Pruning(column_block=column_block)
    result = sparsegpt.prune(
        weight_OI.clone(), Hessian(hessian_II.clone(), settings.damping), pattern, settings
    )
    group = pattern.of if isinstance(pattern, NOfM) else column_block
    expected, keep = _oracle(weight_OI, hessian_II, pattern, group, settings.damping)
    assert np.array_equal(keep, result.keep_OI.numpy())
    assert np.abs(expected - result.weight_OI.numpy()).max() < 1e-4 * np.abs(expected).max()


def test_a_spoiled_hessian_shows() -> None:
    """The comparison above can fail: another Hessian gives other weights."""
    weight_OI, hessian_II = _problem(0)
    expected, _ = _oracle(weight_OI, hessian_II, Unstructured(0.5), 16, 0.01)
    spoiled_II = hessian_II.clone()
    spoiled_II[3, 3] *= 4
    result = sparsegpt.prune(
        weight_OI.clone(), Hessian(spoiled_II, 0.01), Unstructured(0.5), Pruning(column_block=16)
    )
    assert np.abs(expected - result.weight_OI.numpy()).max() > 1e-2


def test_beats_magnitude_on_the_layerwise_error() -> None:
    """Compensation lowers tr(ΔW H ΔWᵀ), the quantity it minimizes."""
    from racdeploy.pruning.methods import magnitude

    weight_OI, hessian_II = _problem(1)
    errors = []
    for method in (sparsegpt, magnitude):
        pruned = method.prune(
            weight_OI.clone(), Hessian(hessian_II.clone(), 0.01), Unstructured(0.5), Pruning()
        )
        delta_OI = weight_OI - pruned.weight_OI
        errors.append(float(((delta_OI @ hessian_II) * delta_OI).sum()))
    assert errors[0] < 0.9 * errors[1]
