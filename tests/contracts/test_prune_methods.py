"""What every pruning method promises."""

from __future__ import annotations

import pytest
import torch

from racdeploy import plugins
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights.patterns import NOfM, Pattern, Unstructured
from racdeploy.recipe import Pruning


@pytest.fixture(params=plugins.list_names("prune_methods"))
def method(request: pytest.FixtureRequest):
    return plugins.load("prune_methods", request.param)


def _problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    input_NI = torch.randn(256, 48, generator=generator)
    return torch.randn(20, 48, generator=generator), input_NI.T @ input_NI / 256


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.0), Unstructured(0.37), Unstructured(0.6), NOfM(2, 4), NOfM(1, 16)]
)
def test_the_number_of_zeros_is_exact(method, pattern: Pattern) -> None:
    """Neither one more nor one less than asked, in the mask and in the weights."""
    weight_OI, hessian_II = _problem()
    result = method.prune(
        weight_OI.clone(), Hessian(hessian_II.clone(), 0.01), pattern, Pruning(column_block=32)
    )
    share = pattern.sparsity if isinstance(pattern, Unstructured) else 1 - pattern.kept / pattern.of
    assert round(share * weight_OI.numel()) == int((~result.keep_OI).sum())
    assert torch.equal(result.weight_OI == 0, ~result.keep_OI)


def test_n_of_m_keeps_n_in_every_group(method) -> None:
    """N is the number kept, of each M consecutive inputs."""
    weight_OI, hessian_II = _problem()
    result = method.prune(
        weight_OI.clone(), Hessian(hessian_II.clone(), 0.01), NOfM(3, 8), Pruning()
    )
    assert torch.equal(torch.full((20, 6), 3), result.keep_OI.view(20, 6, 8).sum(-1))


def test_same_input_same_output(method) -> None:
    """Pruning is deterministic."""
    weight_OI, hessian_II = _problem()
    first, second = (
        method.prune(weight_OI.clone(), Hessian(hessian_II.clone(), 0.01), NOfM(2, 4), Pruning())
        for _ in range(2)
    )
    assert torch.equal(first.weight_OI, second.weight_OI)


def test_an_input_that_was_never_active_breaks_nothing(method) -> None:
    """Its weights come in as zero, stay zero, and every other weight is finite."""
    weight_OI, hessian_II = _problem()
    hessian_II[5], hessian_II[:, 5], weight_OI[:, 5] = 0, 0, 0
    result = method.prune(
        weight_OI.clone(), Hessian(hessian_II, 0.01), Unstructured(0.5), Pruning()
    )
    assert (result.weight_OI[:, 5] == 0).all()
    assert torch.isfinite(result.weight_OI).all()
