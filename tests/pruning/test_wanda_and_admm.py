"""Magnitude, Wanda and ADMM: each against its definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from racdeploy import plugins
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import NOfM, Pattern, Unstructured
from racdeploy.pruning.weights.refit import prune_and_refit, refit
from racdeploy.recipe import Pruning
from tests.references import obs


def _problem(
    outputs: int, inputs: int, seed: int, spread: float = 1.5
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_NI = torch.randn(4 * inputs, inputs, generator=generator) * torch.linspace(
        1.7 - spread, 1.7 + spread, inputs
    )
    input_NI[:, 1:] += 0.7 * input_NI[:, :-1]
    return torch.randn(outputs, inputs, generator=generator), input_NI.T @ input_NI / len(input_NI)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.3), NOfM(2, 4)])
def test_wanda_equals_its_definition(pattern: Pattern) -> None:
    """Each row of numpy's |W| · |x|₂ loses its lowest share; weights are untouched otherwise."""
    weight_OI, hessian_II = _problem(6, 40, 0)
    expected = obs.wanda_keep(
        weight_OI.double().numpy(),
        np.sqrt(hessian_II.diagonal().double().numpy()),
        pattern.sparsity if isinstance(pattern, Unstructured) else None,
        (pattern.kept, pattern.of) if isinstance(pattern, NOfM) else None,
    )
    method = plugins.load("prune_methods", "wanda")
    result = method.prune(weight_OI.clone(), Hessian(hessian_II, 0.01), pattern, Pruning())
    assert np.array_equal(expected, result.keep_OI.numpy())
    assert torch.equal(result.weight_OI, weight_OI * result.keep_OI)


def test_admm_finds_nearly_the_best_mask() -> None:
    """Against every mask of 12 choose 6, each solved exactly: the median of its rows is within 5 %
    of the best.
    """
    weight_OI, hessian_II = _problem(16, 12, 1)
    hessian = Hessian(hessian_II, 1e-6)
    pattern = NOfM(6, 12)
    result = plugins.load("prune_methods", "admm").prune(
        weight_OI.clone(), hessian, pattern, Pruning()
    )
    found_OI = refit(result, weight_OI, hessian, 60)
    H, best = hessian.matrix_II.double().numpy(), np.full(16, np.inf)
    for kept in itertools.combinations(range(12), 6):
        index = np.array(kept)
        dropped = np.setdiff1d(np.arange(12), index)
        inner = H[np.ix_(dropped, dropped)] - H[np.ix_(dropped, index)] @ np.linalg.solve(
            H[np.ix_(index, index)], H[np.ix_(index, dropped)]
        )
        gone = weight_OI.double().numpy()[:, dropped]
        best = np.minimum(best, ((gone @ inner) * gone).sum(1))
    delta = (found_OI - weight_OI).double().numpy()
    ratio = ((delta @ H) * delta).sum(1) / best
    assert (ratio > 1 - 1e-3).all()
    assert np.median(ratio) < 1.05


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.6), Unstructured(0.7), NOfM(2, 4)]
)
def test_admm_beats_sparsegpt_beats_wanda(pattern: Pattern) -> None:
    """On a correlated input, before any refit."""
    weight_OI, hessian_II = _problem(48, 96, 2, spread=0.3)
    errors = []
    for name in ("admm", "sparsegpt", "wanda"):
        method, hessian = plugins.load("prune_methods", name), Hessian(hessian_II.clone(), 0.01)
        delta_OI = (
            method.prune(weight_OI.clone(), hessian, pattern, Pruning()).weight_OI - weight_OI
        )
        errors.append(float(((delta_OI @ hessian_II) * delta_OI).sum()))
    assert errors[0] < 0.95 * errors[1]
    assert errors[1] < 0.95 * errors[2]


def test_without_zeros_no_method_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At sparsity 0 the weights are returned as they are, without the cost of a method."""
    weight_OI, hessian_II = _problem(6, 40, 0)
    hessian = Hessian(hessian_II, 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(plugins, "load", None)
        pruned = prune_and_refit(weight_OI, hessian, Unstructured(0.0), Pruning(sparsity=0.0))

    assert torch.equal(weight_OI, pruned.weight_OI)
    assert pruned.keep_OI.all()

    for method in ("sparsegpt", "wanda"):
        plugin = plugins.load("prune_methods", method)
        result = plugin.prune(weight_OI.clone(), hessian, Unstructured(0.0), Pruning(sparsity=0.0))
        assert torch.equal(weight_OI, result.weight_OI)
