"""Damping, shared factors, and the back-solve on a fixed mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from racdeploy.pruning.methods import PrunedWeights, sparsegpt
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import Unstructured
from racdeploy.pruning.weights.refit import refit
from racdeploy.recipe import Pruning
from tests.support.errors import raises

OUTPUTS, INPUTS = 10, 32


def _problem(seed: int, inputs: int = INPUTS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_NI = torch.randn(3 * inputs, inputs, generator=generator) * torch.linspace(0.2, 3, inputs)
    input_NI[:, 1:] += 0.5 * input_NI[:, :-1]
    return torch.randn(OUTPUTS, inputs, generator=generator), input_NI.T @ input_NI / len(input_NI)


@pytest.mark.parametrize("inputs", [1, INPUTS, 511, 768])
def test_the_factor_is_that_of_the_damped_inverse(inputs: int) -> None:
    """U is upper triangular, and Uᵀ U is numpy's inverse of the damped matrix, in one slab of
    columns and in more.
    """
    _, hessian_II = _problem(0, inputs)
    damped = hessian_II.double().numpy() + 0.01 * float(hessian_II.diagonal().mean()) * np.eye(
        inputs
    )
    factor_II = Hessian(hessian_II.clone(), 0.01).inverse_factor_II.double()
    assert not factor_II.tril(-1).any()
    np.testing.assert_allclose(
        (factor_II.T @ factor_II).numpy(), np.linalg.inv(damped), rtol=1e-3, atol=1e-4
    )


def test_damping_is_raised_in_steps_and_reported() -> None:
    """A Hessian that does not factor at first is damped more, and it says how much."""
    _, hessian_II = _problem(3)
    indefinite_II = hessian_II - 0.05 * hessian_II.diagonal().mean() * torch.eye(INPUTS)
    lowest = float(torch.linalg.eigvalsh(indefinite_II)[0] / indefinite_II.diagonal().mean())
    assert -0.1 < lowest < -0.01, "the example must need one more step of damping"
    hessian = Hessian(indefinite_II, 0.01)
    assert torch.isfinite(hessian.inverse_factor_II).all()
    assert hessian.damping == pytest.approx(0.1)


def test_a_hopeless_hessian_fails_with_a_remedy() -> None:
    """Nothing is swapped in silently when no damping helps."""
    _, hessian_II = _problem(4)
    with raises("hessian-not-factored"):
        _ = Hessian(-hessian_II - 100 * torch.eye(INPUTS), 0.01).inverse_factor_II


def test_refit_is_the_exact_solution_on_the_mask() -> None:
    """Enough steps reach numpy's solve of every row's normal equations on its kept weights."""
    weight_OI, hessian_II = _problem(1)
    hessian = Hessian(hessian_II, 0.01)
    keep_OI = torch.rand(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(5)) > 0.6
    keep_OI[3] = False  # a row with nothing left is no division by zero
    found_OI = refit(PrunedWeights(weight_OI, keep_OI), weight_OI, hessian, 4 * INPUTS)
    H = hessian.matrix_II.double().numpy()
    for row in range(OUTPUTS):
        kept = keep_OI[row].numpy()
        right = (weight_OI[row].double().numpy() @ H)[kept]
        expected = np.linalg.solve(H[np.ix_(kept, kept)], right)
        np.testing.assert_allclose(found_OI[row].numpy()[kept], expected, rtol=1e-3, atol=1e-3)
        assert not found_OI[row][~keep_OI[row]].any()


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_every_step_of_refit_lowers_the_error(steps: int) -> None:
    """Even few steps after SparseGPT never make the layer worse, and they do help."""
    weight_OI, hessian_II = _problem(2)
    hessian = Hessian(hessian_II, 0.01)
    pruned = sparsegpt.prune(weight_OI.clone(), hessian, Unstructured(0.6), Pruning())

    def error(found_OI: torch.Tensor) -> float:
        delta_OI = found_OI - weight_OI
        return float(((delta_OI @ hessian.matrix_II) * delta_OI).sum())

    found_OI = refit(pruned, weight_OI, hessian, steps)
    assert error(found_OI) < error(pruned.weight_OI) * (1 - 1e-4)
